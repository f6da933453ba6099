"""The edge's service, apart from HTTP and Ray: decoding, micro-batches, the cloud call and what happens without it."""

import asyncio
import contextvars
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meanet.artifact import TrainedModel
from meanet.breaker import Breaker
from meanet.errors import UserError
from meanet.operating_point import policy_id
from meanet.preprocessing import transmit
from meanet.routing import Bools, Exit, Ints, Policy, Reading
from meanet.runtime import Answers, EdgeRuntime, Images, Pending
from serve_apps.batching import Batcher
from serve_apps.http import EXIT_NAMES, Answer, AppliedPolicy, Joules, Milliseconds
from serve_apps.settings import Settings

MAX_MICRO_BATCH = 64
_PROBE_IMAGES = 8
_PACE = 0.2
"""By how much a micro-batch loses weight in the pace, seconds by images, when another one is over."""


class OverloadedError(Exception):
    """The request cannot be answered in time: refused at once, so that the client may go elsewhere."""

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class CloudAnswer:
    """What the cloud deployment returns for N images."""

    class_ids: list[int]
    confidences: list[float]


@dataclass
class Task:
    """One image on its way through the edge."""

    image: Images
    num_bytes: int
    policy: Policy
    deadline: float
    """On the monotonic clock, s."""
    answer: "asyncio.Future[Answer]"


@dataclass(frozen=True)
class _Group:
    """A micro-batch under one policy, after the edge's pass."""

    tasks: Sequence[Task]
    policy: Policy
    images: Images
    answers: Answers
    pending: Pending
    edge_ms: float


AskCloud = Callable[[Images], Awaitable[CloudAnswer]]


