"""Refuses a request before its body is read, where reading it would make others late or memory scarce.

Cheap looks: how long what is in hand will take at the rate at which answers have gone out of late; how long what waits
for the blocks will; how far the event loop is behind; and how many connections wait to be accepted, for where all of a
core goes into answers they are what grows, and no deadline knows of them. A request is in hand once its body is there:
clients that announce much and send little take no place. Bodies are counted in bytes, as they come. The gate stands
before Serve's own handling of a request (`serve_apps.front`), which costs ten times what a refusal does.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.backlog import Backlog
from serve_apps.edge import EdgeService
from serve_apps.events import REQUEST_ID, Events
from serve_apps.http import MAX_BATCH_BYTES
from serve_apps.trimming import Trimmer
from serve_apps.watched import HEADER, request_id_of

MAX_LAG_S = 0.15
"""How far the loop may be behind; a request of a second's deadline then still has most of it."""
MAX_WAIT_S = 0.28
"""How long what is in hand may take; answers go out a micro-batch at a time, so that their rate is known roughly."""
MAX_UNSEEN_S = 0.25
"""How long what waits to be accepted may."""
MAX_BACKLOG = 128
"""Connections that wait to be accepted; a refusal takes a fraction of a millisecond, so that these are soon through."""
ALWAYS = 16
"""Requests that are in hand however far it is: a machine that stalls for a moment is not overloaded."""
MAX_BYTES = 256 * 2**20
"""Of bodies that are there or coming."""
_SMALL = 2**20
"""A body that is read to its end however full it is."""
_BEAT_S = 0.02
_MOST_TAKEN = 64
"""Connections in a beat."""
_KEPT = 0.95
"""Of what was learned, from beat to beat: about the last half second counts."""
_GUESS_S = 0.15
"""What is held before anything is learned weighs as much as so long a time of work."""
_GUESSED_ANSWERS, _GUESSED_ARRIVALS = 60, 150
"""In it, so that a whole micro-batch may be in hand; a refusal costs less than an answer."""
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
        self._open = self._requests = self._bytes = self._turned_away = 0
        self._events = Events()
        self._trimmer = Trimmer()
        self._pace, self._arrivals = _Rate(_GUESSED_ANSWERS), _Rate(_GUESSED_ARRIVALS)
        self._backlog: Backlog | None = None
        self._coming = set[asyncio.Task[object]]()
        self._beaten, self._busy = 0.0, False
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
        announced = _announced(scope)
        service = self._service()
        self._arrivals.answered += 1
        if self._backlog is None:
            self._backlog = Backlog((scope.get("server") or (None, None))[1])
        why, seconds = self._full(service, announced or 0)
        if why:
            await self._refuse(scope, send, why, seconds)
            return
        scope[_PASSED] = True
        held = _Held(self, receive, send, stops=announced is None or announced > _SMALL)
        self._begin()
        try:
            await self._app(scope, held.receive, held.send if held.stops else send)
        except Exception:
            if not held.stopped:
                raise
        finally:
            self._open -= 1
            self._requests -= held.whole
            self._bytes -= held.size
            self._trimmer.body_ended(held.size)
            self._pace.answered += 1
        if held.stopped:
            await self._refuse(scope, send, *self._too_many_bytes(0))

    def _full(self, service: EdgeService, size: int) -> tuple[str, float]:
        """Why not, and after how long there may be room; "" = there is."""
        if self._bytes + size > MAX_BYTES:
            return self._too_many_bytes(size)
        if self._requests < ALWAYS:
            return "", 0.0
        lag = self.lag_s
        if lag > MAX_LAG_S:
            return f"this replica is behind by {lag:.2f} s", lag
        here = self._here(service)
        since = self._clock() - self._beaten
        if here >= ALWAYS and (wait := self._pace.seconds(here, since)) > MAX_WAIT_S:
            return f"{here} requests are in hand, which takes {wait:.2f} s", wait
        waiting = 0 if self._backlog is None else len(self._backlog)
        wait = self._arrivals.seconds(waiting, since)
        if waiting > MAX_BACKLOG or wait > MAX_UNSEEN_S:
            return f"{waiting} connections wait to be accepted", wait
        return service.full()

    def _too_many_bytes(self, size: int) -> tuple[str, float]:
        more = f", {size} more come" if size else ""
        return f"bodies of {self._bytes} bytes are in hand{more} and the limit is {MAX_BYTES}", _BEAT_S

    async def _refuse(self, scope: Scope, send: Send, why: str, seconds: float) -> None:
        """With an id and a line as any other request has."""
        self._service().refused("overloaded")
        request_id, _ = request_id_of(scope["headers"])
        REQUEST_ID.set(request_id)
        told = {"method": scope["method"], "path": scope["path"], "status": 503, "why": why}
        self._events.limited(logging.WARNING, "refused", **told)
        if self._events.of_access:
            self._events.write(logging.INFO, "access", **told)
        await _answer_503(send, why, seconds, request_id)

    def _here(self, service: EdgeService) -> int:
        """Requests in hand that do not wait for the cloud."""
        return self._requests - min(self._requests, service.away)

    def _begin(self) -> None:
        self._open += 1
        if self._due is None:
            self._beat()

    def came(self, size: int, *, whole: bool) -> bool:
        """A piece of a body; returns whether there is room for more."""
        self._bytes += size
        self._requests += whole
        return self._bytes <= MAX_BYTES

    def _beat(self) -> None:
        now, service = self._clock(), self._service()
        self._pace.answered -= service.turned_away - self._turned_away  # they were quick, and say nothing of answers
        self._turned_away = service.turned_away
        if self._due is not None:
            before, self._busy = self._busy, self._here(service) >= ALWAYS
            busy = before or self._busy  # where all go out at once, it ends with none in hand
            self._pace.passed(now - self._beaten, busy=busy)
            self._arrivals.passed(now - self._beaten, busy=busy)
        self._beaten = now
        if not self._open:
            self._due, self._busy = None, False
            return
        self._due = now + _BEAT_S
        asyncio.get_running_loop().call_later(_BEAT_S, self._beat)
        self._take_in()

    def _take_in(self) -> None:
        """What waits to be accepted: the event loop takes one a turn, and a turn may be long."""
        if self._backlog is not None and len(self._backlog) > 1 and (protocol := self._protocol()) is not None:
            self._coming.update(taken := self._backlog.accept(_MOST_TAKEN, protocol))
            for task in taken:
                task.add_done_callback(self._came_in)

    def _came_in(self, task: "asyncio.Task[object]") -> None:
        self._coming.discard(task)
        if not task.cancelled():
            task.exception()  # a connection that was lost meanwhile is nobody's trouble


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
            self._all += max(0, self.answered)
            self._seconds += min(seconds, _LONGEST_BEAT_S)
        self.answered = min(0, self.answered)  # what was taken off too early is counted in the next

    def seconds(self, requests: int, since: float = 0.0) -> float:
        """That so many take, seconds `since` the last beat: what has gone out in them counts already, for the next beat
        may be long in coming where a whole micro-batch is answered, and all of its clients ask again."""
        took = _GUESS_S + self._seconds + min(since, _LONGEST_BEAT_S)
        return requests * took / (self.guess + self._all + max(0, self.answered))


class _Held:
    """A request that was let through, and its body as it comes."""

    def __init__(self, gate: Gate, receive: Receive, send: Send, *, stops: bool) -> None:
        self._gate, self._receive, self._send, self.stops = gate, receive, send, stops
        self.size, self.whole, self.stopped = 0, False, False

    async def receive(self) -> Message:
        """A piece of the body; the client is gone, for the application, where there is no room for more."""
        if self.stopped:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request" and not self.whole:
            size = len(message.get("body", b""))
            self.size += size
            self.whole = not message.get("more_body", False)
            room = self._gate.came(size, whole=self.whole)
            if self.stops and not room and not self.whole:
                self.stopped = True
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """What the application says, unless it was stopped."""
        if not self.stopped:
            await self._send(message)


def _announced(scope: Scope) -> int | None:
    """Bytes; none where there are more than are taken, which will not be read."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value) if int(value) <= MAX_BATCH_BYTES else 0
    return None


async def _answer_503(send: Send, why: str, seconds: float, request_id: str) -> None:
    body = json.dumps({"detail": f"overloaded: {why}; try again later"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
        (HEADER, request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
