"""Processes that outlive the command which starts them: a session of their own each, found and ended by their ids.

Each carries a mark in its environment, as do all that descend from it: an id that the system has meanwhile given to
somebody else's process is never taken for ours, and nothing of ours is forgotten. Linux only (/proc).
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meanet.errors import UserError

MARK = "MEANET_CLUSTER"
"""The variable that holds the mark."""
_PORTS = range(20_000, 30_000)
"""Below the kernel's own choice: no outgoing connection takes one between our look and its use."""
_POLL_S = 0.2


@dataclass(frozen=True)
class Part:
    """A process that was started."""

    name: str
    """For people."""
    pid: int
    """Of it, and of its session."""
    log: str
    """Where it writes."""


def begin(name: str, command: Sequence[str], environment: Mapping[str, str], mark: str, log: Path) -> Part:
    """Start a process; what it says goes to a log that only its user can read."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch(mode=0o600)
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            env={**environment, MARK: mark},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    # A process that has only just begun has no environment yet, and looks as if it had ended.
    _until(lambda: _has_mark(process.pid, mark) or process.poll() is not None, 10.0)
    process.returncode = 0  # nobody waits for it here: it is known by its id from now on
    return Part(name, process.pid, str(log))


def _has_mark(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return f"{MARK}={mark}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def alive(part: Part, mark: str) -> bool:
    """Whether it runs: one that has ended and was not waited for has no environment any more."""
    return _has_mark(part.pid, mark)


def marked(mark: str) -> list[int]:
    """Ids of all processes that carry a mark, but for this one."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _has_mark(pid, mark)]


def raylet(part: Part, mark: str) -> int | None:
    """The id of the raylet that a `ray start --block` has started, if it runs."""
    for pid in marked(mark):
        with contextlib.suppress(OSError, IndexError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == part.pid and Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                return pid
    return None


def wait_until(ready: Callable[[], bool], part: Part, mark: str, patience_s: float) -> None:
    """Wait for a part to be healthy.

    Raises:
        UserError: it has ended, or takes too long; the message has the end of its log.
    """
    deadline = time.monotonic() + patience_s
    while not ready():
        late = time.monotonic() > deadline
        if late or not alive(part, mark):
            said = Path(part.log).read_text(errors="replace").splitlines()[-10:]
            what = f"is not healthy after {patience_s:.0f} s" if late else "has ended"
            raise UserError(f"{part.name} {what}; the end of {part.log}:\n" + "\n".join(said))
        time.sleep(_POLL_S)


def end(parts: Iterable[Part], mark: str, patience_s: float) -> int:
    """End parts and all that descends from them, asked first; returns how many had to be killed."""
    ours = [part for part in parts if alive(part, mark)]
    for part in ours:
        _signal(part.pid, signal.SIGTERM)
    _until(lambda: not any(alive(part, mark) for part in ours), patience_s)
    killed = 0
    while left := marked(mark):  # again, for some may have been starting others
        for pid in left:
            _signal(pid, signal.SIGKILL)
        killed += len(left)
        _until(lambda: not marked(mark), 1.0)
    return killed


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _until(reached: Callable[[], bool], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Free ones on loopback whose neighbours 10,000 above, which SeaweedFS's gRPC takes, are free too."""
    found: list[int] = []
    while len(found) < count:
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + len(_PORTS)))
            if port not in found:
                found.append(port)
    return found


def chosen_port(wished: int, flag: str) -> int:
    """A port of loopback that is free now; any for 0.

    Raises:
        UserError: it is taken.
    """
    if wished == 0:
        return free_ports(1)[0]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wished))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"127.0.0.1:{wished} cannot be had ({error}): choose another with {flag}, or 0 for a free one"
            ) from error
    return wished
