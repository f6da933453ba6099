"""Takes what is queued when free: no wait when nothing is queued, whole batches under load."""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Batcher(Generic[Item]):
    """Feeds queued items to `run`, at most `max_size` at a time, one batch after another.

    The first item of an idle batcher goes at once; what arrives meanwhile makes up the next batch.
    """

    def __init__(self, run: Callable[[Sequence[Item]], Awaitable[None]], max_size: int) -> None:
        self._run, self._max_size = run, max_size
        self._queue: deque[Item] = deque()
        self._busy: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """Items that wait, without those that `run` has in hand."""
        return len(self._queue)

    def put(self, items: Sequence[Item]) -> None:
        """Queue items; must be called on the event loop's thread."""
        self._queue.extend(items)
        if self._busy is None or self._busy.done():
            loop, context = asyncio.get_running_loop(), contextvars.Context()  # a batch is no one request's
            self._busy = loop.create_task(self._drain(), context=context)

    async def _drain(self) -> None:
        while self._queue:
            count = min(self._max_size, len(self._queue))
            await self._run([self._queue.popleft() for _ in range(count)])
