"""Sight on Ray Serve: several replicas behind one address, and any of them speaks for all."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server import serving

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png
from meanet.tracking import Tracker

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def client(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("sight")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracker = Tracker(uri)
    tracker.promote(tracker.register(model, tracker.start_run("r", {}, {})))
    with serving(folder, uri, "--edge-replicas", "2") as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test[:80]]]


def answered(client: httpx.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    return {sample.labels["exit"]: sample.value for sample in families["meanet_answers"].samples}


def test_a_scrape_of_any_replica_is_of_all(client: httpx.Client, bodies: list[bytes]) -> None:
    exits = [client.post("/v1/classify", content=body).json()["exit"] for body in bodies]
    wanted = {exit_: exits.count(exit_) for exit_ in ("main", "extension", "cloud")}
    deadline = time.monotonic() + 20
    while answered(client) != wanted and time.monotonic() < deadline:  # the other one's last report is on its way
        time.sleep(0.2)
    for _ in range(10):
        assert answered(client) == wanted
    status = client.get("/v1/status").json()
    assert status["scope"] == "all replicas"
    assert status["replicas"] == 2
    assert status["breaker"] == {"closed": 2, "half_open": 0, "open": 0}
    assert status["since_start"]["images"] == len(bodies)


def test_the_page_the_front_and_reasons_are_served(
    client: httpx.Client, model: TrainedModel, bodies: list[bytes]
) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<title>MEANet: operator</title>" in page.text
    front = client.get("/v1/front").json()
    assert model.operating_point is not None
    assert front["along"] == model.operating_point["tradeoff"]["along"]
    found = client.post("/v1/explain?threshold=-1", content=bodies[0]).json()
    assert found["why"]["exit"] == found["answer"]["exit"] == "cloud"
    assert client.post("/v1/explain", content=b"no image").status_code == 422
    assert "/v1/explain" in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ["/v1/front", "/v1/classify"])
def test_a_request_has_one_id_and_it_comes_back(client: httpx.Client, bodies: list[bytes], path: str) -> None:
    for given in ("order-17", None):
        headers = {} if given is None else {"X-Request-Id": given}
        request = client.build_request(
            "GET" if path == "/v1/front" else "POST", path, headers=headers, content=bodies[0]
        )
        found = client.send(request).headers.get_list("x-request-id")
        assert len(found) == 1
        assert found[0] == given or (given is None and found[0])
