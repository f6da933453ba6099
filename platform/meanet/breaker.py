"""A circuit breaker about the cloud (Nygard, Release It!, 2007): after some failures in a row, nobody waits for it.

closed: calls go through. open: none does; the edge answers. half_open: after a while one probe is sent, beside the
requests and not instead of their answers; if it succeeds the breaker closes, else it is open again.
"""

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Counts outcomes and says who may call."""

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens after so many `failures` in a row, for `open_s` seconds at least."""
        self.failures, self.open_s = failures, open_s
        self._clock = clock
        self._failed = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        """Where it stands now."""
        if self._opened is None:
            return "closed"
        return "half_open" if self._probing or self._clock() - self._opened >= self.open_s else "open"

    def allows(self) -> bool:
        """Whether a request may ask the cloud and wait for it."""
        return self._opened is None

    def claim_probe(self) -> bool:
        """Whether the caller is to send the one probe; it then owes `record_probe`."""
        if self.state != "half_open" or self._probing:
            return False
        self._probing = True
        return True

    def record(self, *, success: bool) -> None:
        """A call of a request is over; one that was under way when the breaker opened changes nothing any more."""
        if self._opened is not None:
            return
        self._failed = 0 if success else self._failed + 1
        if self._failed >= self.failures:
            self._opened = self._clock()

    def record_probe(self, *, success: bool) -> None:
        """The probe is over: closed, or open for as long again."""
        self._probing = False
        if success:
            self._failed, self._opened = 0, None
        else:
            self._opened = self._clock()
