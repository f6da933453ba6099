"""The edge's service, apart from HTTP and Ray: decoding, micro-batches, refusals. What it serves may change under load:
a request keeps the version and the policy that it was admitted under."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meanet.breaker import Breaker
from meanet.deadlines import QUEUE_SHARE, longest_wait
from meanet.errors import UserError
from meanet.routing import Ints, Policy, Reading
from meanet.runtime import Images
from serve_apps.batching import Batcher
from serve_apps.cloud_calls import AskCloud, CloudCalls
from serve_apps.http import Answer
from serve_apps.micro_batch import Pass, Task, applied, gathered, mask, pixels_of
from serve_apps.observer import Observer
from serve_apps.pace import Pace
from serve_apps.served import Served
from serve_apps.settings import Settings

MAX_MICRO_BATCH = 64


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
        self._batcher: Batcher[Task, list[Pass | _Failure]] = Batcher(self._run, self._done, MAX_MICRO_BATCH, "edge")
        self._pace = Pace()
        self.turned_away = 0
        """Requests that were refused for overload, so far."""
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

    async def second_opinion(self, batch: Pass, rows: Ints) -> Reading | None:
        """What the cloud says of samples that the edge has answered; None where it cannot be had."""
        return await self._cloud.second_opinion(batch, rows)

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
        return await self._queue([None] * len(bodies), bodies, served or self._served, policy, deadline_s)

    async def answer_pixels(
        self,
        images: Images,
        policy: Policy | None = None,
        deadline_s: float | None = None,
        served: Served | None = None,
    ) -> list[Answer]:
        """The answers to (N, H, W, C) images; else as `answer`."""
        served = served or self._served
        shape = tuple(getattr(served.model.preprocessing, name) for name in ("height", "width", "channels"))
        if images.shape[1:] != shape:
            raise UserError(f"pixels of shape {images.shape[1:]}: this model takes (height, width, channels) {shape}")
        return await self._queue(list(images), [None] * len(images), served, policy, deadline_s)

    def _deadline(self, wished_s: float | None) -> float:
        if wished_s is not None and not 0 < wished_s < math.inf:
            raise UserError(f"deadline of {wished_s} s: it must be above 0")
        return time.monotonic() + min(self._settings.deadline_s, wished_s or math.inf)

    async def _queue(
        self,
        images: Sequence[Images | None],
        bodies: Sequence[bytes | None],
        served: Served,
        policy: Policy | None,
        deadline_s: float | None,
    ) -> list[Answer]:
        admitted, deadline = time.monotonic(), self._deadline(deadline_s)
        self._admit(len(images), deadline)
        future = asyncio.get_running_loop().create_future
        policy, many = policy or served.policy, len(images) > 1
        tasks = [
            Task(image, body, place if many else None, served, policy, admitted, deadline, future())
            for place, (image, body) in enumerate(zip(images, bodies, strict=True))
        ]
        self._batcher.put(tasks)
        try:
            if not many:
                return [await task.answer for task in tasks]
            return await asyncio.gather(*(task.answer for task in tasks))
        except OverloadedError:
            self._count_refusal()
            raise
        finally:  # of a request that is over, nothing more is computed
            for task in tasks:
                task.answer.cancel()

    @property
    def away(self) -> int:
        """Requests of one image that wait for the cloud."""
        return self._cloud.away

    def full(self) -> tuple[str, float]:
        """Why no more requests should be read now, and after how many seconds there may be room; ("", 0) = read on."""
        queued = self._batcher.queued
        wait = self._pace.wait(queued, MAX_MICRO_BATCH)
        if queued >= self._settings.max_queued:
            return f"{queued} images wait and the limit is {self._settings.max_queued}", wait
        if wait > longest_wait(self._settings.deadline_s):
            return f"{queued} images wait, which takes {wait:.2f} s", wait
        return "", 0.0

    def refused(self, reason: str) -> None:
        """Somebody has refused a request for us."""
        self._observer.refused(reason)

    def _admit(self, count: int, deadline: float) -> None:
        """Refuse what would wait too long, before anything is spent on it."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise self._overloaded("the request's time was over before it could be queued", 0.1)
        queued = self._batcher.queued
        wait = self._pace.wait(queued, MAX_MICRO_BATCH)  # of those ahead; how long its own take is not known
        if queued and queued + count > self._settings.max_queued:
            raise self._overloaded(f"{queued} images wait and the limit is {self._settings.max_queued}", wait)
        if wait > QUEUE_SHARE * left_s:
            raise self._overloaded(f"{queued} images wait, which takes {wait:.2f} s", wait)

    def _count_refusal(self) -> None:
        """Once a request, however many images it has."""
        self.turned_away += 1
        self._observer.refused("overloaded")

    def _overloaded(self, why: str, retry_after_s: float) -> OverloadedError:
        self._count_refusal()
        return OverloadedError(why, max(0.1, retry_after_s))

    def _run(self, tasks: Sequence[Task]) -> "list[Pass | _Failure]":
        """In the batch's thread: one pass for each version and policy among the tasks, as a rule one."""
        started = time.perf_counter()
        done: list[Pass | _Failure] = []
        for group in gathered(tasks):
            images: list[Images] = []
            sound: list[Task] = []
            for task in group:
                if task.answer.done():  # nobody waits any more
                    continue
                if task.deadline <= time.monotonic():
                    done.append(_Failure([task], OverloadedError("the request's time was over while it waited", 0.1)))
                    continue
                try:
                    images.append(pixels_of(task))
                    sound.append(task)
                except Exception as error:
                    done.append(_Failure([task], error))
            if sound:
                done.append(self._guarded_pass(sound, images))
        self._pace.record(len(tasks), time.perf_counter() - started)
        return done

    def _guarded_pass(self, tasks: list[Task], images: list[Images]) -> "Pass | _Failure":
        try:
            return self._pass(tasks, np.stack(images))
        except Exception as error:  # whatever it is, these requests must hear of it
            return _Failure(tasks, error)

    def _pass(self, tasks: list[Task], images: Images) -> Pass:
        served, policy, alone = tasks[0].served, tasks[0].policy, None
        started = time.perf_counter()
        answers, pending = served.runtime.run(images, policy)
        if len(pending.rows) and not self._cloud.breaker.allows():
            alone = "cloud circuit open"
            served.runtime.finish(answers, pending, policy)
        seconds = time.perf_counter() - started
        return Pass(
            tasks, served, policy, images, answers, pending, 1000 * seconds, alone, applied(policy), self._observer
        )

    def _done(self, results: "list[Pass | _Failure]") -> None:
        """On the event loop: answers go out, and what is complex goes up."""
        for result in results:
            if isinstance(result, _Failure):
                result.tell()
                continue
            self._observer.passed(len(result.tasks), result.edge_ms / 1000)
            for watch in self.watchers:
                watch(result)
            waiting = mask(result.pending.rows, len(result.tasks))
            result.resolve(~waiting, cloud_ms=0.0, reason=None)
            if len(result.pending.rows):
                self._cloud.settle(result)  # the next micro-batch need not wait for this one's cloud


@dataclass(frozen=True)
class _Failure:
    """Tasks that get no answer."""

    tasks: Sequence[Task]
    error: Exception

    def tell(self) -> None:
        """Let their requests hear of it."""
        for task in self.tasks:
            if not task.answer.done():
                task.answer.set_exception(self.error)
