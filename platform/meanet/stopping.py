"""How a process ends: one that is asked to closes what it has open; a command that was on a cluster leaves at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_last_act = threading.Event()
_at_once = threading.Event()


@contextlib.contextmanager
def sigterm_ends_the_block() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, where it would have ended the process at once.

    Entered after `ray.init`, it stands in the place of Ray's handlers: the one in C++ (Abseil's failure handler) aborts
    the process three seconds later, however much is still to be closed. In other threads than the main one, nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)


def leave_after(main: Callable[[], None]) -> NoReturn:
    """Run a command as the last act of its process, which then ends with the command's status: as usual, or, where
    `leave_at_once` was asked for, once what was printed is flushed, with no `atexit` function and no destructor run."""
    _last_act.set()
    status = 0
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if not _at_once.is_set():
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read them is gone, or they are closed
            stream.flush()
    os._exit(status)


def leave_at_once() -> bool:
    """Ask `leave_after` to take nothing apart; returns whether it will, for it may not be what runs here."""
    if _last_act.is_set():
        _at_once.set()
    return _at_once.is_set()
