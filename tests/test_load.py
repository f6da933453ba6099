"""The benchmarks' client and judges: what they measure with must itself be right."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import hostile, load, serving
from benchmarks.load import Reply, Sample
from benchmarks.outage_bounds import Outage, Overload, Question

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 422 No\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
LAST = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"


def against(handler: Handler, ask: Callable[[str], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        ended = list[asyncio.Task[None]]()

        async def until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ended.append(asyncio.current_task())  # type: ignore[arg-type]
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await handler(reader, writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

        server = await asyncio.start_server(until_closed, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            found = await ask(f"http://127.0.0.1:{port}")
            await asyncio.gather(*ended)
            return found

    return asyncio.run(run())


def saying(*answers: bytes) -> tuple[Handler, list[int]]:
    """Answers these in turn on a connection, in small pieces; closes it after the last. And how many were opened."""
    opened = [0]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened[0] += 1
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            for place in range(0, len(answer), 7):
                writer.write(answer[place : place + 7])
                await writer.drain()
                await asyncio.sleep(0)

    return handle, opened


def test_replies_are_read_whole_over_one_connection() -> None:
    handler, opened = saying(LENGTH, CHUNKED, LENGTH, LAST)

    async def ask(url: str) -> list[Reply]:
        async with load.connections(url, 1) as (connection,):
            return [await connection.ask(load.encode("POST", "/", b"body"), 5) for _ in range(5)]

    replies = against(handler, ask)
    assert [(reply.status, reply.body) for reply in replies] == [
        (200, b"hello"),
        (422, b"hello"),
        (200, b"hello"),
        (503, b""),
        (200, b"hello"),
    ]
    assert replies[0].headers["x-a"] == "b"
    assert replies[3].headers["retry-after"] == "1"
    assert opened == [2], "kept alive until the server closes"


def test_no_answer_is_told_apart_from_a_late_one() -> None:
    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client gives up

    async def ask(url: str) -> int:
        async with load.connections(url, 1) as (connection,):
            return (await connection.ask(load.encode("GET", "/"), 0.3)).status

    assert against(closes, ask) == load.CLOSED
    assert against(waits, ask) == load.LATE


def test_a_schedule_is_timed_from_when_it_was_due() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(0.2)
            writer.write(LENGTH)

    async def ask(url: str) -> list[Sample]:
        return await load.paced(url, [load.encode("GET", "/a"), load.encode("GET", "/b")], 50, load.after(0.5))

    samples = against(slow, ask)
    assert 10 <= len(samples) <= 26, "it does not wait for the ones before"
    assert all(sample.seconds >= 0.19 for sample in samples)
    assert load.count_by(samples, lambda sample: sample.number).keys() == {0, 1}
    assert load.percentile(samples, 0.5) >= 0.19


# Judges

QUESTIONS = [Question(b"", (1, "main"), 1), Question(b"", (2, "cloud"), 3)]


def sample(due: float, number: int, answer: dict[str, Any] | None = None, status: int = 200, **more: Any) -> Sample:
    body = json.dumps({"degraded": False, "reason": None} | (answer or {})).encode()
    return Sample(due, more.get("seconds", 0.01), number, Reply(status, more.get("headers", {}), body))


MAIN, CLOUD = {"class_id": 1, "exit": "main"}, {"class_id": 2, "exit": "cloud"}
ALONE = {"class_id": 3, "exit": "extension", "degraded": True, "reason": "cloud timed out"}
SOUND = Outage(
    fault="hung",
    edge_only=[sample(0, 0, MAIN)],
    samples=[sample(11, 0, MAIN), sample(12, 1, ALONE), sample(20.5, 1, CLOUD)],
    begin=10,
    healthy=20,
    questions=QUESTIONS,
)


def test_a_sound_outage_keeps_every_bound() -> None:
    assert [bound.name for bound in SOUND.bounds() if not bound.kept] == []
    assert (SOUND.degraded, SOUND.recovery_s) == (1, pytest.approx(0.51))


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (sample(12, 1, ALONE, status=503), "failed requests"),
        (sample(12, 1, ALONE, seconds=1.1), "beyond the deadline"),
        (sample(12, 1, ALONE | {"degraded": False}), "wrong or unmarked answers"),
        (sample(12, 1, ALONE | {"reason": None}), "wrong or unmarked answers"),
        (sample(12, 1, ALONE | {"class_id": 2}), "wrong or unmarked answers"),
        (sample(12, 1, CLOUD), "wrong or unmarked answers"),
        (sample(12, 0, MAIN | {"class_id": 2}), "wrong or unmarked answers"),
        (sample(26, 1, ALONE), "wrong or unmarked answers"),
        (sample(12, 0, MAIN, seconds=0.5), "p99, ratio to edge-only"),
    ],
)
def test_each_fault_of_an_outage_is_found(bad: Sample, name: str) -> None:
    found = dataclasses.replace(SOUND, samples=[*SOUND.samples, bad])
    assert name in [bound.name for bound in found.bounds() if not bound.kept]


def test_a_cloud_that_does_not_come_back_is_found() -> None:
    found = dataclasses.replace(SOUND, samples=SOUND.samples[:2])
    assert [bound.name for bound in found.bounds() if not bound.kept] == ["recovery, s"]


REFUSED = {"status": 503, "headers": {"retry-after": "1"}}


@pytest.mark.parametrize(
    ("bad", "held", "name"),
    [
        (sample(1, 0, status=load.LATE), [1] * 8, "neither answered nor refused"),
        (sample(1, 0, status=500), [1] * 8, "neither answered nor refused"),
        (sample(1, 0, seconds=1.2), [1] * 8, "answered beyond the deadline"),
        (sample(1, 0, status=503), [1] * 8, "refused without Retry-After"),
        (sample(1, 0, seconds=1.0, **REFUSED), [1] * 8, "p99 of refusals, s"),
        (sample(1, 0), [1] * 6 + [2**28] * 2, "growth, MB"),
    ],
)
def test_each_fault_under_overload_is_found(bad: Sample, held: list[int], name: str) -> None:
    sound = Overload(10, [sample(1, 0), sample(1, 0, **REFUSED)], [1] * 8)
    assert [bound.name for bound in sound.bounds() if not bound.kept] == []
    found = Overload(10, [*sound.samples, bad], held)
    assert [bound.name for bound in found.bounds() if not bound.kept] == [name]


@pytest.mark.parametrize(
    ("last", "says"), [({7: 1, 9: 2**28}, "replica 9 has grown"), ({7: 1}, "the replicas were"), ({7: 1, 9: 1}, None)]
)
def test_a_replica_that_is_lost_or_grows_is_found(last: dict[int, int], says: str | None) -> None:
    found = hostile.lost_or_grown([(0, {7: 1, 9: 1}), (500, {7: 1, 9: 1}), (1000, last)])
    assert [one[: len(says or "")] for one in found] == ([says] if says else [])


@pytest.mark.parametrize("page", [["--page", "/somewhere/page.md"], ["--page=/somewhere/page.md"], []])
def test_the_command_on_a_page_names_no_place_of_its_machine(page: list[str]) -> None:
    flags = serving.Flags(data="parquet:/data/cifar100/test.parquet", peers_venv=Path("/somewhere/peers"))
    words = ["--data", flags.data, *page, "--peers-venv", "/somewhere/peers", "--rounds", "1"]
    quoted = "python -m benchmarks.serving --data parquet:test.parquet --peers-venv DIR --rounds 1"
    assert serving.command(flags, words) == quoted
