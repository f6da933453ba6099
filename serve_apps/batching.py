"""Takes what is queued when free: no wait when nothing is queued, whole batches under load.

A wait of up to a millisecond for more was measured to be no better than none: under load the next batch fills while
this one computes, and without load a wait is only lost.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Feeds queued items to `run` in one thread of its own, at most `max_size` at a time, one batch after another.

    The first item of an idle batcher goes at once; what arrives meanwhile makes up the next batch. A batch's result is
    handed to `done` on the event loop, in one call.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Result],
        done: Callable[[Result], None],
        max_size: int,
        name: str,
    ) -> None:
        """`run` and `done` must not raise."""
        self._run, self._done, self._max_size = run, done, max_size
        self._queue: deque[tuple[asyncio.AbstractEventLoop, Item]] = deque()
        self._lock = Lock()
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)  # its thread ends with it

    @property
    def queued(self) -> int:
        """Items that wait, without those that `run` has in hand."""
        return len(self._queue)

    def put(self, items: Sequence[Item]) -> None:
        """Queue items; must be called on the event loop's thread."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._queue.extend([(loop, item) for item in items])
            idle, self._busy = not self._busy, True
        if idle:
            self._thread.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                taken = [self._queue.popleft() for _ in range(min(self._max_size, len(self._queue)))]
                if not taken:
                    self._busy = False
                    return
            result = self._run([item for _, item in taken])
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                taken[0][0].call_soon_threadsafe(self._done, result)
