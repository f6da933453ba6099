"""Replicas on Ray Serve that follow `control`: what they load, apply and report."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_apps import priority
from serve_apps.cloud_calls import AskCloud, CloudAnswer, CloudRequest
from serve_apps.director import Orders
from serve_apps.edge import EdgeService
from serve_apps.follower import Follower
from serve_apps.keeping import Keeping
from serve_apps.loading import CloudVersion, Loader, blank
from serve_apps.observer import Observer
from serve_apps.rollout import Beat
from serve_apps.served import Served
from serve_apps.writes import Writes

Control = DeploymentHandle[Any]
_MEETING_S = 5.0
"""What a starting edge waits for the cloud's first answer, which takes several times as long as those that follow."""
_MEET_LATER_S = 60.0
"""How long the call stays open for a cloud that starts later; one that hangs is not to hold it for good."""


@dataclass(frozen=True)
class Links:
    """What every replica is given at its start."""

    tracking_uri: str
    version: int
    """To serve if control does not answer."""
    engine: str
    """What runs the networks (`meanet.engines`)."""
    control: Control

    def ask(self) -> Callable[[Beat], Awaitable[Orders]]:
        """The follower's call."""

        async def ask(beat: Beat) -> Orders:
            orders: Orders = await self.control.beat.remote(beat)
            return orders

        return ask


def _here() -> tuple[str, str]:
    """Names of this replica and of its node."""
    replica = serve.get_replica_context().replica_id.unique_id
    return replica, str(ray.get_runtime_context().get_node_id())


class LiveEdge:
    """The edge's service, under control's orders."""

    def __init__(self, links: Links, ask_cloud: AskCloud, writes: Writes, observer: Observer | None = None) -> None:
        replica, node = _here()
        self.control, self.writes = links.control, writes
        self._links, self._ask_cloud, self._observer = links, ask_cloud, observer
        self._service: EdgeService | None = None
        self._keeping: Keeping | None = None
        loader = Loader(links.tracking_uri, links.engine, node)
        self._follower: Follower[Served] = Follower(
            "edge", replica, node, links.ask(), loader.edge, self._apply, self._report
        )

    async def start(self) -> None:
        """Returns once there is something to serve.

        Raises:
            UserError: there is not, for the version cannot be loaded.
        """
        await self._follower.start(self._links.version)
        if self._service is None:
            self._serve_first(self._follower.held[self._links.version])
        priority.as_others()
        self._meeting = asyncio.get_running_loop().create_task(self._meet_cloud())
        await asyncio.wait({self._meeting}, timeout=_MEETING_S)  # a cloud that comes later finds the way open

    async def _meet_cloud(self) -> None:
        """Open the way to the cloud, so that no client waits for that; without a cloud the edge serves alone."""
        served = self.service.served
        with contextlib.suppress(Exception):  # TimeoutError, too
            async with asyncio.timeout(_MEET_LATER_S):
                await self._ask_cloud(CloudRequest(served.version, None, blank(served.model.preprocessing)))

    @property
    def service(self) -> EdgeService:
        """What answers."""
        assert self._service is not None, "a replica takes requests once it has started"
        return self._service

    def _serve_first(self, served: Served) -> Keeping:
        self._service = EdgeService(served, self._ask_cloud, observer=self._observer)
        self._keeping = Keeping(self._service)
        return self._keeping

    def _apply(self, orders: Orders, served: Served) -> None:
        if orders.policy is not None:
            served = served.with_policy(orders.policy.applied_to(served.model))
        (self._keeping or self._serve_first(served)).apply(served, orders.settings)

    @property
    def budget_moves(self) -> bool:
        """Whether a budget moves the threshold."""
        return self._keeping is not None and self._keeping.budget_moves

    def gauges(self) -> dict[str, float]:
        """Figures of budget and audit by name, for metrics."""
        return {} if self._keeping is None else self._keeping.gauges()

    def _report(self) -> dict[str, Any]:
        if self._service is None or self._keeping is None:
            return {}
        return {"breaker": self._service.breaker.state, **self._keeping.report()}


class LiveCloud:
    """The versions that the cloud answers for."""

    def __init__(self, links: Links) -> None:
        replica, self._node = _here()
        self._links = links
        loader = Loader(links.tracking_uri, links.engine, self._node)
        self._follower: Follower[CloudVersion] = Follower(
            "cloud", replica, self._node, links.ask(), loader.cloud, lambda orders, loaded: None, dict
        )

    async def start(self) -> None:
        """Returns once there is a version."""
        await self._follower.start(self._links.version)
        priority.as_others()

    async def classify(self, request: CloudRequest) -> CloudAnswer:
        """Answers by the network of the request's version, loaded now if this replica is late."""
        began = time.monotonic()
        loaded = await self._follower.ensure(request.version)
        class_ids, confidences = await asyncio.to_thread(loaded.classify, request)
        return CloudAnswer(class_ids, confidences, self._node, time.monotonic() - began)
