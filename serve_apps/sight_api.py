"""Sight on Ray Serve: the way to the board, and the routes that show what it knows."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from meanet.errors import UserError
from serve_apps import events, traces
from serve_apps.board import Report, View
from serve_apps.edge import EdgeService
from serve_apps.http import MAX_IMAGE_BYTES, ONE_IMAGE, Wishes, read_body
from serve_apps.sight import Sight
from serve_apps.tally import Tally

router = APIRouter()
_SERVICE = "meanet-edge"
"""In traces, unless OTEL_SERVICE_NAME says otherwise."""


class _Link:
    """The board that `control` keeps, as a replica reaches it."""

    def __init__(self, control: DeploymentHandle[Any]) -> None:
        self._control = control

    async def report(self, report: Report) -> None:
        await self._control.report.remote(report)

    async def view(self, report: Report) -> View:
        view: View = await self._control.board.remote(report)
        return view


def tracing() -> traces.Tracing | None:
    """Of this process."""
    return traces.of_process(_SERVICE)


def started(
    service: EdgeService,
    tally: Tally,
    control: DeploymentHandle[Any],
    *,
    access_log: bool = False,
    gauges: Callable[[], dict[str, float]] = dict,
    moving: Callable[[], bool] = lambda: False,
) -> Sight:
    """The sight of this replica, reporting from now on; to be called on its event loop.

    Args:
        service: that the replica answers with.
        tally: the service's observer.
        control: the handle of what keeps the board.
        access_log: a line for each request.
        gauges: see `Sight`.
        moving: see `Sight`.
    """
    replica = serve.get_replica_context().replica_id.unique_id
    events.set_up(replica, access=access_log)
    sight = Sight(replica, service, tally, events.Events(), link=_Link(control), gauges=gauges, moving=moving)
    sight.reporting = asyncio.get_running_loop().create_task(sight.run())
    return sight


async def _here() -> Sight:
    replica: Any = serve.get_replica_context().servable_object
    sight: Sight = replica.sight
    return sight


Here = Annotated[Sight, Depends(_here)]


@router.get("/", include_in_schema=False)
async def page(sight: Here) -> Response:
    """The operator's page."""
    return sight.page()


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request, sight: Here) -> Response:
    """Prometheus metrics of all edge replicas."""
    return await sight.metrics(request.headers.get("accept", ""))


@router.get("/v1/status")
async def status(sight: Here) -> Response:
    """What all edge replicas did in the last minute, and how they stand."""
    return await sight.status()


@router.get("/v1/front")
async def front(sight: Here) -> Response:
    """The points about the operating point, and the policy in force."""
    return sight.front()


@router.post("/v1/explain", openapi_extra=ONE_IMAGE)
async def explain(request: Request, wishes: Annotated[Wishes, Query()], sight: Here) -> Response:
    """Classify one image as /v1/classify does, and say why it was answered so."""
    body = await read_body(request, MAX_IMAGE_BYTES)
    replica: Any = serve.get_replica_context().servable_object
    (answer,) = await replica.answers([body], wishes)
    try:
        return await sight.explain(body, wishes, answer)
    except UserError as error:  # the policy has changed meanwhile to one that takes no such wish
        raise HTTPException(409, str(error)) from error
