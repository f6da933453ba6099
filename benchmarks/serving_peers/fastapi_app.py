"""FastAPI under uvicorn; micro-batches by a queue and one thread (uvicorn's --factory: make_edge, make_cloud)."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

from benchmarks.serving_peers.predict import MAX_BATCH, Cloud, CloudAnswers, Edge, HttpCloud, unpack

FOLDER = Path(os.environ["SERVED_FOLDER"])
CLOUD = os.environ.get("CLOUD_ADDRESS")


class Batcher:
    """Gives what is queued to one thread, a batch after the other."""

    def __init__(self) -> None:
        self._edge = Edge(FOLDER, HttpCloud(CLOUD, "/classify") if CLOUD else None)
        self._pool = ThreadPoolExecutor(1)
        self._queue: list[tuple[bytes, asyncio.Future[dict[str, Any]]]] = []
        self._busy = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, body: bytes) -> dict[str, Any]:
        """One image's answer."""
        future = asyncio.get_running_loop().create_future()
        self._queue.append((body, future))
        if not self._busy:
            self._busy = True
            task = asyncio.create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch, self._queue = self._queue[:MAX_BATCH], self._queue[MAX_BATCH:]
                try:
                    answers = await loop.run_in_executor(self._pool, self._edge.predict, [body for body, _ in batch])
                except Exception as error:  # these requests must hear of it
                    for _, future in batch:
                        future.set_exception(error)
                    continue
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)
        finally:
            self._busy = False


def make_edge() -> FastAPI:
    """The edge's application."""
    app, batcher = FastAPI(), Batcher()

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        return await batcher.answer(await request.body())

    return app


def make_cloud() -> FastAPI:
    """The cloud's application."""
    app, cloud = FastAPI(), Cloud(FOLDER)

    @app.post("/classify")
    async def classify(request: Request) -> CloudAnswers:
        return await asyncio.to_thread(cloud.classify, unpack(await request.body()))

    return app
