"""JSON with more structure than any request has is refused before it is read, at both endpoints that take JSON."""

import asyncio
import base64
import copy
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import HTTPException
from ray import serve

from benchmarks import strangers
from serve_apps import invocations, v2
from serve_apps.graph import api
from serve_apps.http import MAX_BATCH_IMAGES
from serve_apps.json_size import MAX_NUMBERS

CROWDS = [
    (b"[" + b",".join([b"0"] * (2**20 + 2)) + b"]", "1048577 times ',' and the limit is 1048576"),
    (b"[" + b",".join([b"[]"] * 2**18) + b"]", "262145 times '[' and the limit is 262144"),
    (b"[" + b",".join([b"{}"] * (2**14 + 1)) + b"]", "16385 times '{' and the limit is 16384"),
    (b"{" + b",".join([b'"a":0'] * (2**16 + 1)) + b"}", "65537 times ':' and the limit is 65536"),
]


def by_v2(body: bytes) -> Any:
    return v2.read(body, None, MAX_BATCH_IMAGES)


def by_v2_before_a_tensor(body: bytes) -> Any:
    return v2.read(body + b",,,", str(len(body)), MAX_BATCH_IMAGES)


def by_mlflow(body: bytes) -> Any:
    return invocations.read(body, "application/json", MAX_BATCH_IMAGES)


@pytest.mark.parametrize(("body", "says"), CROWDS)
@pytest.mark.parametrize("read", [by_v2, by_v2_before_a_tensor, by_mlflow])
def test_crowded_json_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[bytes], Any], body: bytes, says: str
) -> None:
    def loads(_text: object, **_how: object) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises((v2.RefusedError, HTTPException)) as refused:
        read(body)
    assert says in str(refused.value)
    assert "binary tensor" in str(refused.value)
    assert getattr(refused.value, "status_code", 413) == 413


@pytest.mark.parametrize(
    ("number", "count", "says"),
    [
        (b"9" * 41, 1, "a whole number of 41 digits: give 40 at most"),
        (b"-" + b"9" * 4000, 1, "a whole number of 4001 digits"),
        (b"0.5", 2**14 + 1, "16385 numbers with a fraction or an exponent and the limit is 16384"),
        (b"1e5", 2**14 + 1, "16385 numbers with"),
    ],
)
@pytest.mark.parametrize("read", [by_v2, by_mlflow])
def test_dear_numbers_are_refused(read: Callable[[bytes], Any], number: bytes, count: int, says: str) -> None:
    with pytest.raises((v2.RefusedError, HTTPException)) as refused:
        read(b"[" + b",".join([number] * count) + b"]")
    assert says in str(refused.value)


@pytest.mark.parametrize("crowd", [crowd for crowd, _ in CROWDS])
def test_what_follows_the_json_of_a_binary_tensor_is_not_counted(crowd: bytes) -> None:
    size = len(crowd)
    tensor = {"datatype": "UINT8", "shape": [1, 1, size, 1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [{"name": "image", **tensor}]}).encode()
    found = v2.read(head + crowd, str(len(head)), 1)
    assert found.pixels is not None
    assert found.pixels.tobytes() == crowd


def test_largest_batches_are_read() -> None:
    shapes: list[tuple[tuple[int, ...], Callable[[Any], Any]]] = [
        ((MAX_BATCH_IMAGES, 8, 8, 1), np.ndarray.tolist),
        ((240, 32, 32, 3), np.ndarray.tolist),
        ((341, 32, 32, 3), lambda pixels: pixels.ravel().tolist()),
    ]
    for shape, plain in shapes:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        tensor = {"name": "image", "datatype": "UINT8", "shape": list(shape), "data": plain(pixels)}
        found = by_v2(json.dumps({"inputs": [tensor]}, indent=1).encode())
        np.testing.assert_array_equal(found.pixels, pixels)
    text = base64.b64encode(bytes(range(256)) * 80).decode()
    many = [text] * MAX_BATCH_IMAGES
    files = {"name": "image", "datatype": "BYTES", "shape": [len(many)], "data": many}
    assert by_v2(json.dumps({"inputs": [files]}).encode()).count == len(many)
    split = {"index": list(range(len(many))), "columns": ["image"], "data": [[one] for one in many]}
    for form in ({"dataframe_split": split}, {"dataframe_records": [{"image": one} for one in many]}, {"inputs": many}):
        images, _ = by_mlflow(json.dumps(form).encode())
        assert len(images) == len(many)


def test_shape_of_more_numbers_than_json_may_hold_is_refused_before_any_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def message(shape: list[int], data: list[Any]) -> bytes:
        tensor = {"name": "image", "datatype": "UINT8", "shape": shape, "data": data}
        return json.dumps({"inputs": [tensor]}).encode()

    monkeypatch.setattr(v2.np, "array", lambda *_words, **_more: pytest.fail("the numbers are looked at"))
    with pytest.raises(v2.RefusedError, match=rf"has 2097152 numbers and the limit in JSON is {MAX_NUMBERS}: send"):
        by_v2(message([2, 1024, 1024, 1], [0]))


def test_endpoints_refuse_it_and_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = SimpleNamespace(_check_served=lambda name, version: None)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=replica))
    bare = copy.copy(api)
    bare.user_middleware, bare.middleware_stack = [], None
    threads = list[int]()
    for module in (v2, invocations):

        def read(*words: Any, _read: Callable[..., Any] = module.read) -> Any:
            threads.append(threading.get_ident())
            return _read(*words)

        monkeypatch.setattr(module, "read", read)

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(bare), base_url="http://edge") as client:
            paths = ("/v2/models/meanet/infer", "/invocations")
            return [await client.post(path, content=CROWDS[1][0]) for path in paths]

    by_path = asyncio.run(run())
    assert [answer.status_code for answer in by_path] == [400, 413]
    assert all(CROWDS[1][1] in answer.json()["detail"] for answer in by_path)
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_bombardment_has_such_bodies() -> None:
    generator, crowded = np.random.default_rng(1), 0
    for read in (by_v2, by_mlflow) * 20:
        one = strangers._crowded(generator, "/")
        with pytest.raises((v2.RefusedError, HTTPException)) as refused:
            read(one.body)
        crowded += "the body's JSON has" in str(refused.value)
    assert crowded >= 5
    kinds = [one.kind for one in strangers.requests((8, 8, 1), 5, 1000)]
    assert "crowded JSON" in kinds
