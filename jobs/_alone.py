"""One command at a time in a folder: two would clear and write over what the other is at work on."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import _progress
from meanet.errors import UserError

_LOCK = ".lock"
"""Stays when the folder is cleared; a name with a dot is copied nowhere."""


@contextmanager
def alone(folder: Path, who: str = "command") -> Iterator[None]:
    """While the block runs, no other that asks for it has the folder; a process that ends, however, gives it up.

    A folder that is not there has nobody in it. Where the file system has no locks, that is said, and the block runs.

    Raises:
        UserError: another has it.
    """
    if not folder.is_dir():
        yield
        return
    try:
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        _progress.say(_unlocked(folder, error))
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another {who} is at work in {folder}: wait for it to end, or give another folder with --output"
            ) from error
        except OSError as error:
            _progress.say(_unlocked(folder, error))
        yield


def _unlocked(folder: Path, error: OSError) -> str:
    return f"note: {folder} cannot be locked ({error.strerror}): let no other command work in it meanwhile"
