"""What goes through the edge's blocks together, and the answers that come of it."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from meanet.operating_point import policy_id
from meanet.routing import Bools, Ints, Policy
from meanet.runtime import Answers, Images, Pending
from serve_apps.http import EXIT_NAMES, Answer, AppliedPolicy, Joules, Milliseconds
from serve_apps.observer import Observer
from serve_apps.served import Served
from serve_apps.traces import TRACEPARENT


@dataclass
class Task:
    """One image on its way through the edge."""

    image: Images
    """(H, W, C)."""
    body: bytes | None
    """As received; None where pixels were."""
    served: Served
    policy: Policy
    admitted: float
    """On the monotonic clock, s."""
    deadline: float
    """On the same clock."""
    answer: "asyncio.Future[Answer]"
    bytes_sent: int = 0
    """What went to the cloud for it."""
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
            ms=Milliseconds(edge=self.edge_ms, cloud=cloud_ms),
            model_version=self.served.version,
            policy=AppliedPolicy(
                id=policy_id(self.policy),
                gate=self.policy.gate,
                thresholds=list(self.policy.thresholds),
                edge_only=self.policy.edge_only,
            ),
        )


def mask(rows: Ints, count: int) -> Bools:
    """(count,) true at these rows."""
    marked = np.zeros(count, dtype=bool)
    marked[rows] = True
    return marked
