"""Lines for a person: what is going on, and how long it will take."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def say(text: str) -> None:
    """One line of progress, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


_MACS_PER_S = 1e10
"""A processor core's, roughly."""


class TrainingProgress:
    """Prints each epoch with the time that is left, by the pace of the run's own epochs and the work in each.

    What its epochs took beyond their MACs at a core's rate is taken for a price of every epoch (checkpoints, reports):
    small networks cost little else. Phases may be trained one after the other, or some at the same time: then their
    work passes side by side.
    """

    def __init__(self, epochs: dict[str, int], work: dict[str, float]) -> None:
        """`epochs` of each phase, in order, and `work` of one of its epochs, in MACs."""
        self._epochs, self._work = epochs, work
        self._seen: list[float] = []
        """Work of each epoch since the start."""
        self._done = dict.fromkeys(epochs, 0)
        self._started: float | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event of `meanet.cluster.train`."""
        if event["event"] == "start":
            self._start(event)
        else:
            self._epoch(event)

    def _start(self, event: dict[str, Any]) -> None:
        self._started, self._seen = time.monotonic(), []
        left = event["epochs_done"]
        for phase in event["phases"]:  # they are trained in this order
            self._done[phase] = min(left, self._epochs[phase])
            left -= self._done[phase]
        verb = "resumed from the last checkpoint" if event["resumed"] else "started"
        every = sum(self._epochs[phase] for phase in event["phases"])
        done = f"{event['epochs_done']} of {every} epochs done"
        what = "" if len(event["phases"]) == len(self._epochs) else f" ({' and '.join(event['phases'])})"
        say(f"  {event['workers']} worker(s) {verb} on {len(event['nodes'])} node(s), pid {event['pid']}, {done}{what}")

    def _epoch(self, event: dict[str, Any]) -> None:
        self._seen.append(self._work[event["phase"]])
        self._done[event["phase"]] = event["epoch"]
        left = self._left(time.monotonic() - (self._started or time.monotonic()))
        say(
            f"  {event['phase']:<9} epoch {event['epoch']:>3}/{event['epochs']:<3} loss {event['loss']:.4f}  "
            f"validation {event['validation_accuracy']:.4f}  left {int(left // 60)}:{int(left % 60):02d}"
        )

    def _left(self, took: float) -> float:
        """Seconds, where the epochs that were seen took so many."""
        a_mac = min(1 / _MACS_PER_S, took / sum(self._seen))
        an_epoch = (took - a_mac * sum(self._seen)) / len(self._seen)
        return sum(
            (count - self._done[phase]) * (an_epoch + a_mac * self._work[phase])
            for phase, count in self._epochs.items()
        )


@contextmanager
def repeated(work: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Work every so many seconds, in a thread of that name, until the block is over, and then once more."""
    over = threading.Event()

    def again() -> None:
        while not over.wait(every_s):
            work()

    thread = threading.Thread(target=again, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        work()
