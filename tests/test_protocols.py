"""Other people's clients against the served model: tritonclient, MLflow's scoring client, schemathesis."""

import base64
import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import schemathesis
from conftest import Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from schemathesis.generation import GenerationMode

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png
from meanet.routing import Exit
from meanet.runtime import Cascade

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package's own imports
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.cluster
COUNT = 20


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test[:COUNT]]]


@pytest.fixture(scope="module")
def images(splits: Splits, bodies: list[bytes]) -> dict[str, Any]:
    """The same images by datatype."""
    pixels = np.ascontiguousarray(splits.table.images[splits.test[:COUNT]])
    return {"BYTES": np.array(bodies, dtype=np.object_), "UINT8": pixels}


@pytest.fixture(scope="module")
def expected(model: TrainedModel, splits: Splits) -> list[tuple[int, str]]:
    answers = Cascade(model).classify(splits.table.images[splits.test[:COUNT]])
    return [(int(p), Exit(e).label) for p, e in zip(answers.pred, answers.exit, strict=True)]


@pytest.fixture
def infer_client(served: Server) -> Iterator["triton.InferenceServerClient"]:
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        yield client


def test_tritonclient_lists_and_checks(infer_client: "triton.InferenceServerClient") -> None:
    assert infer_client.is_server_live()
    assert infer_client.is_server_ready()
    (found,) = infer_client.get_model_repository_index()
    assert (found["name"], found["state"]) == ("meanet", "READY")
    assert infer_client.is_model_ready("meanet")
    assert infer_client.is_model_ready("meanet", found["version"])
    assert not infer_client.is_model_ready("other")
    assert "binary_tensor_data" in infer_client.get_server_metadata()["extensions"]
    metadata = infer_client.get_model_metadata("meanet", found["version"])
    assert metadata["versions"] == [found["version"]]
    assert [(one["name"], one["datatype"]) for one in metadata["inputs"]] == [("image", "BYTES")]
    assert {one["name"] for one in metadata["outputs"]} >= {"class_id", "exit", "confidence"}


@pytest.mark.parametrize(("kind", "binary"), [("BYTES", True), ("UINT8", True), ("UINT8", False)])
def test_tritonclient_infers(
    infer_client: "triton.InferenceServerClient",
    images: dict[str, Any],
    expected: list[tuple[int, str]],
    kind: str,
    binary: bool,
) -> None:
    values = images[kind]
    given_ = triton.InferInput("image", list(values.shape), kind)
    given_.set_data_from_numpy(values, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("class_id", "exit", "degraded")]
    result = infer_client.infer("meanet", [given_], outputs=outputs, request_id="a7")
    assert result.get_response()["id"] == "a7"
    exits = [one.decode() if isinstance(one, bytes) else one for one in result.as_numpy("exit")]
    assert list(zip(result.as_numpy("class_id").tolist(), exits, strict=True)) == expected
    assert not result.as_numpy("degraded").any()


def test_tritonclient_sends_base64_and_parameters(
    infer_client: "triton.InferenceServerClient", bodies: list[bytes], expected: list[tuple[int, str]]
) -> None:
    values = np.array([base64.b64encode(body).decode() for body in bodies], dtype=np.object_)
    given_ = triton.InferInput("image", [COUNT], "BYTES")
    given_.set_data_from_numpy(values, binary_data=False)
    result = infer_client.infer("meanet", [given_])
    assert result.as_numpy("class_id").tolist() == [class_id for class_id, _ in expected]
    private = infer_client.infer("meanet", [given_], parameters={"edge_only": True, "threshold": -1.0})
    assert set(private.as_numpy("exit").tolist()) <= {b"main", b"extension"}


def test_tritonclient_is_told_what_is_wrong(infer_client: "triton.InferenceServerClient") -> None:
    given_ = triton.InferInput("image", [1, 9, 9, 1], "UINT8")
    given_.set_data_from_numpy(np.zeros((1, 9, 9, 1), dtype=np.uint8))
    with pytest.raises(InferenceServerException, match=r"this model takes .*\(8, 8, 1\)"):
        infer_client.infer("meanet", [given_])
    with pytest.raises(InferenceServerException, match="other is not served"):
        infer_client.infer("other", [given_])


def test_mlflows_own_client(served: Server, bodies: list[bytes], expected: list[tuple[int, str]]) -> None:
    address = httpx.URL(served.url)
    client = ScoringServerClient(address.host, address.port)
    client.wait_server_ready(timeout=10)
    assert client.get_version()
    text = [base64.b64encode(body).decode() for body in bodies]  # as MLflow has binary columns in JSON
    answers = client.invoke(pd.DataFrame({"image": text})).get_predictions()
    assert list(zip(answers["class_id"], answers["exit"], strict=True)) == expected
    with pytest.raises(Exception, match="error code 400"):
        client.invoke(pd.DataFrame({"picture": text}))


def test_schemathesis_finds_no_server_error(served: Server, client: httpx.Client, bodies: list[bytes]) -> None:
    """Requests of /v1 by its own OpenAPI, and against it."""
    sound = client.post("/v1/classify", content=bodies[0])
    assert sound.status_code == 200
    for kind in ("image/png", "image/jpeg", "application/vnd.apache.arrow.stream"):
        schemathesis.openapi.media_type(kind, st.sampled_from(bodies) | st.binary(max_size=200))
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json").include(path_regex="^/v1")
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                response = case.call(base_url=served.url, timeout=30)
                deadline = (case.query or {}).get("deadline_ms")
                in_haste = isinstance(deadline, int | float) and deadline < 100  # may be over on a busy machine
                assert response.status_code < 500 or (response.status_code == 503 and in_haste), response.text
                statuses.setdefault(case.operation.label, set()).add(response.status_code)
                if response.status_code not in (400, 405):  # which the ingress may say in its own words
                    json.loads(response.content)

            nothing_to_damage = Unsatisfiable if mode is GenerationMode.NEGATIVE else ()
            with contextlib.suppress(nothing_to_damage):  # where an operation takes no parameters
                ask()
    tiny = client.post("/v1/classify?deadline_ms=0.5", content=bodies[0])
    assert (tiny.status_code, "greater than or equal to 10" in tiny.text) == (422, True)
    assert set(statuses) >= {"POST /v1/classify", "POST /v1/classify/batch", "GET /v1/model"}
    assert {200, 422} <= statuses["POST /v1/classify"]
