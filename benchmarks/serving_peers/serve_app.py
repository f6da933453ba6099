"""Ray Serve as it comes: its default proxy and `serve.batch`: `python -m benchmarks.serving_peers.serve_app PORT`."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from benchmarks.serving_peers.predict import MAX_BATCH, Cloud, CloudAnswers, Edge

FOLDER = Path(os.environ["SERVED_FOLDER"])


@serve.deployment(max_ongoing_requests=MAX_BATCH)
class CloudDeployment:
    """The deep network."""

    def __init__(self) -> None:
        self._cloud = Cloud(FOLDER)

    async def classify(self, bodies: list[bytes]) -> CloudAnswers:
        """Classes and confidences."""
        return await asyncio.to_thread(self._cloud.classify, bodies)


@serve.deployment(max_ongoing_requests=2 * MAX_BATCH)
class EdgeDeployment:
    """Answers images in batches."""

    def __init__(self, cloud: DeploymentHandle[Any] | None) -> None:
        loop = asyncio.get_running_loop()

        def ask(bodies: Sequence[bytes]) -> CloudAnswers:
            assert cloud is not None, "not asked where there is none"

            async def call() -> CloudAnswers:
                answers: CloudAnswers = await cloud.classify.remote(list(bodies))
                return answers

            return asyncio.run_coroutine_threadsafe(call(), loop).result()

        self._edge = Edge(FOLDER, ask if cloud else None)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.001)
    async def answer(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """A batch's answers."""
        return await asyncio.to_thread(self._edge.predict, bodies)

    async def __call__(self, request: Request) -> Any:
        """One image's answer."""
        return await self.answer(await request.body())  # type: ignore[arg-type]  # what `serve.batch` makes of it


def main() -> None:
    """Serve until a signal."""
    port, share = int(sys.argv[1]), sys.argv[2] == "cloud"
    stop = [signal.SIGINT, signal.SIGTERM]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    edge: Any = EdgeDeployment
    cloud: Any = CloudDeployment
    serve.run(edge.bind(cloud.bind() if share else None), name="peer", route_prefix="/")
    signal.sigwait(stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


if __name__ == "__main__":
    main()
