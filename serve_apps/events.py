"""What happens in a replica, as JSON lines on its log: one object a line with time, level, event, replica, request_id.

Ray keeps a replica's standard error in its session's logs, `worker-*.err`. It is written to as the process was given
it: Serve may put a logger of its own, with a level of its own, in the place of `sys.stderr`.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request at hand."""
TRACE_ID: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""Of the request at hand, where it is traced."""
LOGGER = "meanet.events"
ACCESS = "meanet.events.access"
"""Silent, unless it was asked for."""
_EVERY_S = 1.0
"""At most a line of a kind in so long; the next one says how many were left out."""


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self._replica = replica

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        plain = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "replica": self._replica,
        }
        return json.dumps(plain | getattr(record, "fields", {}), default=str)


def set_up(replica: str, stream: TextIO | None = None, *, access: bool = False) -> logging.Logger:
    """The logger of a replica's events.

    Args:
        replica: its id.
        stream: where lines go; the process's own standard error if None.
        access: a line for each request, too.
    """
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.__stderr__ or sys.stderr)
    handler.setFormatter(JsonLines(replica))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger(ACCESS).setLevel(logging.INFO if access else logging.WARNING)
    logger.propagate = False
    return logger


class Events:
    """Writes events, those that may come in floods at a bounded rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._access, self._clock = logging.getLogger(LOGGER), logging.getLogger(ACCESS), clock
        self._written: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    @property
    def of_access(self) -> bool:
        """Whether each request is to have a line."""
        return self._access.isEnabledFor(logging.INFO)

    def write(self, level: int, event: str, **fields: object) -> None:
        """A line, always."""
        ids = {"request_id": REQUEST_ID.get(), "trace_id": TRACE_ID.get()}
        given = {name: value for name, value in ids.items() if value is not None}
        self._logger.log(level, event, extra={"fields": given | fields})

    def limited(self, level: int, event: str, **fields: object) -> None:
        """A line, unless there was one of this event a moment ago; that one's successor counts it."""
        now = self._clock()
        if now - self._written.get(event, -_EVERY_S) < _EVERY_S:
            self._left_out[event] = self._left_out.get(event, 0) + 1
            return
        self._written[event] = now
        left_out = self._left_out.pop(event, 0)
        self.write(level, event, **fields, **({"left_out": left_out} if left_out else {}))
