"""The one error for a user's own mistake: commands print it as a line, servers as a 4xx, nobody as a stack trace."""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend: the message names the value that is wrong and the remedy."""


class AwayError(UserError):
    """What is asked for cannot be had now: something that it needs does not answer. Later it may."""


def first_line(error: BaseException) -> str:
    """Of what an error says; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command: a UserError becomes a line and exit status 1, Ctrl-C exit status 130."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)

    return wrapped
