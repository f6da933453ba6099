"""What a replica may be watched by: metrics, logs, traces. This one looks away."""

from typing import Literal

from serve_apps.http import Answer

CallOutcome = Literal["ok", "timed out", "failed", "probe ok", "probe failed", "audit ok", "audit failed"]


class Observer:
    """Called on the event loop, once for each; must be quick and must not raise."""

    def answered(self, answer: Answer, bytes_sent: int, seconds: float) -> None:
        """An image was answered, so long after its admission; bytes_sent went to the cloud for it."""

    def refused(self, reason: str) -> None:
        """Images were refused before anything was spent on them."""

    def passed(self, images: int, seconds: float) -> None:
        """The blocks ran over a micro-batch."""

    def uploaded(self, seconds: float, modelled: float) -> None:
        """A call's images went up and its answer came: so long by the clock, and by the model's link."""

    def cloud_call(self, images: int, bytes_sent: int, seconds: float, outcome: CallOutcome) -> None:
        """A call to the cloud is over."""
