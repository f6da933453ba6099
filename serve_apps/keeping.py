"""What an edge replica keeps an eye on while it answers: the cloud budget, by moving the threshold, and the audit.

Both look at each pass of the blocks, on the event loop, and cost nothing where they are off.
"""

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from meanet.routing import Bools, Floats, Ints, Policy, complexity
from serve_apps.audit import Audit
from serve_apps.budget import BudgetKeeper
from serve_apps.cloud_calls import upload_sizes
from serve_apps.edge import EdgeService
from serve_apps.events import Events
from serve_apps.micro_batch import Pass
from serve_apps.served import Served
from serve_apps.settings import Settings

_LOOKED_AT = 2000
_LOG_EVERY_S = 5.0
_AUDITS_AT_A_TIME = 2


def why_no_budget(policy: Policy) -> str | None:
    """Why the threshold of this policy cannot be moved to hold a budget; None = it can."""
    if policy.edge_only:
        return "the policy in force sends nothing to the cloud (edge_only)"
    if policy.gate in ("two_gate", "per_class", "accepted_entropy"):
        return (
            f"a budget moves the one threshold of a gate that the main exit decides, and the policy in force has gate "
            f"{policy.gate}: put one of main_entropy, max_softmax, margin with PUT /v1/policy"
        )
    return None


