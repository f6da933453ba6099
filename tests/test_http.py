"""The Serve graph over HTTP: right answers to images, a 4xx with a reason to all else, and a replica that lives on."""

import base64
import contextlib
import http.client
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png
from meanet.routing import Exit
from meanet.runtime import Cascade

pytestmark = pytest.mark.cluster
PNG = {"content-type": "image/png"}
ARROW = {"content-type": "application/vnd.apache.arrow.stream"}


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test]]


def expected(model: TrainedModel, splits: Splits, count: int | None = None) -> list[tuple[int, str]]:
    answers = Cascade(model).classify(splits.table.images[splits.test[:count]])
    return [(int(p), Exit(e).label) for p, e in zip(answers.pred, answers.exit, strict=True)]


def test_every_test_image_is_answered_as_by_the_model(
    client: httpx.Client, model: TrainedModel, splits: Splits, bodies: list[bytes]
) -> None:
    got = [client.post("/v1/classify", content=body, headers=PNG).json() for body in bodies]
    assert [(answer["class_id"], answer["exit"]) for answer in got] == expected(model, splits)
    assert {answer["exit"] for answer in got} == {"main", "extension", "cloud"}
    keys = {"class_id", "class_name", "exit", "confidence", "entropy", "degraded", "reason"}
    assert set(got[0]) == keys | {"joules", "ms", "model_version", "policy", "served_by"}
    assert got[0]["joules"]["source"] == "modelled:horowitz_45nm+wifi"
    assert got[0]["policy"]["thresholds"] == list(model.policy.thresholds)


def arrow(bodies: list[bytes]) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"image": pa.array(bodies, pa.binary())})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return sink.getvalue()


def test_batches_keep_order(client: httpx.Client, model: TrainedModel, splits: Splits, bodies: list[bytes]) -> None:
    wanted = expected(model, splits, 200)
    many = [("image", (f"{n}.png", body, "image/png")) for n, body in enumerate(bodies[:200])]
    for response in (
        client.post("/v1/classify/batch", files=many),
        client.post("/v1/classify/batch", content=arrow(bodies[:200]), headers=ARROW),
    ):
        assert response.status_code == 200, response.text
        assert [(a["class_id"], a["exit"]) for a in response.json()["answers"]] == wanted


def test_jpeg_is_taken(client: httpx.Client, splits: Splits) -> None:
    buffer = io.BytesIO()
    Image.fromarray(splits.table.images[0][..., 0]).save(buffer, "JPEG", quality=95)
    assert client.post("/v1/classify", content=buffer.getvalue()).json()["class_id"] == splits.table.labels[0]


def test_request_may_keep_to_the_edge_or_set_its_threshold(client: httpx.Client, bodies: list[bytes]) -> None:
    for body in bodies[:40]:
        private = client.post("/v1/classify?edge_only=true&threshold=-1", content=body).json()
        assert private["exit"] in ("main", "extension")
        assert private["policy"]["edge_only"] is True
    everything = client.post("/v1/classify?threshold=-1", content=bodies[0]).json()
    assert everything["exit"] == "cloud"
    assert everything["policy"]["thresholds"] == [-1.0]
    assert everything["joules"]["upload"] > 0


