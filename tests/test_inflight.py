"""Held bodies are bounded in bytes."""

import asyncio
from typing import Any

import httpx

from serve_apps.http import MAX_BATCH_BYTES
from serve_apps.inflight import InFlight


def test_what_would_fill_memory_is_refused_at_once_and_taken_again_afterwards() -> None:
    async def run() -> None:
        go_on = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/fails":
                raise KeyError("a handler's own fault")
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        app = InFlight(slow, 1000)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            held = [asyncio.ensure_future(client.post("/", content=bytes(400))) for _ in range(2)]
            while app.held < 800:
                await asyncio.sleep(0)
            refused = await client.post("/", content=bytes(201))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["detail"].startswith("overloaded: bodies of 800 bytes")
            small = asyncio.ensure_future(client.post("/", content=bytes(200)))
            reading = asyncio.ensure_future(client.get("/"))
            go_on.set()
            answers = await asyncio.gather(*held, small, reading)
            assert {answer.status_code for answer in answers} == {200}
            assert app.held == 0
            assert (await client.post("/", content=bytes(5000))).status_code == 200, "an idle server takes the largest"
            try:
                await client.post("/fails", content=bytes(900))
            except KeyError:
                assert app.held == 0

    asyncio.run(run())


def test_a_body_of_unknown_length_counts_as_the_largest() -> None:
    seen: list[int] = []

    async def run() -> None:
        async def look(scope: Any, receive: Any, send: Any) -> None:
            seen.append(app.held)

        app = InFlight(look)
        for headers in ([], [(b"content-length", b"12")], [(b"content-length", b"9" * 20)]):
            await app({"type": "http", "method": "POST", "headers": headers}, None, None)  # type: ignore[arg-type]

    asyncio.run(run())
    assert seen == [MAX_BATCH_BYTES, 12, MAX_BATCH_BYTES]
