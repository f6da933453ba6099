"""A server under hostile requests: `python -m benchmarks.hostile --url URL` -> docs/benchmarks/hostile.md.

Sends them over a few connections, between two looks at right answers, and watches the memory of the replicas of the
server whose `--ready-file` is given. Exits 1 on any 5xx, lost process, changed answer or growth.
"""

import asyncio
import json
import os
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

from benchmarks import load, strangers
from benchmarks.memory import resident_of, tree
from jobs import _cli

_GROWTH = 64 * 2**20
"""Bytes that a replica may hold above what it held once a tenth of the requests were over: allocators keep some."""
_SETTLE_S = 2.0
"""After the last answer, before the last look: a body that is in flight is no growth."""
_MAY_CLOSE = ("headers", "query, path or method")
"""Kinds that are no HTTP to some servers, which then end the connection."""
_CONNECTIONS = 4
_SOUND = 50


@dataclass(frozen=True)
class Flags:
    """Send hostile requests and write the page."""

    url: str
    """Of the server."""
    ready_file: Path | None = None
    """That the server was started with: it names the process whose replicas are watched."""
    pid: int | None = None
    """That process, in place of a ready file."""
    requests: int = 10_000
    """How many."""
    seed: int = 0
    """Of the requests."""
    output: Path = Path("docs/benchmarks/hostile.md")
    """The page."""


@dataclass
class Outcome:
    """What was seen."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Requests by kind and status."""
    seconds: list[float] = field(default_factory=list)
    """Of each request."""
    memory: list[tuple[int, dict[int, int]]] = field(default_factory=list)
    """Bytes of each replica by its process id, after so many requests."""
    failures: list[str] = field(default_factory=list)
    """What must not be."""


def replicas(pid: int) -> list[int]:
    """Serve's replicas among a process's descendants."""
    found = []
    for one in tree(pid):
        try:
            if b"ServeReplica" in Path(f"/proc/{one}/cmdline").read_bytes():
                found.append(one)
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


