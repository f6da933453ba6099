"""The one error for a user's own mistake: jobs print it as a line, servers as a 4xx, nobody as a stack trace."""


class UserError(ValueError):
    """Something the user can mend: the message names the value that is wrong and the remedy."""
