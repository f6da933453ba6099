"""The edge's service, apart from HTTP and Ray: decoding, micro-batches, the cloud call and what happens without it."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meanet.artifact import TrainedModel
from meanet.errors import UserError
from meanet.operating_point import policy_id
from meanet.preprocessing import transmit
from meanet.routing import Bools, Exit, Policy, Reading
from meanet.runtime import Answers, EdgeRuntime, Images, Pending
from serve_apps.batching import Batcher
from serve_apps.http import EXIT_NAMES, Answer, AppliedPolicy, Joules, Milliseconds

CLOUD_TIMEOUT_S = 5.0
MAX_MICRO_BATCH = 64


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
    """Answers images by the model's policy, in micro-batches."""

    def __init__(
        self, model: TrainedModel, version: int, ask_cloud: AskCloud, cloud_timeout_s: float = CLOUD_TIMEOUT_S
    ) -> None:
        self.model, self.version = model, version
        self.policy = model.policy
        self._ask, self._timeout_s = ask_cloud, cloud_timeout_s
        self._costs, self._payload = model.costs, model.energy.payload
        self._runtime = EdgeRuntime(model)
        self._batcher: Batcher[Task] = Batcher(self._run, MAX_MICRO_BATCH)
        self._waiting: set[asyncio.Task[None]] = set()

    async def answer(self, bodies: Sequence[bytes], policy: Policy) -> list[Answer]:
        """The answers to PNG or JPEG bytes, in order.

        Raises:
            UserError: bytes that are no image, or not one that the model takes.
        """
        images = await asyncio.to_thread(self._decode, bodies)
        loop = asyncio.get_running_loop()
        tasks = [
            Task(image, len(body), policy, loop.create_future()) for image, body in zip(images, bodies, strict=True)
        ]
        self._batcher.put(tasks)
        return await asyncio.gather(*(task.answer for task in tasks))

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
        group = _Group(tasks, policy, images, answers, pending, 1000 * (time.perf_counter() - started))
        self._resolve(group, answers.exit != Exit.CLOUD, cloud_ms=0.0, reason=None)
        if len(pending.rows):  # the next micro-batch need not wait for this one's cloud
            waiting = asyncio.get_running_loop().create_task(self._ask_cloud(group))
            self._waiting.add(waiting)
            waiting.add_done_callback(self._waiting.discard)

    async def _ask_cloud(self, group: "_Group") -> None:
        rows = group.pending.rows
        started, reason = time.perf_counter(), None
        try:
            call = self._ask(await asyncio.to_thread(self._sent, group))
            reading = _checked(await asyncio.wait_for(call, self._timeout_s), len(rows), len(self.model.class_names))
            group.answers.accept(rows, Exit.CLOUD, reading)
        except Exception as error:  # a lost cloud raises many kinds; none may cost the client its answer
            reason = "cloud timed out" if isinstance(error, TimeoutError) else f"cloud failed: {type(error).__name__}"
            await asyncio.to_thread(self._runtime.finish, group.answers, group.pending, group.policy)
        waited = np.zeros(len(group.tasks), dtype=bool)
        waited[rows] = True
        self._resolve(group, waited, cloud_ms=1000 * (time.perf_counter() - started), reason=reason)

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


def _checked(answer: CloudAnswer, count: int, num_classes: int) -> Reading:
    """The cloud's answer as a reading; a wrong shape, class or number counts as a failure."""
    pred = np.asarray(answer.class_ids, dtype=np.int64)
    confidence = np.asarray(answer.confidences, dtype=np.float64)
    if pred.shape != (count,) or confidence.shape != (count,):
        raise ValueError(f"the cloud answered {pred.shape} for {count} images")
    if not (np.isfinite(confidence).all() and (pred >= 0).all() and (pred < num_classes).all()):
        raise ValueError("the cloud answered a class or a confidence that does not exist")
    return Reading(pred, confidence, np.zeros(count), np.zeros(count))
