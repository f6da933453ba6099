"""Memory by the kernel's counters: of this process above a mark, and of a process with all that it started."""

import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path


class Memory:
    """Resident memory of this process, in bytes, by the kernel."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier phase has freed is not resident any more
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self._before = self._status("VmRSS")

    def peak(self) -> int:
        """Above what was resident when this was made."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


class TreeMemory(threading.Thread):
    """The most memory that a process and all that it started hold: their own, and once what they share.

    From the kernel's counters: asking for proportional memory (PSS) walks every page, which slows what is measured.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        while not self.done.wait(0.5):
            held = [_resident(pid) for pid in tree(self.pid)]
            own, files, shared = (list(column) for column in zip(*held, strict=True))
            self.peak = max(self.peak, sum(own) + max(files) + max(shared))


def tree(root: int) -> Iterator[int]:
    """A process and all that it started, by their parents."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def _resident(pid: int) -> tuple[int, int, int]:
    """Bytes of a process that are its own, of files, and shared: Ray's object store."""
    try:
        rows = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return 0, 0, 0
    found = {row[0]: int(row[1]) * 1024 for row in rows if row and row[0].startswith("Rss")}
    return found.get("RssAnon:", 0), found.get("RssFile:", 0), found.get("RssShmem:", 0)


def resident_of(pid: int) -> int:
    """Bytes of a process that are its own; 0 if it is gone."""
    return _resident(pid)[0]
