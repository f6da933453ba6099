"""What a replica that is behind refuses, before it reads a body."""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from serve_apps import gate
from serve_apps.gate import ALWAYS, MAX_BYTES, MAX_LAG_S, Gate


class App:
    """Reads the body, then waits until it may answer."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.read: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.read.append(len((await receive())["body"]))
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(through: Gate, body: bytes = b"abc", announced: int | None = 3, method: str = "POST") -> Any:
    """(status, headers) of the answer."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"accept", b"*/*")] + ([(b"content-length", b"%d" % announced)] if announced is not None else [])
    await through({"type": "http", "method": method, "headers": headers}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def run(test: Callable[[App, Gate, list[float]], Any]) -> None:
    async def inside() -> None:
        app, now = App(), [0.0]
        await test(app, Gate(app, clock=lambda: now[0]), now)

    asyncio.run(inside())


async def in_hand(app: App, through: Gate, count: int, **request: Any) -> list["asyncio.Task[Any]"]:
    tasks = [asyncio.ensure_future(ask(through, **request)) for _ in range(count)]
    while len(app.read) < count:
        await asyncio.sleep(0)
    return tasks


def test_a_loop_that_is_behind_refuses_at_once_and_recovers() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        tasks = await in_hand(app, through, ALWAYS)
        now[0] += MAX_LAG_S + 0.1  # the loop has not turned for so long
        status, headers = await ask(through)
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert len(app.read) == ALWAYS, "its body was not read"
        await asyncio.sleep(3 * gate._BEAT_S)
        assert through.lag_s == 0.0, "it turns again"
        app.may_answer.set()
        assert (await ask(through))[0] == 200
        assert [status for status, _ in await asyncio.gather(*tasks)] == [200] * ALWAYS

    run(test)


def test_few_requests_are_taken_however_far_behind() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        tasks = await in_hand(app, through, ALWAYS - 1)
        now[0] += 10
        app.may_answer.set()
        assert (await ask(through))[0] == 200
        await asyncio.gather(*tasks)

    run(test)


def test_questions_without_a_body_are_never_refused() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        tasks = await in_hand(app, through, ALWAYS)
        now[0] += 10
        app.may_answer.set()
        assert (await ask(through, method="GET"))[0] == 200, "health checks among them"
        await asyncio.gather(*tasks)

    run(test)


def test_bodies_in_hand_are_bounded_announced_or_not() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        tasks = await in_hand(app, through, 3, announced=MAX_BYTES // 4)
        tasks += [asyncio.ensure_future(ask(through, body=b"x" * (MAX_BYTES // 4 - 5), announced=None))]
        while len(app.read) < 4:
            await asyncio.sleep(0)
        assert (await ask(through, announced=6))[0] == 503
        app.may_answer.set()
        assert (await ask(through, announced=5))[0] == 200
        assert (await ask(through, announced=2**40))[0] == 200, "which the application refuses unread, as too long"
        await asyncio.gather(*tasks)
        assert (await ask(through, announced=MAX_BYTES // 4))[0] == 200, "what is answered is no longer in hand"
        assert through._bytes == through._requests == 0

    run(test)


def test_nothing_ticks_while_nothing_is_in_hand() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        app.may_answer.set()
        await ask(through)
        await asyncio.sleep(2 * gate._BEAT_S)
        now[0] += 100
        assert through.lag_s == 0.0

    run(test)
