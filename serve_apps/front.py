"""What a request meets in a replica before Serve's own handling of it: the gate, and the fast path.

Serve's handling costs about 0.2 ms of a core; what the fast path takes is answered without it, and counted where Serve
counts what is in hand, for scaling and for a replica's end. Serve installs these in a process whose environment says so
(`serve_apps.placement` sets it for edge replicas). Where there is none, as behind Serve's own proxy, the application's
own gate and fast path stand.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import uvicorn
from ray import serve
from ray.serve._private.common import RequestMetadata, RequestProtocol
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps import events, gate, sight_api
from serve_apps.edge import EdgeService
from serve_apps.fast_path import FastPath
from serve_apps.watched import Watched


def service_here() -> EdgeService:
    """Of the replica that this process is."""
    replica: Any = serve.get_replica_context().servable_object
    service: EdgeService = replica._service
    return service


def middlewares() -> list[Middleware]:
    """The last one is outermost."""
    return [Middleware(Direct), Middleware(Front)]


class Direct:
    """Answers what the fast path takes; hands on what it does not, and all where Serve's counts cannot be reached."""

    def __init__(self, app: ASGIApp) -> None:
        self.replica = _replica_of(app)
        counts = _counts_of(self.replica)
        self._app = (
            app if counts is None else FastPath(app, service_here, lambda path: _watched(_Counted(path, counts)))
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        await self._app(scope, receive, send)


class Front(gate.Gate):
    """The gate of a replica, which takes in connections as they come."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, service_here, protocol=lambda: _protocol_of(getattr(app, "replica", None)))


def _replica_of(app: Any) -> Any:
    """The replica behind Serve's innermost middleware; None = not as in Ray 2.60."""
    return getattr(getattr(app, "_app", None), "__self__", None)


def _protocol_of(replica: Any) -> Callable[[], asyncio.BaseProtocol] | None:
    """What makes a protocol for a connection, as uvicorn's server does it (`Server.startup`)."""
    server = getattr(replica, "_direct_ingress_http_server", None)
    if not isinstance(server, uvicorn.Server) or not server.started or server.should_exit or server.config.is_ssl:
        return None
    made: Any = server.config.http_protocol_class
    return functools.partial(
        made, config=server.config, server_state=server.server_state, app_state=server.lifespan.state, _loop=None
    )


def _watched(app: ASGIApp) -> Watched:
    """With the ids and lines that the application's own has, and the id that Serve hands back."""
    return Watched(app, events.Events(), sight_api.tracing)


def _counts_of(replica: Any) -> Any:
    """Where it counts the requests in hand; None = not as in Ray 2.60, or the service has an event loop of its own."""
    apart = getattr(getattr(replica, "_user_callable_wrapper", None), "_run_user_code_in_separate_thread", True)
    counts = None if apart else getattr(replica, "_metrics_manager", None)
    return (
        counts if hasattr(counts, "inc_num_ongoing_requests") and hasattr(counts, "dec_num_ongoing_requests") else None
    )


class _Counted:
    """Among the requests that Serve knows to be in hand."""

    def __init__(self, app: ASGIApp, counts: Any) -> None:
        self._app, self._counts = app, counts
        self._what = RequestMetadata(
            "", "", is_streaming=True, _request_protocol=RequestProtocol.HTTP, is_direct_ingress=True
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        self._counts.inc_num_ongoing_requests(self._what)
        try:
            await self._app(scope, receive, send)
        finally:
            self._counts.dec_num_ongoing_requests(self._what)
