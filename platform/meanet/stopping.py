"""A process that is asked to end closes what it has open."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


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
