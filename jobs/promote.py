"""Make a version the champion, which the server loads: `python -m jobs.promote 3`, or back with `--rollback`."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs import _cli
from meanet.errors import UserError, exit_on_user_error
from meanet.tracking import MODEL, Tracker


@dataclass(frozen=True)
class Flags:
    """Point the alias `champion` at a version."""

    version: Annotated[str | None, tyro.conf.Positional] = None
    """Version number, or an alias such as candidate."""
    rollback: bool = False
    """Give the alias back to the version that the champion replaced."""
    force: bool = False
    """Replace a champion of another recipe."""
    json: bool = False
    """Print the result as JSON."""


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse("promote", Flags)
    if (flags.version is None) != flags.rollback:
        raise UserError("give either a version to promote or --rollback")
    tracker = Tracker(environment.tracking_uri)
    if flags.version is None:
        replaced, champion = tracker.rollback()
    else:
        champion = tracker.version_of(flags.version)
        before = tracker.promote(champion, force=flags.force)
        replaced = before if before is not None else 0
    if flags.json:
        print(json.dumps({"model": MODEL, "champion": champion, "replaced": replaced or None}))
    else:
        print(f"{MODEL} champion is version {champion}" + (f", before it version {replaced}" if replaced else ""))


if __name__ == "__main__":
    main()