def test_model_health_and_openapi(client: httpx.Client, model: TrainedModel) -> None:
    described = client.get("/v1/model").json()
    assert described["recipe"] == "digits"
    assert described["input"] == {"height": 8, "width": 8, "channels": 1}
    assert described["operating_point"] == model.operating_point
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) >= {"/v1/classify", "/v1/classify/batch", "/v1/model", "/healthz"}
    assert set(paths["/v1/classify"]["post"]["requestBody"]["content"]) == {"image/png", "image/jpeg"}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"this is no image", "no readable PNG or JPEG"),
        (encoded(np.arange(64, dtype=np.uint8).reshape(8, 8))[:50], "no readable PNG or JPEG"),
        (encoded(np.zeros((8, 8), np.uint8), "GIF"), "no readable PNG or JPEG"),
        (png_header(60_000, 60_000), "60000x60000|no readable"),
        (png_header(2_000_000_000, 2_000_000_000), "no readable|2000000000"),
        (encoded(np.zeros((8, 8, 3), np.uint8)), "mode RGB .* takes 1 channel"),
        (encoded(np.zeros((8, 8, 4), np.uint8)), "mode RGBA"),
        (encoded(np.zeros((8, 8), np.uint16)), "mode I;16"),
        (encoded(np.zeros((28, 28), np.uint8)), "28x28 pixels and this model takes 8x8"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(client: httpx.Client, body: bytes, says: str) -> None:
    response = client.post("/v1/classify", content=body, headers=PNG)
    assert response.status_code == 422
    assert re.search(says, response.json()["detail"]), response.text


def test_bad_queries_and_batches_are_refused(client: httpx.Client, bodies: list[bytes]) -> None:
    good = ("image", ("a.png", bodies[0], "image/png"))
    cases = [
        (client.post("/v1/classify?threshold=nan", content=bodies[0]), 422, "finite"),
        (client.post("/v1/classify?edge_only=perhaps", content=bodies[0]), 422, "boolean"),
        (client.post("/v1/classify/batch", content=b"{}", headers={"content-type": "application/json"}), 415, "json"),
        (client.post("/v1/classify/batch", content=b"", headers=ARROW), 422, "Arrow"),
        (client.post("/v1/classify/batch", content=arrow(bodies[:9])[:-300], headers=ARROW), 422, "Arrow|image"),
        (client.post("/v1/classify/batch", content=arrow([]), headers=ARROW), 422, "no images"),
        (
            client.post("/v1/classify/batch", content=b"--x", headers={"content-type": "multipart/form-data"}),
            422,
            "read",
        ),
        (client.post("/v1/classify/batch", files=[good, ("image", ("b.png", b"no", "image/png"))]), 422, "image 1 of"),
        (client.post("/v1/classify/batch", files=[good] * 3000), 422, "Too many files"),
        (client.get("/v1/classify"), 405, "Method"),
        (client.get("/v1/nothing"), 404, "Not Found"),
    ]
    for response, status, says in cases:
        assert response.status_code == status, response.text
        assert re.search(says, json.dumps(response.json()["detail"])), response.text


GIGABYTE = 2**30


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classify/batch"])
@pytest.mark.parametrize("announced", [True, False])
def test_a_gigabyte_is_refused(client: httpx.Client, path: str, announced: bool) -> None:
    """With its length announced, and in chunks of unannounced number."""
    address = urlsplit(str(client.base_url))
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    kind = "image/png" if path == "/v1/classify" else ARROW["content-type"]
    headers = {"content-type": kind} | ({"content-length": str(GIGABYTE)} if announced else {})
    block = b"\0" * 2**20

    def blocks() -> Iterator[bytes]:
        yield from (block for _ in range(GIGABYTE // len(block)))

    with contextlib.closing(connection):
        connection.request("POST", path, body=blocks(), headers=headers, encode_chunked=not announced)
        with connection.getresponse() as response:
            assert response.status == 413
            assert "limit is" in json.loads(response.read())["detail"]


def test_open_inference_protocol_answers_as_v1(
    client: httpx.Client, model: TrainedModel, splits: Splits, bodies: list[bytes]
) -> None:
    """Files and pixels, JSON and binary tensors: the same classes and exits."""
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    (index,) = client.post("/v2/repository/index").json()
    assert (index["name"], index["state"]) == ("meanet", "READY")
    assert client.get(f"/v2/models/meanet/versions/{index['version']}").json()["inputs"][0]["name"] == "image"
    assert client.get("/v2/models/meanet/ready").json()["ready"] is True
    assert client.get("/v2/models/other/ready").status_code == 404
    files, pixels = bodies[:20], np.ascontiguousarray(splits.table.images[splits.test[:20]])
    packed = b"".join(struct.pack("<I", len(one)) + one for one in files)
    forms: list[tuple[dict[str, object], bytes]] = [
        ({"datatype": "BYTES", "shape": [20], "data": [base64.b64encode(one).decode() for one in files]}, b""),
        ({"datatype": "BYTES", "shape": [20], "parameters": {"binary_data_size": len(packed)}}, packed),
        ({"datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}, b""),
        (
            {"datatype": "UINT8", "shape": list(pixels.shape), "parameters": {"binary_data_size": pixels.nbytes}},
            pixels.tobytes(),
        ),
    ]
    for tensor, binary in forms:
        header = json.dumps({"inputs": [{"name": "image", **tensor}]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(header))} if binary else {}
        got = client.post("/v2/models/meanet/infer", content=header + binary, headers=headers)
        assert got.status_code == 200, got.text
        outputs = {output["name"]: output["data"] for output in got.json()["outputs"]}
        assert list(zip(outputs["class_id"], outputs["exit"], strict=True)) == expected(model, splits, 20)
    refused = client.post("/v2/models/meanet/infer", content=b"{}")
    assert (refused.status_code, "inputs is no list" in refused.json()["detail"]) == (400, True)
    wrong = {"datatype": "UINT8", "shape": [1, 9, 8, 1], "data": [0] * 72}
    refused = client.post("/v2/models/meanet/infer", json={"inputs": [{"name": "image", **wrong}]})
    assert (refused.status_code, "(8, 8, 1)" in refused.json()["detail"]) == (422, True)


def test_invocations_answer_as_v1(
    client: httpx.Client, model: TrainedModel, splits: Splits, bodies: list[bytes]
) -> None:
    assert client.get("/ping").status_code == 200
    text = [base64.b64encode(one).decode() for one in bodies[:20]]
    got = client.post("/invocations", json={"dataframe_split": {"columns": ["image"], "data": [[one] for one in text]}})
    rows = got.json()["predictions"]
    assert [(row["class_id"], row["exit"]) for row in rows] == expected(model, splits, 20)
    columns = {"class_id", "class_name", "exit", "confidence", "entropy"}
    assert set(rows[0]) == columns | {"degraded", "reason", "model_version", "policy"}
    stays = client.post("/invocations", json={"inputs": text, "params": {"edge_only": True}}).json()["predictions"]
    assert not any(row["exit"] == "cloud" for row in stays)
    by_v1 = client.post("/v1/classify?edge_only=true", content=bodies[0], headers=PNG).json()
    assert (stays[0]["policy"], stays[0]["model_version"]) == (by_v1["policy"]["id"], by_v1["model_version"])
    refused = client.post("/invocations", json={"inputs": text, "params": {"deadline_ms": -1}})
    assert (refused.status_code, "deadline_ms" in refused.json()["detail"]) == (400, True)


def test_deadline_is_kept_and_checked(client: httpx.Client, bodies: list[bytes]) -> None:
    assert client.post("/v1/classify?deadline_ms=1000", content=bodies[0], headers=PNG).status_code == 200
    assert client.post("/v1/classify?deadline_ms=-1", content=bodies[0], headers=PNG).status_code == 422
    assert client.post("/v1/classify?deadline_ms=nan", content=bodies[0], headers=PNG).status_code == 422