async def bombard(flags: Flags, pid: int, shape: strangers.Shape) -> Outcome:
    """Send everything; look at the replicas twenty times."""
    outcome, sent, started = Outcome(), 0, time.monotonic()
    requests = strangers.requests(shape, flags.seed, flags.requests)
    step = max(1, flags.requests // 20)
    async with load.connections(flags.url, _CONNECTIONS) as connections:
        right = await _right_answers(connections[0], shape)
        outcome.memory.append((0, _held(pid)))

        async def work(connection: load.Connection) -> None:
            nonlocal sent
            for one in requests:
                begun = time.monotonic()
                reply = await connection.ask(load.encode(one.method, one.path, one.body, one.headers), 30)
                outcome.seconds.append(time.monotonic() - begun)
                outcome.statuses[one.kind, reply.status] += 1
                sent += 1
                if not _allowed(one.kind, reply.status):
                    outcome.failures.append(f"{one.kind}: {reply.status} for {one.method} {one.path[:80]}")
                if sent % step == 0 and sent < flags.requests:
                    outcome.memory.append((sent, _held(pid)))
                    print(f"{sent} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

        await asyncio.gather(*(work(connection) for connection in connections))
        await asyncio.sleep(_SETTLE_S)
        outcome.memory.append((sent, _held(pid)))
        if await _right_answers(connections[0], shape) != right:
            outcome.failures.append("sound images are answered otherwise than before")
    outcome.failures += lost_or_grown(outcome.memory)
    return outcome


def _allowed(kind: str, status: int) -> bool:
    return 200 <= status < 500 or (status == load.CLOSED and kind in _MAY_CLOSE)


async def _right_answers(connection: load.Connection, shape: strangers.Shape) -> list[tuple[int, str]]:
    generator, found = np.random.default_rng(99), []
    for _ in range(_SOUND):
        body = strangers.file_of(shape, "PNG", generator)
        answer = json.loads((await connection.ask(load.encode("POST", "/v1/classify", body), 30)).body)
        found.append((answer["class_id"], answer["exit"]))
    return found


def _held(pid: int) -> dict[int, int]:
    return {one: resident_of(one) for one in replicas(pid)}


def lost_or_grown(memory: list[tuple[int, dict[int, int]]]) -> list[str]:
    """What must not be, in words: (requests sent, bytes by replica) from first to last."""
    first, last = memory[0][1], memory[-1][1]
    warm = next((held for sent, held in memory if sent >= memory[-1][0] / 10), first)
    found = [
        f"replica {pid} has grown from {warm[pid] / 2**20:.0f} to {last[pid] / 2**20:.0f} MB"
        for pid in set(warm) & set(last)
        if last[pid] - warm[pid] > _GROWTH
    ]
    if not first or set(first) != set(last):
        found.append(f"the replicas were {sorted(first)} and are {sorted(last)}")
    return found


def page(flags: Flags, outcome: Outcome, seconds: float) -> str:
    """As Markdown."""
    kinds = sorted({kind for kind, _ in outcome.statuses})
    statuses = sorted({status for _, status in outcome.statuses})
    named = {load.CLOSED: "closed", load.LATE: "late"}
    rows = [
        [kind, str(sum(outcome.statuses[kind, status] for status in statuses))]
        + [str(outcome.statuses[kind, status] or "") for status in statuses]
        for kind in kinds
    ]
    sent, pids = sum(outcome.statuses.values()), sorted(outcome.memory[0][1])
    held = [[str(count), *(f"{found.get(pid, 0) / 2**20:.0f}" for pid in pids)] for count, found in outcome.memory]
    p50, p99, most = np.quantile(outcome.seconds, [0.5, 0.99, 1.0]) * 1000
    lines = [
        "# A bombardment of hostile requests",
        "",
        f"`python -m benchmarks.hostile --url URL --ready-file FILE --requests {flags.requests} --seed {flags.seed}`, "
        f"at commit {_cli.commit()}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, Ray {version('ray')}, Pillow {version('pillow')}.",
        "",
        f"{sent} requests in {seconds:.0f} s over {_CONNECTIONS} connections, client and server on the same cores: "
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {most:.0f} ms. "
        + (
            f"{len(outcome.failures)} must not be: {'; '.join(outcome.failures[:5])}."
            if outcome.failures
            else "No 5xx, no process lost, no growth; sound images were answered the same before and after."
        ),
        "",
        "Requests by kind and status (`benchmarks/strangers.py` makes them). 200 is right where what is hostile is not "
        "decoded: profiles, texts, pixels beyond the header's. `closed`: the server ended the connection, as "
        "HTTP allows it for a head that is too long or none.",
        "",
        _table(["kind", "sent", *(named.get(status, str(status)) for status in statuses)], rows),
        "",
        "Memory of each replica's own, MB, after so many requests; last with none in flight:",
        "",
        _table(["requests", *(f"replica {number + 1}" for number in range(len(pids)))], held),
        "",
    ]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.hostile")
    pid = flags.pid or (json.loads(flags.ready_file.read_text())["pid"] if flags.ready_file else None)
    if pid is None or not replicas(pid):
        sys.exit("give --ready-file (or --pid) of a server of this machine: its replicas are watched")
    model = asyncio.run(_described(flags.url))
    shape = model["height"], model["width"], model["channels"]
    started = time.monotonic()
    outcome = asyncio.run(bombard(flags, pid, shape))
    flags.output.write_text(page(flags, outcome, time.monotonic() - started))
    print(f"{flags.output}: {len(outcome.failures)} that must not be")
    for failure in outcome.failures[:20]:
        print(f"  {failure}")
    sys.exit(1 if outcome.failures else 0)


async def _described(url: str) -> dict[str, int]:
    async with load.connections(url, 1) as (connection,):
        found: dict[str, int] = json.loads((await connection.ask(load.encode("GET", "/v1/model"), 30)).body)["input"]
    return found


if __name__ == "__main__":
    main()
