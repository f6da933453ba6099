"""The fast path answers as FastAPI's route does: the same requests to both, refusals included."""

import asyncio
import copy
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import PATIENT
from ray import serve

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_jpeg, encode_png
from meanet.runtime import CloudRuntime
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.edge import EdgeService
from serve_apps.fast_path import FastPath, as_json, ask, batch_as_json
from serve_apps.graph import api
from serve_apps.http import MAX_IMAGE_BYTES, Answer, AppliedPolicy, BatchAnswer, Joules, Milliseconds, ServedBy
from serve_apps.served import Served
from serve_apps.settings import Settings


def service_of(model: TrainedModel, settings: Settings = PATIENT) -> EdgeService:
    runtime = CloudRuntime(model)

    async def cloud(request: CloudRequest) -> CloudAnswer:
        reading = runtime.run(request.pixels(model.preprocessing))
        return CloudAnswer(reading.pred.tolist(), reading.confidence.tolist())

    return EdgeService(Served.of(model, 3), cloud, settings)


class Both:
    """A client of the fast path before the application, and one of the application alone, over one service."""

    def __init__(self, service: EdgeService, monkeypatch: pytest.MonkeyPatch) -> None:
        async def answer(images: Any, wishes: Any) -> list[Answer]:
            return await ask(service, images, wishes)

        replica = SimpleNamespace(_service=service, answers=answer)
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=replica))
        alone = copy.copy(api)
        alone.user_middleware, alone.middleware_stack = [], None
        self.passed_on = 0

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            self.passed_on += 1
            await alone(scope, receive, send)

        self.fast, self.slow = (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge")
            for app in (FastPath(counted, lambda: service), alone)
        )

    async def send(self, method: str, path: str, **words: Any) -> tuple[httpx.Response, httpx.Response]:
        """The answers of both."""
        content = words.pop("content", b"")
        bodies = [chunked(content) if words.pop("chunked", False) else content for _ in range(2)]
        fast = await self.fast.request(method, path, content=bodies[0], **words)
        return fast, await self.slow.request(method, path, content=bodies[1], **words)


async def chunked(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 1 << 20):
        yield content[start : start + (1 << 20)]


def alike(fast: httpx.Response, slow: httpx.Response) -> None:
    """Field for field; only how long it took may differ."""
    assert fast.status_code == slow.status_code
    assert fast.headers["content-type"] == slow.headers["content-type"]
    assert fast.headers.get("retry-after") == slow.headers.get("retry-after")
    one, two = fast.json(), slow.json()
    if fast.status_code == 200:
        assert list(one) == list(two), "in the same order"
        assert one.pop("ms").keys() == two.pop("ms").keys()
        for row in (one, two):
            row["confidence"], row["entropy"] = (round(row[name], 5) for name in ("confidence", "entropy"))
    assert one == two


def requests_of(bodies: list[bytes], jpeg: bytes) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Method, path, what is sent, and whether the fast path passes it on."""
    good = bodies[0]
    for body in bodies:
        yield "POST", "/v1/classify", {"content": body}, False
    queries = ["?edge_only=true", "?edge_only=false", "?threshold=-1", "?threshold=0.25&edge_only=true"]
    queries += ["?deadline_ms=1500", "?deadline_ms=1500.5&threshold=3"]
    for query in queries:
        yield "POST", f"/v1/classify{query}", {"content": good}, False
    unusual = ["?edge_only=1", "?edge_only=perhaps", "?threshold=nan", "?threshold=1e-3", "?deadline_ms=0"]
    unusual += ["?deadline_ms=-1", "?edge_only=true&edge_only=false", "?nonsense=1", "?threshold=", "?threshold=%31"]
    for query in unusual:
        yield "POST", f"/v1/classify{query}", {"content": good}, True
    bad = [b"", b"no image", good[:40], good[:-5], b"GIF89a" + bytes(50), bytes(1000)]
    for body in (*bad, jpeg, jpeg[: len(jpeg) // 2], encode_png(np.zeros((9, 8, 1), np.uint8))):
        yield "POST", "/v1/classify", {"content": body, "headers": {"content-type": "image/png"}}, False
    for size in (MAX_IMAGE_BYTES, MAX_IMAGE_BYTES + 1):
        yield "POST", "/v1/classify", {"content": bytes(size)}, False
    yield "POST", "/v1/classify", {"content": good, "chunked": True}, False
    yield "GET", "/v1/classify", {}, True
    yield "PUT", "/v1/classify", {"content": good}, True
    yield "POST", "/v1/classify/", {"content": good, "follow_redirects": True}, True


def test_both_paths_answer_alike(model: TrainedModel, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    images = splits.table.images[splits.test[:60]]
    bodies, jpeg = [encode_png(image) for image in images], encode_jpeg(images[0], 90)

    async def run() -> set[int]:
        both, codes = Both(service_of(model), monkeypatch), set()
        for method, path, words, passed_on in requests_of(bodies, jpeg):
            before = both.passed_on
            fast, slow = await both.send(method, path, **words)
            assert (both.passed_on > before) == passed_on, (method, path)
            alike(fast, slow)
            codes.add(fast.status_code)
        return codes

    assert asyncio.run(run()) == {200, 405, 413, 422}


def test_overload_is_refused_alike_and_at_once(
    model: TrainedModel, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = encode_png(splits.table.images[splits.test[0]])

    async def run() -> None:
        service = service_of(model, dataclasses.replace(PATIENT, max_queued=1))
        both = Both(service, monkeypatch)
        held = asyncio.ensure_future(service.answer([body] * 200))
        while not service._batcher.queued:
            await asyncio.sleep(0)
        fast, slow = await both.send("POST", "/v1/classify", content=body)
        assert fast.status_code == 503
        assert int(fast.headers["retry-after"]) >= 1
        assert fast.json()["detail"].startswith("overloaded: ")
        assert (slow.status_code, slow.headers["content-type"]) == (503, fast.headers["content-type"])
        assert len(await held) == 200

    asyncio.run(run())


def test_answers_are_written_as_pydantic_writes_them() -> None:
    names = ["plain", 'a "quoted" \\ name', "Zürich/東京", "tab\there\x07", "line\u2028end"]
    numbers = [0.0, 1.0, 0.1, 1e-9, 1e21, 123456789.123, -0.0, 5e-324]
    answers = [
        Answer(
            class_id=row,
            class_name=names[row % len(names)],
            exit=("main", "extension", "cloud")[row % 3],
            confidence=number,
            entropy=None if row % 2 else number,
            degraded=bool(row % 2),
            reason=f"cloud failed: {names[row % len(names)]}" if row % 2 else None,
            joules=Joules(edge_compute=number, upload=number, source="modelled:a+b"),
            ms=Milliseconds(edge=number, cloud=number, upload=number, upload_modelled=number),
            model_version=row,
            policy=AppliedPolicy(id=f"{row:08x}", gate="two_gate", thresholds=[None, number], edge_only=bool(row % 2)),
            served_by=ServedBy(edge=names[row % len(names)], cloud=None if row % 3 else names[0]),
        )
        for row, number in enumerate(numbers)
    ]
    for answer in answers:
        assert json.loads(as_json(answer)) == json.loads(answer.model_dump_json())
        assert as_json(answer) == as_json(answer.model_copy(deep=True)), "what is kept is what is written"
    assert json.loads(batch_as_json(answers)) == json.loads(BatchAnswer(answers=answers).model_dump_json())
    odd = answers[0].model_copy(update={"entropy": math.nan, "confidence": math.inf})
    assert json.loads(as_json(odd)) == json.loads(odd.model_dump_json()), "what is not finite is null"