class Keeping:
    """Of one service."""

    def __init__(self, service: EdgeService, clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self._clock, self._events = service, clock, Events()
        self._base = service.served
        self._budget = _BudgetState(None, None, clock, self._events)
        self._audit = Audit(service.settings.audit, _expected(service.served))
        self._audits: set[asyncio.Task[None]] = set()
        self._drifted: bool | None = False
        service.watchers.append(self._watch)

    def apply(self, served: Served, settings: Settings) -> None:
        """Serve this from now on, under these settings; what was learnt is kept where it still holds."""
        before = self._base
        self._service.configure(settings)
        budget = settings.held
        why = None if budget is None else why_no_budget(served.policy)
        same = (before.version, before.policy) == (served.version, served.policy)
        if budget is None or why is not None:
            self._budget = _BudgetState(None, why, self._clock, self._events)
            if why is not None:
                self._events.write(logging.WARNING, "budget not held", why=why)
        elif not same or self._budget.keeper is None or self._budget.keeper.budget != budget:
            owed = self._budget.keeper.excess if self._budget.keeper else 0.0
            keeper = BudgetKeeper(budget, _finite(served.policy.threshold), owed)
            self._budget = _BudgetState(keeper, None, self._clock, self._events)
        if self._audit.config != settings.audit or before.version != served.version:
            self._audit = Audit(settings.audit, _expected(served))
        self._base = served
        self._serve()

    @property
    def budget_moves(self) -> bool:
        """Whether a budget moves the threshold."""
        return self._budget.keeper is not None

    def gauges(self) -> dict[str, float]:
        """Figures by name, for metrics."""
        audit = self._audit
        figures = {"audits": float(audit.count), "audit_disagreements": float(audit.disagreed)}
        return figures | {"audit_drifted": float(bool(audit.drifted)), "budget_active": float(self.budget_moves)}

    def report(self) -> dict[str, Any]:
        """What control is to know."""
        audit = self._audit
        return {
            "budget": self._budget.report(),
            "audit": {
                "count": audit.count,
                "disagreed": audit.disagreed,
                "expected": audit.expected,
                "drifted": audit.drifted,
            },
        }

    def _serve(self) -> None:
        keeper, served = self._budget.keeper, self._base
        if keeper is not None:
            moved = None if np.isinf(keeper.threshold) else keeper.threshold
            served = served.with_policy(replace(served.policy, thresholds=(moved,)))
        self._service.serve(served)

    def _watch(self, batch: Pass) -> None:
        if batch.policy.edge_only or batch.served.version != self._base.version:
            return
        if self._budget.keeper is not None and batch.policy.measures == self._base.policy.measures:
            before = self._budget.keeper.threshold
            self._budget.record(batch)
            if self._budget.keeper.threshold != before:
                self._serve()
        if self._audit.config.share and self._service.breaker.allows():
            self._draw(batch)

    def _draw(self, batch: Pass) -> None:
        """Ask the cloud, beside the answers, about some of those that the edge gave."""
        stay = np.ones(len(batch.tasks), dtype=bool)
        stay[batch.pending.rows] = False
        rows = np.flatnonzero(stay)
        rows = rows[self._audit.draw(len(rows))]
        if len(rows) and len(self._audits) < _AUDITS_AT_A_TIME:
            work = self._compare(batch, rows, batch.answers.pred[rows].copy())
            task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            self._audits.add(task)
            task.add_done_callback(self._audits.discard)

    async def _compare(self, batch: Pass, rows: Ints, given: Ints) -> None:
        audit = self._audit
        reading = await self._service.second_opinion(batch, rows)
        if reading is None or audit is not self._audit:
            return
        for one in (reading.pred != given).tolist():
            audit.record(disagreed=one)
        if audit.drifted != self._drifted:
            self._drifted = audit.drifted
            counts = {"disagreed": audit.disagreed, "count": audit.count, "expected": audit.expected}
            if audit.drifted:
                self._events.write(logging.WARNING, "drift", **counts)
            else:
                self._events.write(logging.INFO, "no drift any more", **counts)


class _BudgetState:
    """A keeper, and what is told of it."""

    def __init__(
        self, keeper: BudgetKeeper | None, why: str | None, clock: Callable[[], float], events: Events
    ) -> None:
        self.keeper, self._why, self._clock, self._events = keeper, why, clock, events
        self._went: deque[bool] = deque(maxlen=_LOOKED_AT)
        self._moves = 0
        self._logged_at, self._logged = -_LOG_EVERY_S, keeper.threshold if keeper else 0.0

    def record(self, batch: Pass) -> None:
        """Show the keeper a pass."""
        keeper = self.keeper
        assert keeper is not None, "there is a keeper where there are passes to show"
        count, costs = len(batch.tasks), batch.served.costs
        wanted: Bools = np.zeros(count, dtype=bool)
        wanted[batch.pending.rows] = True
        upload: Floats = np.asarray(costs.upload_joules(upload_sizes(batch)), dtype=np.float64)
        edge = np.where(batch.answers.extended, costs.main_joules + costs.extension_joules, costs.main_joules)
        before = keeper.threshold
        keeper.record(complexity(batch.pending.main, batch.policy.measures[0]), wanted, np.asarray(edge, float), upload)
        self._went.extend(wanted.tolist())
        if keeper.threshold != before:
            self._moves += 1
            self._log(keeper)

    def _log(self, keeper: BudgetKeeper) -> None:
        now = self._clock()
        if now - self._logged_at < _LOG_EVERY_S:
            return
        self._events.write(
            logging.INFO,
            "budget",
            threshold_before=_or_none(self._logged),
            threshold=_or_none(keeper.threshold),
            moves=self._moves,
            cloud_share=round(float(np.mean(self._went)), 4),
            requests=len(self._went),
            at_a_bound=keeper.bounded,
        )
        self._logged_at, self._logged = now, keeper.threshold

    def report(self) -> dict[str, Any] | None:
        """Plain; None where no budget is set."""
        if self.keeper is None:
            return None if self._why is None else {"held": False, "why": self._why}
        threshold = self.keeper.threshold
        return {
            "held": not self.keeper.bounded,
            "threshold": _or_none(threshold),
            "at_a_bound": self.keeper.bounded,
            "cloud_share": float(np.mean(self._went)) if self._went else None,
            "requests": len(self._went),
            "moves": self._moves,
        }


def _or_none(threshold: float) -> float | None:
    """JSON has no infinity."""
    return None if np.isinf(threshold) else float(threshold)


def _finite(threshold: float | None) -> float:
    return float("inf") if threshold is None else threshold


def _expected(served: Served) -> float | None:
    """How often the cloud disagreed on validation with what stays on the edge; points of older versions do not say."""
    found = (served.model.operating_point or {}).get("expected", {}).get("disagreement")
    return None if found is None else float(found)
