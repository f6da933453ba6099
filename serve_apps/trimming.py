"""Gives memory back to the system after large bodies: the C library keeps what was freed between what is still held, so
that a replica would stay as large as the largest bodies that came at one time."""

import asyncio
import ctypes
from collections.abc import Callable

LARGE = 2**20
"""Bytes of a body from which on it matters."""
_AFTER_S = 0.5
"""One of these for all bodies that end meanwhile; milliseconds, beside the event loop."""


def _malloc_trim() -> Callable[[int], int] | None:
    """The GNU C library's; None elsewhere."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


class Trimmer:
    """Of one event loop."""

    def __init__(self, trim: Callable[[int], int] | None = None) -> None:
        """With another `trim` than the C library's."""
        self._trim = trim or _malloc_trim()
        self._due = False

    def body_ended(self, size: int) -> None:
        """A request is over whose body had so many bytes."""
        if size >= LARGE and self._trim is not None and not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_AFTER_S, self._begin)

    def _begin(self) -> None:
        self._due = False
        assert self._trim is not None, "else nothing is due"
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
