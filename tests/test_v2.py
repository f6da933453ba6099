"""The Open Inference Protocol v2 as bytes: what is read, what is written, what is refused."""

import base64
import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.http import Answer, AppliedPolicy, Joules, Milliseconds, ServedBy
from serve_apps.v2 import RefusedError, model_metadata, read, respond

LIMIT = 8


def body(tensor: dict[str, Any], binary: bytes = b"", **rest: Any) -> tuple[bytes, str | None]:
    header = json.dumps({"inputs": [{"name": "image", **tensor}], **rest}).encode()
    return header + binary, str(len(header)) if binary else None


def lengths(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def answer(class_id: int, entropy: float | None = 0.5) -> Answer:
    return Answer(
        class_id=class_id,
        class_name=f"c{class_id}",
        exit="main",
        confidence=0.75,
        entropy=entropy,
        degraded=class_id == 2,
        reason="cloud timed out" if class_id == 2 else None,
        joules=Joules(edge_compute=0, upload=0, source="modelled:x"),
        ms=Milliseconds(edge=1, cloud=0, upload=0, upload_modelled=0),
        model_version=3,
        policy=AppliedPolicy(id="p", gate="margin", thresholds=[0.1], edge_only=False),
        served_by=ServedBy(edge="here", cloud=None),
    )


def test_files_in_json_and_in_binary_are_the_same() -> None:
    files = [b"\x89PNG one", b"two"]
    plain = body({"datatype": "BYTES", "shape": [2], "data": [base64.b64encode(one).decode() for one in files]})
    raw = lengths(*files)
    binary = body({"datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(raw)}}, raw)
    for message in (plain, binary):
        found = read(*message, LIMIT)
        assert found.encoded == files
        assert (found.count, found.pixels, found.id) == (2, None, None)


def test_pixels_in_json_and_in_binary_are_the_same() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 3, 2)
    shape = {"datatype": "UINT8", "shape": list(pixels.shape)}
    for data in (pixels.tolist(), pixels.ravel().tolist()):
        found = read(*body({**shape, "data": data}), LIMIT)
        np.testing.assert_array_equal(found.pixels, pixels)
    binary = body({**shape, "parameters": {"binary_data_size": 24}}, pixels.tobytes(), id="a7")
    found = read(*binary, LIMIT)
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.id == "a7"


def test_parameters_and_wanted_outputs() -> None:
    tensor = {"datatype": "BYTES", "shape": [1], "data": ["YQ=="]}
    outputs = [{"name": "exit"}, {"name": "class_id", "parameters": {"binary_data": True}}]
    found = read(*body(tensor, parameters={"edge_only": True, "threshold": 0.5, "other": 1}, outputs=outputs), LIMIT)
    assert found.parameters == {"edge_only": True, "threshold": 0.5}
    assert found.outputs == {"exit": False, "class_id": True}
    everything = read(*body(tensor, parameters={"binary_data_output": True}), LIMIT)
    assert all(everything.outputs.values())


def test_answers_as_json() -> None:
    request = read(*body({"datatype": "BYTES", "shape": [1], "data": ["YQ=="]}, id="x"), LIMIT)
    response = respond(request, [answer(1), answer(2, None)], "meanet", 3)
    plain = json.loads(response.body)
    assert (plain["model_name"], plain["model_version"], plain["id"]) == ("meanet", "3", "x")
    columns = {output["name"]: output for output in plain["outputs"]}
    assert columns["class_id"] == {"name": "class_id", "datatype": "INT64", "shape": [2], "data": [1, 2]}
    assert columns["entropy"]["data"] == [0.5, None]
    assert columns["reason"]["data"] == ["", "cloud timed out"]
    assert response.header_length is None


def test_answers_as_binary_tensors() -> None:
    tensor = {"datatype": "BYTES", "shape": [1], "data": ["YQ=="]}
    request = read(*body(tensor, parameters={"binary_data_output": True}), LIMIT)
    response = respond(request, [answer(1), answer(2, None)], "meanet", 3)
    assert response.header_length is not None
    assert response.headers["Inference-Header-Content-Length"] == str(response.header_length)
    place, found = response.header_length, {}
    for output in json.loads(response.body[:place])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = response.body[place : place + size]
        place += size
    assert place == len(response.body)
    assert np.frombuffer(found["class_id"], "<i8").tolist() == [1, 2]
    np.testing.assert_equal(np.frombuffer(found["entropy"], "<f4"), np.float32([0.5, np.nan]))
    assert np.frombuffer(found["degraded"], "?").tolist() == [False, True]
    assert found["class_name"] == lengths(b"c1", b"c2")


def test_metadata_names_what_is_read_and_written() -> None:
    found = model_metadata("meanet", 3, (8, 8, 1))
    assert found["versions"] == ["3"]
    assert [one["name"] for one in found["inputs"]] == ["image"]
    request = read(*body({"datatype": "BYTES", "shape": [1], "data": ["YQ=="]}), LIMIT)
    assert list(request.outputs) == [one["name"] for one in found["outputs"]]


FILE = {"datatype": "BYTES", "shape": [1], "data": ["YQ=="]}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ((b"{", None), "cannot be read"),
        ((b"[1]", None), "no object"),
        ((b"{}", None), "inputs is no list"),
        ((b'{"inputs": []}', None), "one input, named image"),
        ((b'{"inputs": []}', "90"), "Inference-Header-Content-Length is '90' and the body has 14"),
        ((b'{"inputs": []}', "-3"), "Inference-Header-Content-Length is '-3'"),
        (body({**FILE, "name": "picture"}), "named image"),
        (body({**FILE, "datatype": "FP64"}), "datatype is 'FP64'"),
        (body({**FILE, "datatype": ["BYTES"]}), "datatype is"),
        (body({**FILE, "shape": [1, 2]}), "BYTES takes 1 dimensions"),
        (body({**FILE, "shape": ["1"]}), "whole numbers"),
        (body({**FILE, "shape": [9]}), "holds 9 images: give 1 to 8"),
        (body({**FILE, "shape": [0]}), "holds 0 images"),
        (body({**FILE, "shape": [2]}), "has 1 elements: give 2"),
        (body({**FILE, "data": ["no base64!"]}), "no base64"),
        (body({**FILE, "data": None}), "data is no list"),
        (body({"datatype": "UINT8", "shape": [1, 1, 1, 2], "data": [1, 256]}), "2 whole numbers of 0..255"),
        (body({"datatype": "UINT8", "shape": [1, 1, 2, 1], "data": [[1], [2, 3]]}), "2 whole numbers of 0..255"),
        (body({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2]}), "3 whole numbers"),
        (body({**FILE, "parameters": {"binary_data_size": 9}}, b"abc"), "binary_data_size is 9 and 3 bytes follow"),
        (body({**FILE, "parameters": {"binary_data_size": 3}}, b"abc"), "ends within an element's length"),
        (body({**FILE, "parameters": {"binary_data_size": 6}}, b"\xff\0\0\0ab"), "is to have 255 bytes"),
        (body({**FILE, "parameters": {"binary_data_size": 10}}, lengths(b"a", b"b")), "does not hold 1 elements"),
        (body(FILE, parameters={"edge_only": 1}), "edge_only is 1: it must be a boolean"),
        (body(FILE, parameters={"threshold": "low"}), "threshold is 'low': it must be a number"),
        (body(FILE, parameters=[1]), "parameters is no object"),
        (body(FILE, outputs=[{"name": "logits"}]), "no output 'logits'"),
        (body(FILE, outputs=["exit"]), "an output is no object"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused(message: tuple[bytes, str | None], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        read(*message, LIMIT)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=4)))
def test_any_bytes_are_read_or_refused(message: bytes, header: str | None) -> None:
    with contextlib.suppress(RefusedError):
        read(message, header, LIMIT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "datatype": st.sampled_from(["BYTES", "UINT8"]) | JSON,
            "shape": st.lists(st.integers(-1, 3), max_size=5) | JSON,
            "data": JSON,
            "parameters": st.dictionaries(st.just("binary_data_size"), st.integers(-1, 20)) | JSON,
        },
    ),
    JSON,
    JSON,
    st.binary(max_size=20),
)
def test_any_json_is_read_or_refused(tensor: dict[str, Any], parameters: Any, outputs: Any, binary: bytes) -> None:
    plain = {"inputs": [{"name": "image", **tensor}], "parameters": parameters, "outputs": outputs}
    header = json.dumps(plain).encode()
    with contextlib.suppress(RefusedError):
        read(header + binary, str(len(header)), LIMIT)
