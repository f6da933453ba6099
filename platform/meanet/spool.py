"""Points on their way to a tracking server that may be away: kept in a local file first, sent by a thread that tries
again, so that a lost server costs the live view and nothing else.

The file is a JSON line a point, in order; beside it stands how many of them have arrived. What an earlier process left
unsent is sent first.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from meanet.errors import UserError
from meanet.storage import write_text

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0


@dataclass(frozen=True)
class Point:
    """Metrics of one step."""

    run: str
    """Which run, by a name of the caller's own."""
    step: int
    metrics: dict[str, float]


class Spool:
    """Of one run's folder. `send` is called in the spool's thread and may fail: it is asked again."""

    def __init__(
        self, path: Path, send: Callable[[Sequence[Point]], None], on_trouble: Callable[[str], None] | None = None
    ) -> None:
        """Begins to send at once.

        Args:
            path: of the file, in a folder that exists.
            send: sends points in order; raises if it is not known that all have arrived. A point may come twice.
            on_trouble: told once when sending fails, and once when it works again.

        Raises:
            UserError: the file of an earlier process cannot be read.
        """
        self._path, self._send = path, send
        self._say = on_trouble or (lambda _: None)
        self._lock = threading.Condition()
        points, sent = _read(path, self._mark)
        self._waiting, self._sent, self._closing = points[sent:], sent, False
        self._last_error: str | None = None
        self._file = path.open("a", encoding="utf-8")
        self._thread = threading.Thread(target=self._run, name="meanet-spool", daemon=True)
        self._thread.start()

    @property
    def _mark(self) -> Path:
        return self._path.with_name(self._path.name + ".sent")

    @property
    def unsent(self) -> int:
        """Points that have not arrived yet."""
        with self._lock:
            return len(self._waiting)

    def put(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a point; never waits for the server."""
        point = Point(run, step, dict(metrics))
        with self._lock:
            self._file.write(json.dumps(asdict(point)) + "\n")
            self._file.flush()
            self._waiting.append(point)
            self._lock.notify_all()

    def close(self, patience_s: float = 120.0) -> None:
        """Wait until all has arrived, and end the thread.

        Raises:
            UserError: some has not within `patience_s`; it stays in the file.
        """
        deadline = time.monotonic() + patience_s
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._waiting, timeout=patience_s)
            left, why = len(self._waiting), self._last_error
            self._waiting = []  # ends the thread
        self._thread.join(timeout=max(1.0, deadline - time.monotonic()))
        self._file.close()
        if left:
            raise UserError(
                f"{left} points could not be sent ({why}): they lie in {self._path}; bring the tracking server back "
                "and give the same command again"
            )

    def stop(self, patience_s: float = 5.0) -> None:
        """End the thread after what is on its way, for which `patience_s` is waited; the rest stays in the file."""
        with self._lock:
            self._closing, self._waiting = True, []
            self._lock.notify_all()
        self._thread.join(timeout=patience_s)
        self._file.close()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._waiting) or self._closing)
                batch = list(self._waiting)
            if not batch:
                return
            try:
                self._send(batch)
            except Exception as error:  # clients raise many kinds, and a thread must not die of one
                self._failed(error)
                with self._lock:
                    self._lock.wait_for(lambda: not self._waiting, timeout=pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                pause = _FIRST_PAUSE_S
                self._arrived(len(batch))

    def _failed(self, error: Exception) -> None:
        if self._last_error is None:
            self._say(f"points are kept in {self._path.name} and follow: {type(error).__name__}")
        self._last_error = str(error).splitlines()[0] if str(error) else type(error).__name__

    def _arrived(self, count: int) -> None:
        if self._last_error is not None:
            self._say(f"the tracking server is back: {count} points sent")
            self._last_error = None
        with self._lock:
            del self._waiting[:count]
            self._sent += count
            write_text(str(self._sent), self._mark)
            self._lock.notify_all()


def _read(path: Path, mark: Path) -> tuple[list[Point], int]:
    """All points of the file, and how many have arrived; a line that a kill cut off is dropped from the file."""
    if not path.exists():
        return [], 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        write_text("".join(lines), path)
    try:
        points = [Point(**json.loads(line)) for line in lines]
        sent = int(mark.read_text(encoding="utf-8")) if mark.exists() else 0
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to go on without its points") from error
    return points, min(sent, len(points))
