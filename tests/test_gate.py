"""What a replica that is behind refuses, before it reads a body."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_apps import gate
from serve_apps.backlog import Backlog
from serve_apps.gate import ALWAYS, MAX_BACKLOG, MAX_BYTES, MAX_LAG_S, MAX_WAIT_S, Gate


class Edge:
    """What the gate asks of the service."""

    def __init__(self) -> None:
        self.away, self.turned_away, self.answer, self.refusals = 0, 0, ("", 0.0), list[str]()

    def full(self) -> tuple[str, float]:
        return self.answer

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)


class App:
    """Reads the body, then waits until it may answer."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.read: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.read.append(len((await receive())["body"]))
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(
    through: Gate, body: bytes = b"abc", announced: int | None = 3, method: str = "POST", port: int | None = None
) -> Any:
    """(status, headers) of the answer."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"accept", b"*/*")] + ([(b"content-length", b"%d" % announced)] if announced is not None else [])
    await through(scope_of(headers, method, port), receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def scope_of(headers: list[tuple[bytes, bytes]], method: str = "POST", port: int | None = None) -> Scope:
    return {"type": "http", "method": method, "path": "/", "headers": headers, "server": ("127.0.0.1", port)}


def gate_of(app: App, edge: Edge, now: list[float] | None = None) -> Gate:
    service: Any = edge
    return Gate(app, lambda: service, clock=(lambda: now[0]) if now else time.monotonic)


def run(test: Callable[[App, Gate, list[float]], Any]) -> None:
    async def inside() -> None:
        app, now = App(), [0.0]
        await test(app, gate_of(app, Edge(), now), now)

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


def test_bodies_in_hand_are_bounded_as_they_come() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        quarter = bytes(MAX_BYTES // 4)
        tasks = await in_hand(app, through, 3, body=quarter, announced=len(quarter))
        tasks += [asyncio.ensure_future(ask(through, body=quarter[:-5], announced=None))]
        while len(app.read) < 4:
            await asyncio.sleep(0)
        status, headers = await ask(through, announced=6)
        assert (status, len(headers[b"x-request-id"])) == (503, 32)
        app.may_answer.set()
        assert (await ask(through, announced=5))[0] == 200
        assert (await ask(through, announced=2**40))[0] == 200, "which the application refuses unread, as too long"
        await asyncio.gather(*tasks)
        assert (await ask(through, announced=MAX_BYTES // 4))[0] == 200, "what is answered is no longer in hand"
        assert through._bytes == through._requests == through._open == 0

    run(test)


def test_clients_that_announce_much_and_send_nothing_keep_nobody_out() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        stalled, over = [], asyncio.Event()

        async def nothing() -> Message:
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            pass

        async def reading(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()

        inner, through._app = through._app, reading
        for _ in range(200):
            scope = scope_of([(b"content-length", b"%d" % (MAX_BYTES // 4))])
            stalled.append(asyncio.ensure_future(through(scope, nothing, send)))
        await asyncio.sleep(0)
        through._app = inner
        app.may_answer.set()
        assert (await ask(through))[0] == 200
        assert (through._open, through._requests) == (200, 0)
        over.set()
        await asyncio.gather(*stalled)
        assert through._open == 0

    run(test)


@pytest.mark.parametrize("raises", [False, True])
def test_a_long_body_that_finds_no_room_any_more_is_refused_while_it_comes(raises: bool) -> None:
    async def test() -> None:
        edge, sent, piece = Edge(), list[Message](), bytes(2**20)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            while (message := await receive())["type"] == "http.request":
                assert message["more_body"]
            await send({"type": "http.response.start", "status": 500, "headers": []})
            if raises:
                raise ConnectionError("the client is gone")

        async def receive() -> Message:
            return {"type": "http.request", "body": piece, "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        service: Any = edge
        through = Gate(app, lambda: service)
        await through(scope_of([(b"transfer-encoding", b"chunked")]), receive, send)
        assert [message.get("status") for message in sent] == [503, None]
        assert (edge.refusals, through._bytes, through._open) == (["overloaded"], 0, 0)

    asyncio.run(test())


def test_nothing_ticks_while_nothing_is_in_hand() -> None:
    async def test(app: App, through: Gate, now: list[float]) -> None:
        app.may_answer.set()
        await ask(through)
        await asyncio.sleep(2 * gate._BEAT_S)
        now[0] += 100
        assert through.lag_s == 0.0

    run(test)


def test_what_the_blocks_cannot_do_in_time_is_not_read() -> None:
    async def test() -> None:
        app, edge = App(), Edge()
        through = gate_of(app, edge)
        tasks = await in_hand(app, through, ALWAYS)
        edge.answer = ("512 images wait", 2.3)
        status, headers = await ask(through)
        assert (status, headers[b"retry-after"], headers[b"content-length"]) == (503, b"3", b"58")
        assert (len(app.read), edge.refusals) == (ALWAYS, ["overloaded"])
        edge.answer = ("", 0.0)
        app.may_answer.set()
        assert (await ask(through))[0] == 200
        await asyncio.gather(*tasks)

    asyncio.run(test())


def test_the_rate_of_answers_bounds_what_is_in_hand() -> None:
    rate = gate._Rate(guess=30)
    assert rate.seconds(50) == 0.25, "nothing is known: as guessed"
    for _ in range(100):  # 4 answers a beat at full load: 200 a second
        rate.answered = 4
        rate.passed(0.02, busy=True)
    assert 0.24 < rate.seconds(50) < 0.26
    rate.answered = 1
    rate.passed(0.02, busy=False)
    assert 0.24 < rate.seconds(50) < 0.26, "a beat with little in hand says nothing of the rate"
    for _ in range(100):
        rate.passed(0.02, busy=False)
    assert 0.24 < rate.seconds(50) < 0.26
    for _ in range(10):
        rate.answered = 40
        rate.passed(0.02, busy=True)
    assert rate.seconds(50) < 0.06, "and in time the old is forgotten"
    for _ in range(100):
        rate.answered -= 50
        rate.passed(0.02, busy=True)
    assert rate.seconds(50) > 0, "more that was taken off than was there makes no time negative"


def test_requests_that_the_service_turns_away_do_not_count_as_answers() -> None:
    """They are quick: counted, they would say that much more can be in hand than is answered in time."""

    async def test() -> None:
        now, edge = [0.0], Edge()
        app = App()
        through = gate_of(app, edge, now)
        tasks = await in_hand(app, through, 2 * ALWAYS)
        through._pace = gate._Rate(guess=30)
        for _ in range(100):  # 4 answers a beat, and 40 refusals
            through._pace.answered, edge.turned_away = 44, edge.turned_away + 40
            now[0] += 0.02
            through._beat()
        assert through._pace.seconds(50) == pytest.approx(0.25, rel=0.05)
        app.may_answer.set()
        await asyncio.gather(*tasks)

    asyncio.run(test())


def test_answers_that_all_go_out_at_once_count() -> None:
    """64 clients that each send when they are answered: a micro-batch of all takes 0.12 s, and then none is in hand."""

    async def test() -> None:
        now, edge = [0.0], Edge()
        through = gate_of(App(), edge, now)
        assert through._pace.seconds(64) < MAX_WAIT_S, "a micro-batch may be in hand before anything is known"
        through._open = 1
        for _ in range(40):
            for in_hand_then, answered in ((64, 0), (64, 0), (64, 0), (64, 0), (64, 0), (64, 0), (0, 64)):
                through._requests, through._pace.answered = in_hand_then, answered
                now[0] += 0.02
                through._beat()
        through._requests = 0
        assert through._pace.seconds(64) == pytest.approx(0.14, rel=0.15)

    asyncio.run(test())


def test_clients_that_ask_again_before_the_beat_are_not_refused() -> None:
    """64 that begin at once: their first micro-batch takes 0.15 s, in which nothing goes out; then all ask again."""

    async def test() -> None:
        now = [0.0]
        edge: Any = Edge()
        through = gate_of(App(), edge, now)
        through._open = through._requests = 64
        through._beat()
        for _ in range(7):
            now[0] += 0.02
            through._beat()
        assert through._full(edge, 0)[0], "a 65th would have to wait too long, as far as is known"
        now[0] += 0.01
        through._pace.answered += 64
        assert through._full(edge, 0) == ("", 0.0)

    asyncio.run(test())


def test_requests_that_wait_for_the_cloud_are_not_in_hand() -> None:
    async def test() -> None:
        app, edge = App(), Edge()
        through = gate_of(app, edge)
        tasks = await in_hand(app, through, 2 * ALWAYS)
        through._pace = slow = gate._Rate(guess=25)
        slow._all, slow._seconds = 1.0, 10.0  # an answer in ten seconds
        assert 2 * ALWAYS > MAX_WAIT_S
        assert (await ask(through))[0] == 503
        edge.away = ALWAYS + 1
        app.may_answer.set()
        assert (await ask(through))[0] == 200, "the cloud takes their time, not this replica"
        await asyncio.gather(*tasks)

    asyncio.run(test())


def test_connections_that_wait_to_be_accepted_are_counted_and_refused() -> None:
    async def test() -> None:
        app, edge = App(), Edge()
        with socket.create_server(("127.0.0.1", 0), backlog=2 * MAX_BACKLOG) as listener:
            port = listener.getsockname()[1]
            waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(MAX_BACKLOG)]
            backlog = Backlog(port)
            assert len(backlog) == MAX_BACKLOG
            through = gate_of(app, edge)
            tasks = [asyncio.ensure_future(ask(through, port=port)) for _ in range(ALWAYS)]
            while len(app.read) < ALWAYS:
                await asyncio.sleep(0)
            waiting.append(socket.create_connection(("127.0.0.1", port)))
            assert (await ask(through, port=port))[0] == 503
            listener.accept()[0].close()
            through._arrivals._all, through._arrivals._seconds = 100.0, 1.0  # a second's worth and more of them waits
            assert (await ask(through, port=port))[0] == 503
            through._arrivals._all = 1000.0
            app.may_answer.set()
            assert (await ask(through, port=port))[0] == 200
            await asyncio.gather(*tasks)
            listener.close()
            assert len(backlog) == 0, "the server has ended"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            for connection in waiting:
                connection.close()

    asyncio.run(test())
    assert len(Backlog(None)) == 0


def test_what_the_front_has_passed_the_application_does_not_ask_again() -> None:
    async def test() -> None:
        app, edge = App(), Edge()
        inner = gate_of(app, edge)
        outer = Gate(inner, inner._service)
        app.may_answer.set()
        assert (await ask(outer))[0] == 200
        assert inner._backlog is None, "it has looked at nothing"

    asyncio.run(test())


def test_what_waits_to_be_accepted_is_taken_in_at_every_beat() -> None:
    async def test() -> None:
        app, edge, made = App(), Edge(), list[asyncio.Protocol]()

        def protocol() -> asyncio.Protocol:
            made.append(asyncio.Protocol())
            return made[-1]

        service: Any = edge
        through = Gate(app, lambda: service, protocol=lambda: protocol)
        with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:  # which nobody else accepts from
            port = listener.getsockname()[1]
            tasks = await in_hand(app, through, 1, port=port)
            waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
            while len(made) < 100:
                await asyncio.sleep(gate._BEAT_S)
            assert len(Backlog(port)) == 0
            while through._coming:
                await asyncio.sleep(gate._BEAT_S)
            for connection in waiting:
                connection.close()
        app.may_answer.set()
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(test(), 20))
