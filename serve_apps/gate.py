"""Refuses a request before its body is read, where reading it would make others late or memory scarce.

Cheap looks: how long what is in hand will take at the rate at which answers have gone out of late; how long what waits
for the blocks will; how far the event loop is behind; and how many connections wait to be accepted, for where all of a
core goes into answers they are what grows, and no deadline knows of them. Bodies in hand are counted in bytes. The gate
stands before Serve's own handling of a request (`serve_apps.front`), which costs ten times what a refusal does.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.backlog import Backlog
from serve_apps.edge import EdgeService
from serve_apps.http import MAX_BATCH_BYTES

MAX_LAG_S = 0.15
"""How far the loop may be behind; a request of a second's deadline then still has most of it."""
MAX_WAIT_S = 0.35
"""How long what is in hand may take; answers go out a micro-batch at a time, so that their rate is known roughly."""
MAX_UNSEEN_S = 0.25
"""How long what waits to be accepted may."""
MAX_BACKLOG = 128
"""Connections that wait to be accepted; a refusal takes a fraction of a millisecond, so that these are soon through."""
ALWAYS = 16
"""Requests that are in hand however far it is: a machine that stalls for a moment is not overloaded."""
MAX_BYTES = 256 * 2**20
"""Of bodies in hand."""
_BEAT_S = 0.02
_MOST_TAKEN = 64
"""Connections in a beat."""
_KEPT = 0.95
"""Of what was learned, from beat to beat: about the last half second counts."""
_GUESS_S = 0.1
"""What is held before anything is learned weighs as much as so long a time of work."""
_GUESSED_ANSWERS, _GUESSED_ARRIVALS = 25, 100
"""In it; a refusal costs less than an answer."""
_LONGEST_BEAT_S = 0.1
"""As it counts: a machine that has stalled says nothing of the rate."""
_PASSED = "meanet.gate"
"""In the scope of a request that has been let through."""


class Gate:
    """ASGI middleware, outermost; one for each replica."""

    def __init__(
        self,
        app: ASGIApp,
        service: Callable[[], EdgeService],
        clock: Callable[[], float] = time.monotonic,
        protocol: Callable[[], Callable[[], asyncio.BaseProtocol] | None] = lambda: None,
    ) -> None:
        """Stand before an application.

        Args:
            app: it.
            service: asked for at each request: a replica has it only once it is up.
            clock: in seconds.
            protocol: what makes a protocol for a connection to this server, if that is known: connections are then
                taken in as they come.
        """
        self._app, self._service, self._clock, self._protocol = app, service, clock, protocol
        self._requests = self._bytes = 0
        self._pace, self._arrivals = _Rate(_GUESSED_ANSWERS), _Rate(_GUESSED_ARRIVALS)
        self._backlog: Backlog | None = None
        self._coming = set[asyncio.Task[object]]()
        self._beaten = 0.0
        self._due: float | None = None
        """When the loop is to say that it keeps up; None while nothing is in hand."""

    @property
    def lag_s(self) -> float:
        """How far the loop is behind."""
        return 0.0 if self._due is None else max(0.0, self._clock() - self._due)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] != "http" or scope["method"] != "POST" or _PASSED in scope:
            await self._app(scope, receive, send)
            return
        held = _Held(self, receive, _announced(scope))
        service = self._service()
        self._arrivals.answered += 1
        if self._backlog is None:
            self._backlog = Backlog((scope.get("server") or (None, None))[1])
        why, seconds = self._full(service, held.size)
        if why:
            service.refused("overloaded")
            await _refuse(send, why, seconds)
            return
        scope[_PASSED] = True
        self._begin(held.size)
        try:
            await self._app(scope, held.receive, send)
        finally:
            self._requests -= 1
            self._bytes -= held.size
            self._pace.answered += 1

    def _full(self, service: EdgeService, size: int) -> tuple[str, float]:
        """Why not, and after how long there may be room; "" = there is."""
        if self._bytes + size > MAX_BYTES:
            return f"bodies of {self._bytes} bytes are in hand and the limit is {MAX_BYTES}", _BEAT_S
        if self._requests < ALWAYS:
            return "", 0.0
        lag = self.lag_s
        if lag > MAX_LAG_S:
            return f"this replica is behind by {lag:.2f} s", lag
        here = self._here(service)
        if here >= ALWAYS and (wait := self._pace.seconds(here)) > MAX_WAIT_S:
            return f"{here} requests are in hand, which takes {wait:.2f} s", wait
        waiting = 0 if self._backlog is None else len(self._backlog)
        if waiting > MAX_BACKLOG or self._arrivals.seconds(waiting) > MAX_UNSEEN_S:
            return f"{waiting} connections wait to be accepted", self._arrivals.seconds(waiting)
        return service.full()

    def _here(self, service: EdgeService) -> int:
        """Requests in hand that do not wait for the cloud."""
        return self._requests - min(self._requests, service.away)

    def _begin(self, size: int) -> None:
        self._requests += 1
        self._bytes += size
        if self._due is None:
            self._beat()

    def _beat(self) -> None:
        now = self._clock()
        if self._due is not None:
            busy = self._here(self._service()) >= ALWAYS
            self._pace.passed(now - self._beaten, busy=busy)
            self._arrivals.passed(now - self._beaten, busy=busy)
        self._beaten = now
        if not self._requests:
            self._due = None
            return
        self._take_in()
        self._due = now + _BEAT_S
        asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _take_in(self) -> None:
        """What waits to be accepted: the event loop takes one a turn, and a turn may be long."""
        if self._backlog is not None and len(self._backlog) > 1 and (protocol := self._protocol()) is not None:
            self._coming.update(taken := self._backlog.accept(_MOST_TAKEN, protocol))
            for task in taken:
                task.add_done_callback(self._coming.discard)

    def more(self, size: int) -> None:
        """Bytes have come that were not announced."""
        self._bytes += size


@dataclass
class _Rate:
    """At which requests come or are answered while many are in hand: learned, and soon forgotten."""

    guess: float
    """Requests in `_GUESS_S`, until more is known."""
    answered: int = 0
    """Or come, since the last beat."""
    _all: float = 0.0
    _seconds: float = 0.0

    def passed(self, seconds: float, *, busy: bool) -> None:
        """A beat is over."""
        self._all, self._seconds = _KEPT * self._all, _KEPT * self._seconds
        if busy:
            self._all += self.answered
            self._seconds += min(seconds, _LONGEST_BEAT_S)
        self.answered = 0

    def seconds(self, requests: int) -> float:
        """That so many take."""
        return requests * (_GUESS_S + self._seconds) / (self.guess + self._all)


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


async def _refuse(send: Send, why: str, seconds: float) -> None:
    body = json.dumps({"detail": f"overloaded: {why}; try again later"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
