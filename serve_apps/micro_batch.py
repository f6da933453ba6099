"""What goes through the edge's blocks together, and the answers that come of it."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from meanet.errors import UserError
from meanet.routing import Bools, Ints, Policy, policy_id
from meanet.runtime import Answers, Images, Pending
from serve_apps.http import EXIT_NAMES, Answer, AppliedPolicy, Joules, Milliseconds, ServedBy
from serve_apps.observer import Observer
from serve_apps.served import Served
from serve_apps.traces import TRACEPARENT


@dataclass(frozen=True)
class Upload:
    """The way of a call to the cloud and back, s."""

    seconds: float = 0.0
    """Measured."""
    modelled: float = 0.0
    """By the model's link."""


@dataclass
class Task:
    """One image on its way through the edge."""

    image: Images | None
    """(H, W, C); None where a file was received."""
    body: bytes | None
    """As received; None where pixels were."""
    place: int | None
    """Its number in a request of many."""
    served: Served
    policy: Policy
    admitted: float
    """On the monotonic clock, s."""
    deadline: float
    """On the same clock."""
    answer: "asyncio.Future[Answer]"
    bytes_sent: int = 0
    """What went to the cloud for it."""
    upload: Upload = Upload()
    """Of the call that brought its answer."""
    cloud_node: str | None = None
    """Where it was answered."""
    traceparent: str | None = field(default_factory=TRACEPARENT.get)
    """Of its request, where that is traced."""


@dataclass(frozen=True)
class Pass:
    """A micro-batch under one policy, after the blocks' pass over it."""

    tasks: Sequence[Task]
    served: Served
    policy: Policy
    images: Images
    """(N, H, W, C)."""
    answers: Answers
    pending: Pending
    edge_ms: float
    alone: str | None
    """Why the waiting samples have the edge's best answers already; None = they have not."""
    applied: AppliedPolicy
    """What all answers say of the policy."""
    observer: Observer

    def resolve(self, which: Bools, cloud_ms: float, reason: str | None) -> None:
        """Let these of the N samples go out as they stand, unless they have gone already.

        Args:
            which: (N,) mask.
            cloud_ms: how long the cloud was waited for; 0 = not asked.
            reason: why the cloud's answer is missing; None = it is not.
        """
        now = time.monotonic()
        for row in np.flatnonzero(which).tolist():
            task = self.tasks[row]
            if not task.answer.done():
                answer = self._answer(row, cloud_ms, reason)
                task.answer.set_result(answer)
                self.observer.answered(answer, task.bytes_sent, now - task.admitted)

    def finish_alone(self, rows: Ints) -> None:
        """Give these waiting samples the edge's best answer; computes."""
        self.served.runtime.finish(self.answers, self.pending, self.policy, rows)

    def _answer(self, row: int, cloud_ms: float, reason: str | None) -> Answer:
        answers, task, costs = self.answers, self.tasks[row], self.served.costs
        entropy, class_id = float(answers.entropy[row]), int(answers.pred[row])
        return Answer(
            class_id=class_id,
            class_name=self.served.model.class_names[class_id],
            exit=EXIT_NAMES[answers.exit[row]],
            confidence=float(answers.confidence[row]),
            entropy=entropy if math.isfinite(entropy) else None,
            degraded=reason is not None,
            reason=reason,
            joules=Joules(
                edge_compute=costs.main_joules + bool(answers.extended[row]) * costs.extension_joules,
                upload=float(costs.upload_joules(task.bytes_sent)) if task.bytes_sent else 0.0,
                source=costs.tag,
            ),
            ms=Milliseconds(
                edge=self.edge_ms,
                cloud=cloud_ms,
                upload=1000 * task.upload.seconds,
                upload_modelled=1000 * task.upload.modelled,
            ),
            model_version=self.served.version,
            policy=self.applied,
            served_by=ServedBy(edge=self.served.node, cloud=task.cloud_node),
        )


def applied(policy: Policy) -> AppliedPolicy:
    """A policy as answers tell of it."""
    return AppliedPolicy(
        id=policy_id(policy), gate=policy.gate, thresholds=list(policy.thresholds), edge_only=policy.edge_only
    )


def gathered(tasks: Sequence[Task]) -> list[list[Task]]:
    """By version and policy, in order; as a rule one group."""
    groups: list[list[Task]] = []
    for task in tasks:
        for group in groups:
            first = group[0]
            if task.served is first.served and (task.policy is first.policy or task.policy == first.policy):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def pixels_of(task: Task) -> Images:
    """(H, W, C), decoded if a file was received.

    Raises:
        UserError: it is no image, or not one that the model takes.
    """
    if task.image is not None:
        return task.image
    assert task.body is not None, "a task has one or the other"
    try:
        return task.served.model.preprocessing.decode(task.body)
    except UserError as error:
        where = "" if task.place is None else f"image {task.place} of the batch: "
        raise UserError(f"{where}{error}") from error


def mask(rows: Ints, count: int) -> Bools:
    """(count,) true at these rows."""
    marked = np.zeros(count, dtype=bool)
    marked[rows] = True
    return marked
