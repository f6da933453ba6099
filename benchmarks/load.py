"""A small HTTP/1.1 client and two kinds of load: little CPU a request, so that it leaves the cores to what is measured.

Closed loop: each of N connections asks again once it is answered. Paced: requests start on a schedule, whether the ones
before are answered or not, and are timed from when they were due, so that a server that stalls cannot hide it.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np

CLOSED, LATE = 0, -1
"""In place of a status: the server closed the connection without an answer; it did not answer in time."""
Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    """Of HTTP, or CLOSED, or LATE."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case."""
    body: bytes = b""


@dataclass(frozen=True)
class Sample:
    """One request of a load."""

    due: float
    """When it was to start, on the monotonic clock, s."""
    seconds: float
    """From then to the whole answer."""
    number: int
    """Which of the given requests it was."""
    reply: Reply


def encode(method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """A request as bytes, to be sent as often as wanted."""
    lines = [f"{method} {target} HTTP/1.1", "host: meanet", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request under way; opened anew where the server has closed it."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = address.hostname or "127.0.0.1", address.port or 80
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._arrived: asyncio.Future[None] | None = None
        self._open = False

    async def ask(self, request: bytes, timeout_s: float) -> Reply:
        """Send a request; after LATE or CLOSED the next one takes a new connection."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(request)
        except TimeoutError:
            self.close()
            return Reply(LATE)
        except OSError:
            self.close()
            return Reply(CLOSED)

    async def _ask(self, request: bytes) -> Reply:
        if not self._open:
            self._buffer.clear()
            await asyncio.get_running_loop().create_connection(lambda: self, *self._address)
        assert self._transport is not None, "connection_made has set it"
        self._transport.write(request)
        while (reply := self._parsed()) is None:
            if not self._open:
                return Reply(CLOSED)
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        if reply.headers.get("connection", "").lower() == "close":
            self.close()
        return reply

    def close(self) -> None:
        """End it; the next request opens another."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of the protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._open = transport, True

    def data_received(self, data: bytes) -> None:
        """Of the protocol."""
        self._buffer += data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Of the protocol."""
        self._open = False
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _parsed(self) -> Reply | None:
        """The answer if it is whole, taken from the buffer."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *rest = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body, stop = _dechunked(self._buffer, end + 4)
        else:
            stop = end + 4 + int(headers.get("content-length", "0"))
            body = bytes(self._buffer[end + 4 : stop]) if len(self._buffer) >= stop else None
        if body is None:
            return None
        del self._buffer[:stop]
        return Reply(int(first.split()[1]), headers, body)


def _dechunked(data: bytearray, place: int) -> tuple[bytes | None, int]:
    """The body and where it ends; None while it is not whole."""
    parts = []
    while (end := data.find(b"\r\n", place)) >= 0:
        size = int(data[place:end].split(b";")[0], 16)
        place = end + 2 + size + 2
        if len(data) < place:
            break
        if not size:
            return b"".join(parts), place
        parts.append(bytes(data[end + 2 : place - 2]))
    return None, 0


@asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[list[Connection]]:
    """So many connections, closed in the end."""
    made = [Connection(url) for _ in range(count)]
    try:
        yield made
    finally:
        for connection in made:
            connection.close()
        await asyncio.sleep(0)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Python's collector would look through all samples, again and again: a third of a second in which nothing is sent,
    and what is due then comes at once."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


async def closed_loop(
    url: str, requests: Sequence[bytes], count: int, stop: asyncio.Event, timeout_s: float = 10
) -> list[Sample]:
    """Load by `count` connections, each with one request under way, which take turns at the given requests."""
    samples, numbers = list[Sample](), _numbers(len(requests))

    async def work(connection: Connection) -> None:
        while not stop.is_set():
            started, number = time.monotonic(), next(numbers)
            reply = await connection.ask(requests[number], timeout_s)
            samples.append(Sample(started, time.monotonic() - started, number, reply))

    with _without_collecting():
        async with connections(url, count) as made:
            await asyncio.gather(*(work(connection) for connection in made))
    return samples


async def paced(
    url: str, requests: Sequence[bytes], per_second: float, stop: asyncio.Event, timeout_s: float = 10
) -> list[Sample]:
    """Load on a schedule, over as many connections as that takes."""
    samples, numbers = list[Sample](), _numbers(len(requests))
    idle, made = list[Connection](), list[Connection]()

    async def one(due: float, number: int) -> None:
        if not idle:
            idle.append(Connection(url))
            made.append(idle[-1])
        connection = idle.pop()
        reply = await connection.ask(requests[number], timeout_s)
        samples.append(Sample(due, time.monotonic() - due, number, reply))
        idle.append(connection)

    with _without_collecting():
        async with asyncio.TaskGroup() as group:
            begin, step = time.monotonic(), 0
            while not stop.is_set():
                due, step = begin + step / per_second, step + 1
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(one(due, next(numbers)))
    for connection in made:
        connection.close()
    await asyncio.sleep(0)
    return samples


def after(seconds: float) -> asyncio.Event:
    """An event that is set in so many seconds."""
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return stop


def _numbers(count: int) -> Iterator[int]:
    number = 0
    while True:
        yield number
        number = (number + 1) % count


def percentile(samples: Sequence[Sample], share: float) -> float:
    """Of the seconds; NaN where there are no samples."""
    return float(np.quantile([sample.seconds for sample in samples], share)) if samples else float("nan")


def count_by(samples: Sequence[Sample], mark: Callable[[Sample], Mark]) -> dict[Mark, int]:
    """How many samples have each mark."""
    found: dict[Mark, int] = {}
    for sample in samples:
        found[mark(sample)] = found.get(mark(sample), 0) + 1
    return found