class EdgeService:
    """Answers images by the model's policy, in micro-batches, each before its deadline."""

    def __init__(
        self, model: TrainedModel, version: int, ask_cloud: AskCloud, settings: Settings | None = None
    ) -> None:
        self.model, self.version = model, version
        self.policy = model.policy
        self.settings = settings or Settings()
        self.breaker = Breaker(self.settings.breaker_failures, self.settings.breaker_open_s)
        self._ask = ask_cloud
        self._costs, self._payload = model.costs, model.energy.payload
        self._runtime = EdgeRuntime(model)
        self._batcher: Batcher[Task] = Batcher(self._run, MAX_MICRO_BATCH)
        self._waiting: set[asyncio.Task[None]] = set()
        self._calls = 0
        self._seconds = self._images = 0.0

    async def answer(self, bodies: Sequence[bytes], policy: Policy, deadline_s: float | None = None) -> list[Answer]:
        """The answers to PNG or JPEG bytes, in order.

        Args:
            bodies: images.
            policy: what to apply.
            deadline_s: what the client gives us; the settings' own at most.

        Raises:
            UserError: bytes that are no image, or not one that the model takes; a deadline of no time.
            OverloadedError: they cannot be answered in time.
        """
        deadline = self._deadline(deadline_s)
        self._admit(len(bodies), deadline)
        images = await asyncio.to_thread(self._decode, bodies)
        return await self._queue(images, [len(body) for body in bodies], policy, deadline)

    async def answer_pixels(self, images: Images, policy: Policy, deadline_s: float | None = None) -> list[Answer]:
        """The answers to (N, H, W, C) images; else as `answer`."""
        shape = tuple(getattr(self.model.preprocessing, name) for name in ("height", "width", "channels"))
        if images.shape[1:] != shape:
            raise UserError(f"pixels of shape {images.shape[1:]}: this model takes (height, width, channels) {shape}")
        deadline = self._deadline(deadline_s)
        return await self._queue(list(images), [image.nbytes for image in images], policy, deadline)

    def _deadline(self, wished_s: float | None) -> float:
        if wished_s is not None and not 0 < wished_s < math.inf:
            raise UserError(f"deadline of {wished_s} s: it must be above 0")
        return time.monotonic() + min(self.settings.deadline_s, wished_s or math.inf)

    async def _queue(
        self, images: Sequence[Images], sizes: Sequence[int], policy: Policy, deadline: float
    ) -> list[Answer]:
        self._admit(len(images), deadline)
        loop = asyncio.get_running_loop()
        tasks = [
            Task(image, size, policy, deadline, loop.create_future()) for image, size in zip(images, sizes, strict=True)
        ]
        self._batcher.put(tasks)
        return await asyncio.gather(*(task.answer for task in tasks))

    def _admit(self, count: int, deadline: float) -> None:
        """Refuse what would wait too long, before anything is spent on it."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise OverloadedError("the request's time was over before it could be queued", 0.1)
        queued = self._batcher.queued
        wait = queued * self._seconds / max(1.0, self._images)  # of those ahead; how long its own take is not known
        if queued and queued + count > self.settings.max_queued:
            raise OverloadedError(f"{queued} images wait and the limit is {self.settings.max_queued}", max(0.1, wait))
        if wait > left_s:
            raise OverloadedError(f"{queued} images wait, which takes {wait:.2f} s", max(0.1, wait - left_s))

    def _decode(self, bodies: Sequence[bytes]) -> list[Images]:
        images = []
        for number, body in enumerate(bodies):
            try:
                images.append(self.model.preprocessing.decode(body))
            except UserError as error:
                where = f"image {number} of the batch: " if len(bodies) > 1 else ""
                raise UserError(f"{where}{error}") from error
        return images

    async def _run(self, tasks: Sequence[Task]) -> None:
        """Give a micro-batch to the blocks: one pass for each policy in it, as a rule one."""
        for policy in {policy_id(task.policy) + str(task.policy.edge_only): task.policy for task in tasks}.values():
            group = [task for task in tasks if task.policy == policy]
            try:
                await self._run_group(group, policy)
            except Exception as error:  # whatever it is, these requests must hear of it
                for task in group:
                    if not task.answer.done():
                        task.answer.set_exception(error)

    async def _run_group(self, tasks: Sequence[Task], policy: Policy) -> None:
        images = np.stack([task.image for task in tasks])
        started = time.perf_counter()
        answers, pending = await asyncio.to_thread(self._runtime.run, images, policy)
        seconds = time.perf_counter() - started
        self._seconds = (1 - _PACE) * self._seconds + seconds
        self._images = (1 - _PACE) * self._images + len(tasks)
        group = _Group(tasks, policy, images, answers, pending, 1000 * seconds)
        self._resolve(group, answers.exit != Exit.CLOUD, cloud_ms=0.0, reason=None)
        if not len(pending.rows):
            return
        if self.breaker.claim_probe():
            self._beside(self._probe(group))
        if not self.breaker.allows():
            await self._answer_alone(group, pending.rows, 0.0, "cloud circuit open")
        elif self._calls >= self.settings.max_cloud_calls:
            await self._answer_alone(group, pending.rows, 0.0, f"cloud busy: {self._calls} calls under way")
        else:  # the next micro-batch need not wait for this one's cloud
            self._beside(self._ask_cloud(group))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run beside what follows."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())  # nobody's request alone
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _probe(self, group: "_Group") -> None:
        """Ask the cloud for a few images whose answers nobody waits for."""
        rows, success = group.pending.rows[:_PROBE_IMAGES], False
        try:
            call = asyncio.ensure_future(self._ask(group.images[rows]))
            await asyncio.wait({call}, timeout=self.settings.cloud_budget_s)
            _checked(_result(call), len(rows), len(self.model.class_names))
            success = True
        except Exception:  # whatever it is, the cloud is not back
            success = False
        finally:
            self.breaker.record_probe(success=success)

    async def _ask_cloud(self, group: "_Group") -> None:
        """One call for all complex samples of a micro-batch; a sample whose time is up does not wait for it."""
        started, rows = time.monotonic(), group.pending.rows
        limits = {int(row): self._limit(group.tasks[row], started) for row in rows}
        if max(limits.values()) <= started:
            await self._answer_alone(group, rows, 0.0, "no time for the cloud")
            return
        self._calls += 1
        call: asyncio.Future[CloudAnswer] | None = None
        try:
            images = await asyncio.to_thread(self._sent, group)
            call = asyncio.ensure_future(self._ask(images))
            left = dict(limits)
            while left and not call.done():
                await asyncio.wait({call}, timeout=max(0.0, min(left.values()) - time.monotonic()))
                late = [row for row, limit in left.items() if limit <= time.monotonic()] if not call.done() else []
                if late:
                    await self._answer_alone(group, np.array(late), time.monotonic() - started, "cloud timed out")
                    left = {row: limit for row, limit in left.items() if row not in late}
            reading = _checked(_result(call), len(rows), len(self.model.class_names))
            self.breaker.record(success=True)
            self._accept(group, np.array(sorted(left), dtype=np.int64), reading, time.monotonic() - started)
        except Exception as error:  # a lost cloud raises many kinds; none may cost the client its answer
            in_haste = time.monotonic() - started < 0.95 * self.settings.cloud_budget_s
            if not (isinstance(error, TimeoutError) and in_haste):  # clients' short deadlines say nothing of the cloud
                self.breaker.record(success=False)
            reason = "cloud timed out" if isinstance(error, TimeoutError) else f"cloud failed: {type(error).__name__}"
            open_rows = np.array([row for row in limits if not group.tasks[row].answer.done()], dtype=np.int64)
            await self._answer_alone(group, open_rows, time.monotonic() - started, reason)
        finally:
            self._calls -= 1
            if call is not None:
                call.cancel()

    def _limit(self, task: Task, now: float) -> float:
        """When a sample stops waiting for the cloud."""
        return min(now + self.settings.cloud_budget_s, task.deadline - self.settings.reserve_s)

    def _accept(self, group: "_Group", rows: Ints, reading: Reading, seconds: float) -> None:
        """The cloud's answers for those of the waiting samples that still wait."""
        place = np.searchsorted(group.pending.rows, rows)
        group.answers.accept(rows, Exit.CLOUD, reading.take(place))
        self._resolve(group, _mask(rows, len(group.tasks)), 1000 * seconds, None)

    async def _answer_alone(self, group: "_Group", rows: Ints, seconds: float, reason: str) -> None:
        """The edge's best answer for these samples, marked."""
        if not len(rows):
            return
        await asyncio.to_thread(self._runtime.finish, group.answers, group.pending, group.policy, rows)
        self._resolve(group, _mask(rows, len(group.tasks)), 1000 * seconds, reason)

    def _sent(self, group: "_Group") -> Images:
        """(N, H, W, C) what arrives of the waiting images, and how many bytes that takes.

        The original bytes go up as they were received, unless the payload is JPEG at a quality, or raw.
        """
        rows = group.pending.rows
        if self._payload == "png":
            return group.images[rows]
        arrived, sizes = transmit(group.images[rows], self._payload)
        for row, size in zip(rows, sizes, strict=True):
            group.tasks[row].num_bytes = int(size)
        return arrived

    def _resolve(self, group: "_Group", which: Bools, cloud_ms: float, reason: str | None) -> None:
        for row in np.flatnonzero(which).tolist():
            if not group.tasks[row].answer.done():
                group.tasks[row].answer.set_result(self._to_answer(group, row, cloud_ms, reason))

    def _to_answer(self, group: "_Group", row: int, cloud_ms: float, reason: str | None) -> Answer:
        answers, task, costs = group.answers, group.tasks[row], self._costs
        sent = bool(cloud_ms)
        entropy = float(answers.entropy[row])
        class_id = int(answers.pred[row])
        return Answer(
            class_id=class_id,
            class_name=self.model.class_names[class_id],
            exit=EXIT_NAMES[answers.exit[row]],
            confidence=float(answers.confidence[row]),
            entropy=entropy if math.isfinite(entropy) else None,
            degraded=reason is not None,
            reason=reason,
            joules=Joules(
                edge_compute=costs.main_joules + bool(answers.extended[row]) * costs.extension_joules,
                upload=float(costs.upload_joules(task.num_bytes)) if sent else 0.0,
                source=costs.tag,
            ),
            ms=Milliseconds(edge=group.edge_ms, cloud=cloud_ms),
            model_version=self.version,
            policy=AppliedPolicy(
                id=policy_id(group.policy),
                gate=group.policy.gate,
                thresholds=list(group.policy.thresholds),
                edge_only=group.policy.edge_only,
            ),
        )


def _result(call: "asyncio.Future[CloudAnswer]") -> CloudAnswer:
    """What a call has brought; not being over is a time-out, and being cancelled by others a failure like any other."""
    if not call.done():
        call.cancel()
        raise TimeoutError
    if call.cancelled():
        raise ConnectionError("the call was cancelled")
    return call.result()


def _mask(rows: Ints, count: int) -> Bools:
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def _checked(answer: CloudAnswer, count: int, num_classes: int) -> Reading:
    """The cloud's answer as a reading; a wrong shape, class or number counts as a failure."""
    pred = np.asarray(answer.class_ids, dtype=np.int64)
    confidence = np.asarray(answer.confidences, dtype=np.float64)
    if pred.shape != (count,) or confidence.shape != (count,):
        raise ValueError(f"the cloud answered {pred.shape} for {count} images")
    if not (np.isfinite(confidence).all() and (pred >= 0).all() and (pred < num_classes).all()):
        raise ValueError("the cloud answered a class or a confidence that does not exist")
    return Reading(pred, confidence, np.zeros(count), np.zeros(count))
