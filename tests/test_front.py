"""What stands before Serve's handling answers what the fast path takes, and is counted where Serve counts."""

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from serve_apps import front
from serve_apps.backlog import Backlog
from serve_apps.edge import OverloadedError


class Counts:
    """Of a replica, as Serve keeps them."""

    def __init__(self) -> None:
        self.now, self.most, self.protocols = 0, 0, set[str]()

    def inc_num_ongoing_requests(self, what: Any) -> None:
        self.now, self.most = self.now + 1, max(self.most, self.now + 1)
        self.protocols.add(f"{what.protocol}{what.is_direct_ingress}")

    def dec_num_ongoing_requests(self, what: Any) -> None:
        self.now -= 1


class Replica:
    """Serve's own handling, behind its middleware for ids."""

    def __init__(self, counts: Any, apart: bool = False) -> None:
        self._metrics_manager, self.handled = counts, list[str]()
        self._user_callable_wrapper = type("Wrapper", (), {"_run_user_code_in_separate_thread": apart})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.handled.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})


class Ids:
    """Serve's innermost middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def ask(app: Any, path: str = "/v1/classify", query: bytes = b"", request_id: bytes = b"") -> dict[str, Any]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"no image"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"x-request-id", request_id)] if request_id else []
    scope = {"type": "http", "method": "POST", "path": path, "query_string": query, "headers": headers}
    await app(scope, receive, send)
    return dict(sent[0])


class Refusing:
    """A service."""

    served = type("Served", (), {"policy": None})

    async def answer(self, *_: Any) -> Any:
        raise OverloadedError("so much waits", 2.5)


def test_the_fast_path_is_answered_and_counted_without_serves_handling(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts()
    replica = Replica(counts)
    monkeypatch.setattr(front, "service_here", Refusing)
    direct = front.Direct(Ids(replica.handle))

    async def test() -> None:
        start = await ask(direct, request_id=b"mine")
        assert (start["status"], replica.handled) == (503, [])
        headers = [(name, value) for name, value in start["headers"] if name in (b"x-request-id", b"retry-after")]
        assert sorted(headers) == [(b"retry-after", b"3"), (b"x-request-id", b"mine")], "once"
        assert (counts.now, counts.most, counts.protocols) == (0, 1, {"RequestProtocol.HTTPTrue"})
        await ask(direct, "/v1/classify/batch")
        await ask(direct, query=b"threshold=much")
        assert replica.handled == ["/v1/classify/batch", "/v1/classify"], "what it does not take is Serve's"
        assert counts.most == 1, "which counts itself"

    asyncio.run(test())


@pytest.mark.parametrize(("counts", "apart"), [(None, False), (object(), False), (Counts(), True)])
def test_where_serves_counts_or_its_loop_cannot_be_reached_serve_handles_all(counts: Any, apart: bool) -> None:
    replica = Replica(counts, apart)
    asyncio.run(ask(front.Direct(Ids(replica.handle))))
    asyncio.run(ask(front.Direct(replica.handle)))
    assert replica.handled == ["/v1/classify"] * 2


def test_the_gate_is_outermost() -> None:
    assert [one.cls for one in front.middlewares()] == [front.Direct, front.Front]


class Served:
    """A replica's server."""

    def __init__(self, server: Any) -> None:
        self._direct_ingress_http_server = server


def test_connections_that_came_together_are_taken_in_at_once_and_answered() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def test() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        assert front._protocol_of(Served(server)) is None, "not yet"
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        protocol = front._protocol_of(Served(server))
        assert protocol is not None
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]  # the loop does not turn meanwhile
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            client.setblocking(False)
        backlog = Backlog(port)
        assert len(backlog) == 20
        taken = backlog.accept(15, protocol)
        assert (len(taken), len(backlog)) == (15, 5)
        taken += backlog.accept(15, protocol)
        assert (len(taken), len(backlog)) == (20, 0), "no more than there are"
        loop = asyncio.get_running_loop()
        for client in clients:
            assert (await asyncio.wait_for(loop.sock_recv(client, 1000), 5)).startswith(b"HTTP/1.1 200")
        assert len(server.server_state.connections) == 20, "the server knows them as its own, to end them"
        for client in clients:
            client.close()
        server.should_exit = True
        assert front._protocol_of(Served(server)) is None, "not any more"
        await serving
        assert backlog.accept(1, protocol) == [], "its socket is closed"

    asyncio.run(test())


@pytest.mark.parametrize("replica", [None, object(), Served(None), Served("another server")])
def test_where_serves_server_cannot_be_reached_the_event_loop_accepts_alone(replica: Any) -> None:
    assert front._protocol_of(replica) is None
