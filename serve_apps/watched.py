"""Around every request: its id, its trace, and a line where it was refused or failed.

Plain ASGI, for it is in the path of all of them.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.events import REQUEST_ID, Events
from serve_apps.http import Answer
from serve_apps.traces import Tracing

HEADER = b"x-request-id"
_WATCH: ContextVar["Watched | None"] = ContextVar("watch", default=None)
"""Of the request at hand."""
_SOUND = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, bool]:
    """The client's id and True; a new one and False where it gave none, or one that is no fit for a log."""
    for name, value in headers:
        if name == HEADER and _SOUND.fullmatch(value):
            return value.decode("ascii"), True
    return os.urandom(16).hex(), False


def answered(answers: Sequence[Answer]) -> None:
    """Note the answers of the request at hand, if it is watched; to be called before they go out."""
    watch = _WATCH.get()
    if watch is not None:
        watch.note(answers)


class Watched:
    """An application whose requests have ids, and leave traces and lines."""

    def __init__(
        self, app: ASGIApp, events: Events, tracing: Callable[[], Tracing | None] = lambda: None, *, echo: bool = True
    ) -> None:
        """Watch an application.

        Args:
            app: it.
            events: where lines go.
            tracing: asked once where spans go; None = nowhere.
            echo: whether to hand an id that the client gave back to it; one that was made here always is.
        """
        self._app, self._events, self._tracing, self._echo = app, events, tracing(), echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, given = request_id_of(scope["headers"])
        REQUEST_ID.set(request_id)
        _WATCH.set(self)
        started, status = time.perf_counter(), 0
        handed_back = [] if given and not self._echo else [(HEADER, request_id.encode())]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *handed_back]}
            await send(message)

        try:
            if self._tracing is None:
                await self._app(scope, receive, answer)
            else:
                with self._tracing.request(scope, request_id) as span:
                    await self._app(scope, receive, answer)
                    span.set_attribute("http.response.status_code", status)
        except Exception as error:
            self._events.limited(logging.ERROR, "failed", path=scope["path"], error=f"{type(error).__name__}: {error}")
            raise
        finally:
            if status >= 400 or self._events.of_access:
                self._note(scope, status, time.perf_counter() - started)

    def note(self, answers: Sequence[Answer]) -> None:
        """A line of those that had to do without the cloud, and spans of what they went through."""
        for answer in answers:
            if answer.degraded:
                self._events.limited(logging.WARNING, "degraded", reason=answer.reason, exit=answer.exit)
        if self._tracing is not None:
            self._tracing.answered(answers)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        fields = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(1000 * seconds, 3)}
        if status >= 500 and status != 503:
            self._events.limited(logging.ERROR, "failed", **fields)
        elif status >= 400:
            self._events.limited(logging.WARNING, "refused", **fields)
        if self._events.of_access:
            self._events.write(logging.INFO, "access", **fields)
