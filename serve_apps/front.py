"""What a request meets in a replica before Serve's own handling of it: the gate, and a word that spares Serve a task.

Serve installs it in a process whose environment says so (`serve_apps.placement` sets it for edge replicas). Where there
is none, as behind Serve's own proxy, the application's own gate stands.
"""

from typing import Any

from ray import serve
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps import fast_path, gate
from serve_apps.edge import EdgeService

_NOT_WATCHED = (b"x-request-disconnect-disabled", b"?1")
"""Serve's header: it then starts no task that waits for the client to go away."""


def service_here() -> EdgeService:
    """Of the replica that this process is."""
    replica: Any = serve.get_replica_context().servable_object
    service: EdgeService = replica._service
    return service


def middlewares() -> list[Middleware]:
    """The last one is outermost."""
    return [Middleware(Unwatched), Middleware(gate.Gate, service=service_here)]


class Unwatched:
    """Tells Serve not to watch for the client's going: one image is answered sooner than that pays."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] == "http" and scope["path"] == fast_path.PATH:
            scope["headers"] = [*scope["headers"], _NOT_WATCHED]
        await self._app(scope, receive, send)
