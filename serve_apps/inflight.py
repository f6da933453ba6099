"""Bodies that are held at a time, bounded in bytes: many small ones may wait, a few large ones may not fill memory."""

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.http import MAX_BATCH_BYTES

MAX_HELD_BYTES = 256 * 2**20
"""Of one replica; four bodies of the largest size."""


class InFlight:
    """ASGI middleware: counts what requests announce, and refuses at once what would be too much."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._app, self._max_bytes = app, max_bytes
        self.held = 0
        """Bytes, announced by requests that are not over."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, or answer 503."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        size = _announced(scope)
        if self.held and self.held + size > self._max_bytes:
            detail = f"overloaded: bodies of {self.held} bytes are held and {size} more are too many; try again later"
            await JSONResponse({"detail": detail}, 503, {"Retry-After": "1"})(scope, receive, send)
            return
        self.held += size
        try:
            await self._app(scope, receive, send)
        finally:
            self.held -= size


def _announced(scope: Scope) -> int:
    """Bytes that the body may have: none is read beyond the largest size, and without a length it may have that."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return min(int(value), MAX_BATCH_BYTES)
    return MAX_BATCH_BYTES
