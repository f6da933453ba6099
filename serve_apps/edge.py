"""The edge's service, apart from HTTP and Ray: decoding, micro-batches, refusals. What it serves may change under load:
a request keeps the version and the policy that it was admitted under."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from meanet.errors import UserError
from meanet.operating_point import policy_id
from meanet.routing import Exit, Policy
from meanet.runtime import Images
from serve_apps.batching import Batcher
from serve_apps.breaker import Breaker
from serve_apps.cloud_calls import AskCloud, CloudCalls
from serve_apps.http import Answer
from serve_apps.micro_batch import Pass, Task
from serve_apps.observer import Observer
from serve_apps.served import Served
from serve_apps.settings import Settings

MAX_MICRO_BATCH = 64
_PACE = 0.2
"""By how much a micro-batch loses weight in the pace, seconds by images, when another one is over."""


class OverloadedError(Exception):
    """The request cannot be answered in time: refused at once, so that the client may go elsewhere."""

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class EdgeService:
    """Answers images in micro-batches, each before its deadline."""

    def __init__(
        self, served: Served, ask_cloud: AskCloud, settings: Settings | None = None, observer: Observer | None = None
    ) -> None:
        self._served = served
        self._settings = settings or Settings()
        self._observer = observer or Observer()
        self._cloud = CloudCalls(ask_cloud, self._settings, self._observer)
        self._batcher: Batcher[Task] = Batcher(self._run, MAX_MICRO_BATCH)
        self._seconds = self._images = 0.0
        self.watchers: list[Callable[[Pass], None]] = []
        """Shown each pass of the blocks, before its answers go out; must be quick and must not raise."""

    @property
    def served(self) -> Served:
        """What requests are answered with."""
        return self._served

    def serve(self, served: Served) -> None:
        """From now on; requests that were admitted keep theirs."""
        self._served = served

    @property
    def settings(self) -> Settings:
        """In force."""
        return self._settings

    def configure(self, settings: Settings) -> None:
        """From now on."""
        self._settings = settings
        self._cloud.configure(settings)

    @property
    def breaker(self) -> Breaker:
        """About the cloud."""
        return self._cloud.breaker

    async def answer(
        self,
        bodies: Sequence[bytes],
        policy: Policy | None = None,
        deadline_s: float | None = None,
        served: Served | None = None,
    ) -> list[Answer]:
        """The answers to PNG or JPEG bytes, in order.

        Args:
            bodies: images.
            policy: what to apply; what is served says, if None.
            deadline_s: what the client gives us; the settings' own at most.
            served: what the policy was made from; the present one if None.

        Raises:
            UserError: bytes that are no image, or not one that the model takes; a deadline of no time.
            OverloadedError: they cannot be answered in time.
        """
        served, admitted = served or self._served, time.monotonic()
        deadline = self._deadline(deadline_s)
        self._admit(len(bodies), deadline)
        images = await asyncio.to_thread(_decode, served, bodies)
        return await self._queue(images, bodies, served, policy, (admitted, deadline))

    async def answer_pixels(
        self,
        images: Images,
        policy: Policy | None = None,
        deadline_s: float | None = None,
        served: Served | None = None,
    ) -> list[Answer]:
        """The answers to (N, H, W, C) images; else as `answer`."""
        served, admitted = served or self._served, time.monotonic()
        shape = tuple(getattr(served.model.preprocessing, name) for name in ("height", "width", "channels"))
        if images.shape[1:] != shape:
            raise UserError(f"pixels of shape {images.shape[1:]}: this model takes (height, width, channels) {shape}")
        times = admitted, self._deadline(deadline_s)
        return await self._queue(list(images), [None] * len(images), served, policy, times)

    def _deadline(self, wished_s: float | None) -> float:
        if wished_s is not None and not 0 < wished_s < math.inf:
            raise UserError(f"deadline of {wished_s} s: it must be above 0")
        return time.monotonic() + min(self._settings.deadline_s, wished_s or math.inf)

    async def _queue(
        self,
        images: Sequence[Images],
        bodies: Sequence[bytes | None],
        served: Served,
        policy: Policy | None,
        times: tuple[float, float],
    ) -> list[Answer]:
        admitted, deadline = times
        self._admit(len(images), deadline)
        loop = asyncio.get_running_loop()
        tasks = [
            Task(image, body, served, policy or served.policy, admitted, deadline, loop.create_future())
            for image, body in zip(images, bodies, strict=True)
        ]
        self._batcher.put(tasks)
        return await asyncio.gather(*(task.answer for task in tasks))

    def _admit(self, count: int, deadline: float) -> None:
        """Refuse what would wait too long, before anything is spent on it."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise self._overloaded("the request's time was over before it could be queued", 0.1)
        queued = self._batcher.queued
        wait = queued * self._seconds / max(1.0, self._images)  # of those ahead; how long its own take is not known
        if queued and queued + count > self._settings.max_queued:
            raise self._overloaded(f"{queued} images wait and the limit is {self._settings.max_queued}", wait)
        if wait > left_s:
            raise self._overloaded(f"{queued} images wait, which takes {wait:.2f} s", wait - left_s)

    def _overloaded(self, why: str, retry_after_s: float) -> OverloadedError:
        self._observer.refused("overloaded")
        return OverloadedError(why, max(0.1, retry_after_s))

    async def _run(self, tasks: Sequence[Task]) -> None:
        """Give a micro-batch to the blocks: one pass for each version and policy in it, as a rule one."""
        groups: dict[tuple[int, str, bool], list[Task]] = {}
        for task in tasks:
            groups.setdefault((task.served.version, policy_id(task.policy), task.policy.edge_only), []).append(task)
        for group in groups.values():
            try:
                await self._run_group(group)
            except Exception as error:  # whatever it is, these requests must hear of it
                for task in group:
                    if not task.answer.done():
                        task.answer.set_exception(error)

    async def _run_group(self, tasks: Sequence[Task]) -> None:
        served, policy = tasks[0].served, tasks[0].policy
        images = np.stack([task.image for task in tasks])
        started = time.perf_counter()
        answers, pending = await asyncio.to_thread(served.runtime.run, images, policy)
        seconds = time.perf_counter() - started
        self._seconds = (1 - _PACE) * self._seconds + seconds
        self._images = (1 - _PACE) * self._images + len(tasks)
        self._observer.passed(len(tasks), seconds)
        batch = Pass(tasks, served, policy, images, answers, pending, 1000 * seconds, self._observer)
        for watch in self.watchers:
            watch(batch)
        batch.resolve(answers.exit != Exit.CLOUD, cloud_ms=0.0, reason=None)
        if len(pending.rows):
            await self._cloud.settle(batch)  # the next micro-batch need not wait for this one's cloud


def _decode(served: Served, bodies: Sequence[bytes]) -> list[Images]:
    images = []
    for number, body in enumerate(bodies):
        try:
            images.append(served.model.preprocessing.decode(body))
        except UserError as error:
            where = f"image {number} of the batch: " if len(bodies) > 1 else ""
            raise UserError(f"{where}{error}") from error
    return images
