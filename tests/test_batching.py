"""The batcher: its one thread, what it takes and when."""

import asyncio
import threading
import time
from collections.abc import Sequence

from serve_apps.batching import Batcher


def test_batcher_goes_at_once_and_gathers_what_arrives_meanwhile() -> None:
    batches: list[list[int]] = []
    threads: set[int] = set()
    handed: list[int] = []

    async def run() -> None:
        def work(items: Sequence[int]) -> int:
            threads.add(threading.get_ident())
            batches.append(list(items))
            time.sleep(0.01)
            return len(items)

        def done(count: int) -> None:
            assert threading.current_thread() is threading.main_thread()
            handed.append(count)

        batcher: Batcher[int, int] = Batcher(work, done, 4, "test")
        batcher.put([-1])
        while not batches:
            await asyncio.sleep(0)
        batcher.put(list(range(9)))
        assert batcher.queued == 9
        while sum(handed) < 10:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert batches == [[-1], [0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert handed == [1, 4, 4, 1], "one hand-over a batch"
    assert len(threads) == 1
    assert threading.get_ident() not in threads
