"""Refuses a request before its body is read, where reading it would make others late or memory scarce.

What a replica's event loop cannot keep up with waits in sockets, where no deadline is looked at: so the loop's own
delay is watched, and while it is behind, what arrives is answered 503 at once. Bodies in hand are counted in bytes.
"""

import asyncio
import json
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.http import MAX_BATCH_BYTES

MAX_LAG_S = 0.15
"""How far the loop may be behind; a request of a second's deadline then still has most of it."""
ALWAYS = 16
"""Requests that are in hand however far it is: a machine that stalls for a moment is not overloaded."""
MAX_BYTES = 256 * 2**20
"""Of bodies in hand."""
_BEAT_S = 0.02
_REFUSAL = json.dumps({"detail": "overloaded: this replica is behind; try again later"}).encode()
_HEADERS = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"content-length", b"%d" % len(_REFUSAL))]


class Gate:
    """ASGI middleware, outermost; one for each replica."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._requests = self._bytes = 0
        self._due: float | None = None
        """When the loop is to say that it keeps up; None while nothing is in hand."""

    @property
    def lag_s(self) -> float:
        """How far the loop is behind."""
        return 0.0 if self._due is None else max(0.0, self._clock() - self._due)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        held = _Held(self, receive, _announced(scope))
        if self._is_behind() or self._bytes + held.size > MAX_BYTES:
            await _refuse(send)
            return
        self._begin(held.size)
        try:
            await self._app(scope, held.receive, send)
        finally:
            self._requests -= 1
            self._bytes -= held.size

    def _is_behind(self) -> bool:
        return self._requests >= ALWAYS and self.lag_s > MAX_LAG_S

    def _begin(self, size: int) -> None:
        self._requests += 1
        self._bytes += size
        if self._due is None:
            self._beat()

    def _beat(self) -> None:
        if not self._requests:
            self._due = None
            return
        self._due = self._clock() + _BEAT_S
        asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def more(self, size: int) -> None:
        """Bytes have come that were not announced."""
        self._bytes += size


class _Held:
    """The body of a request in hand: as announced, or as it comes."""

    def __init__(self, gate: Gate, receive: Receive, announced: int | None) -> None:
        self._gate, self._receive = gate, receive
        self.size = announced or 0
        self.receive: Receive = receive if announced is not None else self._counting

    async def _counting(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.size += size
        self._gate.more(size)
        return message


def _announced(scope: Scope) -> int | None:
    """Bytes; none where there are more than are taken, which will not be read."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value) if int(value) <= MAX_BATCH_BYTES else 0
    return None


async def _refuse(send: Send) -> None:
    await send({"type": "http.response.start", "status": 503, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _REFUSAL})
