"""The Open Inference Protocol v2 over HTTP, JSON and binary tensors, without a web framework.

Sources: https://github.com/kserve/open-inference-protocol (the protocol), and for binary tensors
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.

Input `image`: BYTES (N), each a PNG or JPEG (in JSON: base64); or UINT8 (N, H, W, C), pixels. Outputs, each of N
elements: class_id INT64, class_name BYTES, exit BYTES, confidence FP32, entropy FP32 (NaN, in JSON null, where the main
exit's logits were not finite), degraded BOOL, reason BYTES.
"""

import base64
import binascii
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_apps import json_size
from serve_apps.http import Answer

HEADER_LENGTH = "Inference-Header-Content-Length"
PARAMETERS = ("edge_only", "threshold", "deadline_ms")
"""Of a request, as the query parameters of /v1."""
_OUTPUTS = {
    "class_id": "INT64",
    "class_name": "BYTES",
    "exit": "BYTES",
    "confidence": "FP32",
    "entropy": "FP32",
    "degraded": "BOOL",
    "reason": "BYTES",
}
_TYPES = {"INT64": "<i8", "FP32": "<f4", "BOOL": "?"}


class RefusedError(ValueError):
    """The request is not of the protocol; the message says what is wrong."""


@dataclass(frozen=True)
class Request:
    """An inference request, read and checked."""

    id: str | None
    """Handed back."""
    encoded: list[bytes] | None
    """N images as files, or"""
    pixels: NDArray[np.uint8] | None
    """(N, H, W, C)."""
    parameters: dict[str, Any]
    """Those of `PARAMETERS` that were given."""
    outputs: dict[str, bool]
    """Wanted outputs, in order, and whether each is to be binary."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.encoded if self.encoded is not None else self.pixels if self.pixels is not None else [])


@dataclass(frozen=True)
class Response:
    """What goes back."""

    body: bytes
    header_length: int | None
    """Of the JSON part, where binary tensors follow it."""
    headers: dict[str, str] = field(default_factory=dict)
    """For the HTTP response."""


def model_metadata(name: str, version: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """`GET /v2/models/NAME`; shape is (H, W, C) of the pixels that the model takes."""
    return {
        "name": name,
        "versions": [str(version)],
        "platform": "meanet_ray_serve",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1], "parameters": {"uint8_shape": [-1, *shape]}}],
        "outputs": [{"name": output, "datatype": kind, "shape": [-1]} for output, kind in _OUTPUTS.items()],
    }


def read(body: bytes, header_length: str | None, limit: int) -> Request:
    """Read a request.

    Args:
        body: of the HTTP request.
        header_length: value of `Inference-Header-Content-Length`, if there is one: binary tensors follow the JSON.
        limit: images at most.

    Raises:
        RefusedError: it is not of the protocol, or has more images.
    """
    cut = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length) > len(body):
            raise RefusedError(f"{HEADER_LENGTH} is {header_length!r} and the body has {len(body)} bytes")
        cut = int(header_length)
    try:
        plain = json_size.loads(body[:cut])
    except json_size.CrowdedError as error:
        raise RefusedError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body's JSON cannot be read: {error}") from error
    if not isinstance(plain, dict):
        raise RefusedError("the body's JSON is no object")
    tensor = _only_input(plain)
    encoded, pixels = _tensor(tensor, body[cut:], limit)
    return Request(
        id=None if plain.get("id") is None else str(plain["id"]),
        encoded=encoded,
        pixels=pixels,
        parameters=_parameters(plain),
        outputs=_wanted(plain),
    )


def _object(plain: Any, what: str) -> dict[str, Any]:
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise RefusedError(f"{what} is no object")
    return plain


def _list(plain: Any, what: str) -> list[Any]:
    if not isinstance(plain, list):
        raise RefusedError(f"{what} is no list")
    return plain


def _only_input(plain: dict[str, Any]) -> dict[str, Any]:
    inputs = _list(plain.get("inputs"), "inputs")
    if len(inputs) != 1 or not isinstance(inputs[0], dict) or inputs[0].get("name") != "image":
        raise RefusedError("give one input, named image")
    return inputs[0]


def _parameters(plain: dict[str, Any]) -> dict[str, Any]:
    given = _object(plain.get("parameters"), "parameters")
    found = {name: given[name] for name in PARAMETERS if name in given}
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not (isinstance(value, bool) if name == "edge_only" else number):
            raise RefusedError(
                f"parameter {name} is {value!r}: it must be {'a boolean' if name == 'edge_only' else 'a number'}"
            )
    return found


def _wanted(plain: dict[str, Any]) -> dict[str, bool]:
    everything = _object(plain.get("parameters"), "parameters").get("binary_data_output") is True
    if plain.get("outputs") is None:
        return dict.fromkeys(_OUTPUTS, everything)
    wanted = {}
    for output in _list(plain["outputs"], "outputs"):
        name = _object(output, "an output").get("name")
        if not isinstance(name, str) or name not in _OUTPUTS:
            raise RefusedError(f"there is no output {name!r}: choose from {', '.join(_OUTPUTS)}")
        wanted[name] = (
            _object(output.get("parameters"), "an output's parameters").get("binary_data", everything) is True
        )
    return wanted


def _tensor(tensor: dict[str, Any], binary: bytes, limit: int) -> tuple[list[bytes] | None, NDArray[np.uint8] | None]:
    kind, shape = tensor.get("datatype"), _list(tensor.get("shape"), "the input's shape")
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 <= side < 2**31 for side in shape):
        raise RefusedError(f"the input's shape is {shape}: give whole numbers")
    ranks = {"BYTES": 1, "UINT8": 4}
    if not isinstance(kind, str) or kind not in ranks:
        raise RefusedError(f"the input's datatype is {kind!r}: give BYTES (PNG or JPEG files) or UINT8 (pixels)")
    if len(shape) == 2 and shape[1] == 1 and kind == "BYTES":
        shape = shape[:1]  # clients that batch send (N, 1)
    if len(shape) != ranks[kind]:
        raise RefusedError(f"the input's shape is {shape}: {kind} takes {ranks[kind]} dimensions")
    if not 1 <= shape[0] <= limit:
        raise RefusedError(f"the input holds {shape[0]} images: give 1 to {limit}")
    size = _object(tensor.get("parameters"), "the input's parameters").get("binary_data_size")
    if size is None:
        return _from_json(kind, shape, _list(tensor.get("data"), "the input's data"))
    if size != len(binary):
        raise RefusedError(f"binary_data_size is {size!r} and {len(binary)} bytes follow the JSON")
    if kind == "BYTES":
        return _split(binary, shape[0]), None
    wanted = math.prod(shape)
    if wanted != len(binary):
        raise RefusedError(f"UINT8 of shape {shape} has {wanted} bytes and {len(binary)} follow the JSON")
    return None, np.frombuffer(binary, dtype=np.uint8).reshape(shape)


def _from_json(kind: str, shape: list[int], data: list[Any]) -> tuple[list[bytes] | None, NDArray[np.uint8] | None]:
    if kind == "BYTES":
        if len(data) != shape[0] or not all(isinstance(one, str) for one in data):
            raise RefusedError(f"the input's data has {len(data)} elements: give {shape[0]} strings in base64")
        try:
            return [base64.b64decode(one, validate=True) for one in data], None
        except (binascii.Error, ValueError) as error:
            raise RefusedError(f"the input's data is no base64: {error}") from error
    wanted = math.prod(shape)
    if wanted > json_size.MAX_NUMBERS:
        raise RefusedError(
            f"UINT8 of shape {shape} has {wanted} numbers and the limit in JSON is {json_size.MAX_NUMBERS}: "
            "send fewer images at a time, as files or as a binary tensor"
        )
    try:
        values = np.array(data, dtype=object).ravel()
    except ValueError:  # lists of different lengths
        values = np.zeros(0)
    if len(values) != wanted or not all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255 for value in values
    ):
        raise RefusedError(f"the input's data must hold {wanted} whole numbers of 0..255")
    return None, values.astype(np.uint8).reshape(shape)


def _split(binary: bytes, count: int) -> list[bytes]:
    """BYTES elements, each after its length in four little-endian bytes."""
    found: list[bytes] = []
    place = 0
    while place < len(binary) and len(found) < count:
        if place + 4 > len(binary):
            raise RefusedError("the binary data ends within an element's length")
        (size,) = struct.unpack_from("<I", binary, place)
        if place + 4 + size > len(binary):
            raise RefusedError(f"element {len(found)} of the binary data is to have {size} bytes, and fewer follow")
        found.append(binary[place + 4 : place + 4 + size])
        place += 4 + size
    if len(found) != count or place != len(binary):
        raise RefusedError(f"the binary data does not hold {count} elements")
    return found


def respond(request: Request, answers: Sequence[Answer], name: str, version: int) -> Response:
    """The answers as the protocol's tensors."""
    outputs, tail = [], []
    for output, binary in request.outputs.items():
        kind = _OUTPUTS[output]
        values = [_value(answer, output) for answer in answers]
        described: dict[str, Any] = {"name": output, "datatype": kind, "shape": [len(answers)]}
        if binary:
            data = _binary(kind, values)
            described["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            described["data"] = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
        outputs.append(described)
    plain: dict[str, Any] = {"model_name": name, "model_version": str(version), "outputs": outputs}
    if answers:  # all under the version and policy that the request was admitted under
        plain["model_version"] = str(answers[0].model_version)
        plain["parameters"] = {"policy": answers[0].policy.id, "edge_only": answers[0].policy.edge_only}
    if request.id is not None:
        plain["id"] = request.id
    header = json.dumps(plain).encode()
    if not tail:
        return Response(header, None, {"Content-Type": "application/json"})
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return Response(b"".join([header, *tail]), len(header), headers)


def _value(answer: Answer, output: str) -> Any:
    value = getattr(answer, output)
    if value is None:
        return float("nan") if output == "entropy" else ""
    return value


def _binary(kind: str, values: list[Any]) -> bytes:
    if kind != "BYTES":
        return np.array(values, dtype=_TYPES[kind]).tobytes()
    encoded = [str(value).encode() for value in values]
    return b"".join(struct.pack("<I", len(one)) + one for one in encoded)
