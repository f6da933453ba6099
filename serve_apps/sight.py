"""What a replica lets be seen: metrics, status, front, the operator's page; of all replicas where there is a board."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.responses import JSONResponse, PlainTextResponse, Response

from meanet.routing import Policy, policy_id
from serve_apps.board import Board, ReplicaState, Report, View
from serve_apps.edge import EdgeService
from serve_apps.events import Events
from serve_apps.explain import explain
from serve_apps.exposition import exposition
from serve_apps.http import Answer, Wishes
from serve_apps.page import page
from serve_apps.status import status
from serve_apps.tally import Tally

REPORT_S = 1.0
"""How often a replica reports."""
_PATIENCE_S = 0.5
"""How long the board is waited for."""
MOVING = "moved by budget"
"""In place of a policy's id."""


class Link(Protocol):
    """The board that all replicas share, wherever it runs."""

    async def report(self, report: Report) -> None:
        """Take this replica's counts."""

    async def view(self, report: Report) -> View:
        """Take them, and give what all have."""


class Sight:
    """Of one replica."""

    def __init__(
        self,
        replica: str,
        service: EdgeService,
        tally: Tally,
        events: Events,
        *,
        link: Link | None = None,
        gauges: Callable[[], dict[str, float]] = dict,
        moving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Watch a service.

        Args:
            replica: its id, another one after a restart.
            service: what is watched.
            tally: the service's observer.
            events: where lines go.
            link: the board of all replicas; None = there is only this one.
            gauges: further figures by name, asked for at each report.
            moving: whether a budget moves the threshold: each of its values has an id of its own, too many to name.
        """
        self._replica, self._service, self._tally, self._events = replica, service, tally, events
        self._link, self._gauges, self._moving = link, gauges, moving
        self.reporting: asyncio.Task[None] | None = None
        """Kept here by whoever starts `run`, so that it is not collected."""
        self._own = Board()
        self._explaining = asyncio.Semaphore(1)  # it computes beside the service: one at a time
        self._in_force = self._policy()
        self._breaker = service.breaker.state

    def report(self) -> Report:
        """How this replica stands."""
        version, policy = self._policy()
        name = MOVING if self._moving() else policy_id(policy)
        described = {"id": name, "gate": policy.gate, "thresholds": list(policy.thresholds)}
        state = ReplicaState(self._service.breaker.state, version, described, self._gauges())
        return Report(self._replica, self._tally.so_far(), state)

    async def run(self) -> None:
        """Report again and again, and say what has changed, until cancelled."""
        while True:
            self._say_changes()
            report = self.report()
            self._own.report(report)
            if self._link is not None:
                await self._ask(self._link.report(report))
            await asyncio.sleep(REPORT_S)

    async def metrics(self, accept: str = "") -> Response:
        """`GET /metrics`: 503 while the board cannot be had, for one replica's counts would look like a reset."""
        view, complete = await self._view()
        if not complete:
            return PlainTextResponse("the board of all replicas does not answer: try again\n", 503)
        body, content_type = exposition(view, accept)
        return Response(body, headers={"Content-Type": content_type})

    async def status(self) -> Response:
        """`GET /v1/status`: of all replicas, or of this one alone while the board cannot be had."""
        view, complete = await self._view()
        return _fresh(status(view, "all replicas" if complete else "this replica"))

    def front(self) -> Response:
        """`GET /v1/front`: what the operating point was chosen from, if the model holds it, and what is in force.

        `along` is empty where that is of another gate or split.
        """
        version, policy = self._policy()
        point = self._service.served.model.operating_point or {}
        tradeoff, kind = point.get("tradeoff", {}), (policy.gate, len(policy.hard_classes))
        along = [row for row in tradeoff.get("along", []) if (row["gate"], row["num_hard_classes"]) == kind]
        return _fresh(
            {
                "version": version,
                "policy": {"id": policy_id(policy), **policy.to_dict()},
                "moving": self._moving(),
                "operating_point": {name: point.get(name) for name in ("id", "thresholds", "split", "expected")},
                "along": along,
                "front": tradeoff.get("front", []),
            }
        )

    async def explain(self, body: bytes, wishes: Wishes, answer: Answer) -> Response:
        """`POST /v1/explain`: an answer, and why it is so."""
        served = self._service.served
        policy = served.policy.with_request(edge_only=wishes.edge_only, threshold=wishes.threshold)
        async with self._explaining:
            image = await asyncio.to_thread(served.model.preprocessing.decode, body)
            why = await asyncio.to_thread(explain, served, image, policy)
        return _fresh({"answer": answer.model_dump(), "why": why.to_dict()})

    def page(self) -> Response:
        """`GET /`: the operator's page."""
        return page()

    def _policy(self) -> tuple[int, Policy]:
        return self._service.served.version, self._service.served.policy

    def _say_changes(self) -> None:
        now, before = self._policy(), self._in_force
        self._in_force = now
        if now != before and not (self._moving() and now[0] == before[0]):
            said = {
                name: {"version": version, "policy": policy_id(policy), "thresholds": list(policy.thresholds)[:2]}
                for name, (version, policy) in (("before", before), ("now", now))
            }
            self._events.write(logging.INFO, "policy changed", **said)
        state = self._service.breaker.state
        if state != self._breaker:
            self._events.limited(logging.WARNING, "breaker", before=self._breaker, now=state)
            self._breaker = state

    async def _view(self) -> tuple[View, bool]:
        """What all replicas have, and whether it is of all."""
        report = self.report()
        self._own.report(report)
        if self._link is None:
            return self._own.view(), True
        found = await self._ask(self._link.view(report))
        return (self._own.view(), False) if found is None else (found, True)

    async def _ask(self, call: Awaitable[Any]) -> Any:
        """What the board answers; None if it does not."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await call
        except Exception as error:  # whatever it is, requests are answered without it
            self._events.limited(logging.WARNING, "board lost", error=f"{type(error).__name__}: {error}"[:300])
            return None


def _fresh(plain: Any) -> Response:
    return JSONResponse(plain, headers={"Cache-Control": "no-store"})
