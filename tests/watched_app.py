"""The edge's service over HTTP in this process, without Ray: for tests of what is seen of it."""

import asyncio
import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import uvicorn
from conftest import PATIENT
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from meanet.artifact import TrainedModel
from meanet.errors import UserError
from meanet.runtime import CloudRuntime
from serve_apps import events
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.edge import EdgeService
from serve_apps.http import Answer, Wishes
from serve_apps.served import Served
from serve_apps.sight import Link, Sight
from serve_apps.tally import Tally
from serve_apps.traces import TRACEPARENT, Tracing
from serve_apps.watched import Watched, answered

TOKEN = "let-me-in"


@dataclass
class Cloud:
    """A cloud in this process, which may be gone."""

    model: TrainedModel
    well: bool = True
    traceparents: list[str | None] = field(default_factory=list)
    """What came up with each call."""

    async def ask(self, request: CloudRequest) -> CloudAnswer:
        self.traceparents.append(TRACEPARENT.get())
        if not self.well:
            raise ConnectionError("no cloud")
        reading = CloudRuntime(self.model).run(request.pixels(self.model.preprocessing))
        return CloudAnswer(reading.pred.tolist(), reading.confidence.tolist())


class WatchedApp:
    """The routes of `serve_apps.graph.Edge` that sight is about."""

    def __init__(
        self, model: TrainedModel, *, link: Link | None = None, tracing: Tracing | None = None, access: bool = False
    ) -> None:
        self.log = io.StringIO()
        events.set_up("replica-1", self.log, access=access)
        self.cloud, self.tally = Cloud(model), Tally()
        settings = dataclasses.replace(PATIENT, breaker_open_s=60)
        self.service = EdgeService(Served.of(model, 3), self.cloud.ask, settings, observer=self.tally)
        self._link, self.moving = link, False
        self.sight: Sight
        routes = [
            Route("/", self._page),
            Route("/metrics", self._metrics),
            Route("/v1/status", self._status),
            Route("/v1/front", self._front),
            Route("/v1/policy", self._policy, methods=["GET", "PUT"]),
            Route("/v1/classify", self._classify, methods=["POST"]),
            Route("/v1/explain", self._explain, methods=["POST"]),
            Route("/broken", self._broken),
        ]
        self.app: ASGIApp = Watched(Starlette(routes=routes, lifespan=self._lifespan), events.Events(), lambda: tracing)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.sight = Sight(
            "replica-1", self.service, self.tally, events.Events(), link=self._link, moving=lambda: self.moving
        )
        running = asyncio.create_task(self.sight.run())
        yield
        running.cancel()

    async def _page(self, _request: Request) -> Response:
        return self.sight.page()

    async def _metrics(self, request: Request) -> Response:
        return await self.sight.metrics(request.headers.get("accept", ""))

    async def _status(self, _request: Request) -> Response:
        return await self.sight.status()

    async def _front(self, _request: Request) -> Response:
        return self.sight.front()

    async def _policy(self, request: Request) -> Response:
        served = self.service.served
        if request.method == "PUT":
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                return JSONResponse({"detail": "a token is wanted"}, 401)
            (threshold,) = (await request.json())["thresholds"]
            self.service.serve(served.with_policy(served.policy.with_request(threshold=threshold)))
        return JSONResponse(self.service.served.policy.to_dict())

    async def _answer(self, request: Request) -> tuple[bytes, Wishes, Answer]:
        wishes, body = Wishes.model_validate(dict(request.query_params)), await request.body()
        served = self.service.served
        policy = served.policy.with_request(edge_only=wishes.edge_only, threshold=wishes.threshold)
        answers = await self.service.answer([body], policy, None, served)
        answered(answers)
        return body, wishes, answers[0]

    async def _classify(self, request: Request) -> Response:
        try:
            *_, answer = await self._answer(request)
        except UserError as error:
            return JSONResponse({"detail": str(error)}, 422)
        return JSONResponse(answer.model_dump())

    async def _explain(self, request: Request) -> Response:
        try:
            return await self.sight.explain(*await self._answer(request))
        except UserError as error:
            return JSONResponse({"detail": str(error)}, 422)

    async def _broken(self, _request: Request) -> Response:
        raise RuntimeError("a bug")


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The application on a free port, in a thread; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
