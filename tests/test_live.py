"""Versions, policies, settings and replicas change under load, and no request fails or is misrouted.

One application behind HAProxy, on a local Ray of eight logical CPUs, for all of it: two edge replicas, more under load.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT

from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png
from meanet.routing import Exit, complexity
from meanet.runtime import Cascade, EdgeRuntime, Images
from meanet.tracking import Tracker

pytestmark = [pytest.mark.cluster, pytest.mark.served]
TOKEN = "correct-horse-battery-staple"
HEADERS = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
PNG = {"content-type": "image/png"}
SWIFT = {"upscale_delay_s": 0.5, "downscale_delay_s": 2}
ARGS = {
    "num_cpus": 0.5,
    "follow_s": 0.5,
    "settings": {"deadline_s": 20.0, "cloud_budget_s": 10.0, "max_cloud_calls": 64},
    "edge_replicas": {"min": 2, "max": 3, "target_ongoing_requests": 4, "upscale_delay_s": 0.5, "downscale_delay_s": 2},
    "cloud_replicas": {
        "min": 1,
        "max": 2,
        "target_ongoing_requests": 0.5,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
    },
}


@dataclass
class Server:
    """A served application and the registry behind it."""

    client: httpx.Client
    tracker: Tracker
    models: dict[int, TrainedModel]
    images: Images
    process: "subprocess.Popen[str]"
    log: Path
    bodies: list[bytes] = field(default_factory=list)

    def put(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.put(path, content=json.dumps(body), headers=HEADERS | headers)

    def version(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get("/v1/version").json()
        return found

    def replicas(self, place: str) -> set[str]:
        return {one["replica"] for one in self.version()["replicas"] if one["place"] == place}

    def threshold(self, version: int) -> float | None:
        return self.models[version].policy.threshold

    def kill(self, deployment: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"kill {deployment}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def reached(what: Callable[[], bool], seconds: float = 180.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, KeyError):
            if what():
                return True
        time.sleep(0.2)
    return False


def register(tracker: Tracker, model: TrainedModel) -> dict[int, TrainedModel]:
    """Version 1; 2, its weights under another threshold; 3, other weights; 4, broken."""
    assert model.operating_point is not None
    run = tracker.start_run("r", {}, {})
    threshold = model.policy.threshold
    assert threshold is not None
    other = model.with_operating_point(model.operating_point | {"thresholds": [threshold / 2]})
    state = {name: tensor.clone() for name, tensor in model.networks.meanet.state_dict().items()}
    last = list(state)[-1]
    networks = artifact.build_networks(model.recipe, model.preprocessing.image_shape, 10)
    networks.meanet.load_state_dict({**state, last: state[last] + 1.0})
    networks.cloud.load_state_dict(model.networks.cloud.state_dict())
    networks.meanet.eval()
    networks.cloud.eval()
    point = model.operating_point | {"thresholds": [threshold / 3]}
    retrained = dataclasses.replace(model, networks=networks, operating_point=point)
    found = {tracker.register(one, run): one for one in (model, other, retrained)}
    broken = tracker.register(model, run)
    written = Path(tracker.uri.removeprefix("sqlite:///")).parent.rglob("cloud.safetensors")
    newest = max(written, key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert list(found) == [1, 2, 3]
    assert broken == 4
    return found


@pytest.fixture(scope="module")
def server(model: TrainedModel, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}")
    models = register(tracker, model)
    tracker.promote(1)
    log, ready = folder / "server.log", folder / "ready"
    args = json.dumps({"tracking_uri": tracker.uri, **ARGS})
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "live_server.py", ready, args],
            env=ENVIRONMENT | {"MEANET_TOKEN": TOKEN},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        images = splits.table.images[splits.test]
        with httpx.Client(base_url=ready.read_text(), timeout=90) as client:
            found = Server(client, tracker, models, images, process, log, [encode_png(image) for image in images])
            assert reached(lambda: len(found.replicas("edge")) == 2 and len(found.replicas("cloud")) == 1)
            yield found
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    assert process.returncode == 0, log.read_text()
    assert TOKEN not in log.read_text()
    assert "HAProxy is not used" not in log.read_text()


@dataclass
class Load:
    """Clients that ask one image after the other, and all that they were answered."""

    server: Server
    query: str = ""
    answers: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    """(image, status, answer)."""

    @contextlib.contextmanager
    def of(self, clients: int) -> Iterator["Load"]:
        stop = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(number, stop)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int, stop: threading.Event) -> None:
        generator = np.random.default_rng(number)
        with httpx.Client(base_url=self.server.client.base_url, timeout=60) as client:
            while not stop.is_set():
                image = int(generator.integers(len(self.server.bodies)))
                try:
                    got = client.post(f"/v1/classify{self.query}", content=self.server.bodies[image], headers=PNG)
                    self.answers.append((image, got.status_code, got.json()))
                except httpx.HTTPError as error:
                    self.answers.append((image, 0, {"error": repr(error)}))

    def check(self) -> set[tuple[int, float | None]]:
        """No request failed, and each answer is the one of the version and threshold that it names; returns those."""
        bad = [(status, answer) for _, status, answer in self.answers if status != 200 or answer["degraded"]]
        assert not bad, bad[:3]
        named: dict[tuple[int, float | None, bool], list[tuple[int, dict[str, Any]]]] = {}
        for image, _, answer in self.answers:
            policy = answer["policy"]
            key = (answer["model_version"], policy["thresholds"][0], policy["edge_only"])
            named.setdefault(key, []).append((image, answer))
        for (version, threshold, edge_only), answers in named.items():
            model = self.server.models[version]
            policy = dataclasses.replace(model.policy, thresholds=(threshold,), edge_only=edge_only)
            right = Cascade(model).classify(self.server.images, policy)
            for image, answer in answers:
                expected = int(right.pred[image]), Exit(right.exit[image]).label
                assert (answer["class_id"], answer["exit"]) == expected, (version, threshold, answer)
        return {(version, threshold) for version, threshold, _ in named}


def lasting(what: Callable[[], bool], seconds: float = 12.0) -> Callable[[], bool]:
    """True once it has been so for a while: what was asked for a moment ago still scales replicas now."""
    since: list[float] = []

    def held() -> bool:
        if not what():
            since.clear()
            return False
        since.append(time.monotonic())
        return since[-1] - since[0] >= seconds

    return held


def applied(server: Server, count: int = 12) -> set[tuple[int, float | None]]:
    """(version, threshold) of so many answers, one after the other."""
    with Load(server).of(1) as load:
        assert reached(lambda: len(load.answers) >= count)
    return load.check()


def rolled_out(server: Server, put: httpx.Response, version: int) -> None:
    """200 says that every replica that serves has it, 202 that this takes longer than was waited for; then it comes."""
    state = put.json()
    everywhere = all(replica["has_it"] for replica in state["replicas"] if replica["revision"] >= 0)  # begun to serve
    done = (state["version"], state["phase"], everywhere) == (version, "idle", True)
    assert put.status_code == (200 if done else 202), put.text
    if not done:
        assert version in (state["version"], state["target"]), put.text
        assert reached(lambda: (server.version()["version"], server.version()["phase"]) == (version, "idle"))


def test_everything_changes_under_load_and_no_request_fails_or_is_misrouted(server: Server) -> None:
    edges = server.replicas("edge")
    with Load(server).of(4) as load:
        put = server.put("/v1/policy", {"thresholds": [0.4]})
        assert put.status_code == 200, put.text
        assert all(replica["has_it"] for replica in put.json()["replicas"])
        assert applied(server) == {(1, 0.4)}, "answered only once every replica has it"

        server.tracker.promote(2)  # as `python -m jobs.promote 2` does
        assert reached(lambda: (server.version()["version"], server.version()["phase"]) == (2, "idle"))
        assert applied(server) == {(2, server.threshold(2))}, "thresholds belong to their version"

        rolled_out(server, server.put("/v1/version?wait_s=50", {"version": 3}), 3)
        assert applied(server) == {(3, server.threshold(3))}

        put = server.put("/v1/version?wait_s=50", {"version": 4})
        assert put.status_code == 409, put.text
        assert "version 4 is refused: " in put.json()["detail"]
        assert "not a whole model" in put.json()["detail"]
        state = server.version()
        assert (state["version"], state["reference"], "4" in state["refused"]) == (3, "3", True)
        assert server.put("/v1/version", {"version": 9}).status_code == 422

        rolled_out(server, server.put("/v1/version?wait_s=50", {"version": 1}), 1)
        assert server.put("/v1/policy", {"thresholds": [0.3]}).status_code == 200
        assert server.kill("control") == 1
        assert reached(lambda: server.put("/v1/settings", {"breaker_failures": 4}).status_code == 200)
        assert applied(server) == {(1, 0.3)}, "a new control undoes nothing that was put"
        assert server.put("/v1/policy", None).status_code == 200
        assert applied(server) == {(1, server.threshold(1))}
    seen = load.check()
    one, two, three = (server.threshold(version) for version in (1, 2, 3))
    assert seen <= {(1, one), (1, 0.4), (1, 0.3), (2, two), (3, three)}
    assert {version for version, _ in seen} == {1, 2, 3}
    assert server.replicas("edge") >= edges, "no edge replica was restarted"


def test_champion_that_cannot_be_loaded_is_refused_and_the_next_is_taken(server: Server) -> None:
    server.tracker.promote(1)
    rolled_out(server, server.put("/v1/version?wait_s=50", {"version": "champion"}), 1)
    with Load(server).of(2) as load:
        server.tracker.promote(4)
        assert reached(lambda: "4" in server.version()["refused"])
        assert (server.version()["version"], server.version()["reference"]) == (1, "champion")
        server.tracker.promote(2)
        assert reached(lambda: (server.version()["version"], server.version()["phase"]) == (2, "idle"))
        server.tracker.promote(1)
        assert reached(lambda: (server.version()["version"], server.version()["phase"]) == (1, "idle"))
    assert {version for version, _ in load.check()} == {1, 2}


def test_writes_want_the_token_and_sense(server: Server) -> None:
    for path, body in (("/v1/policy", {}), ("/v1/settings", {}), ("/v1/version", {"version": 1})):
        assert server.client.get(path).status_code == 200
        refused = server.client.put(path, json=body)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert server.put(path, body, authorization="Bearer wrong").status_code == 401
        assert server.put(path, body, origin="https://evil.example").status_code == 403
        assert server.put(path, body, **{"content-type": "text/plain"}).status_code == 415
    for path, body, says in (
        ("/v1/policy", {"thresholds": [0.1, 0.2]}, "one threshold"),
        ("/v1/policy", {"thresholds": ["low"]}, "thresholds.0"),
        ("/v1/policy", {"num_hard_classes": 99}, "num_hard_classes is 99"),
        ("/v1/policy", {"colour": 1}, "colour"),
        ("/v1/policy", [], "the body"),
        ("/v1/settings", {"deadline_s": -1}, "deadline_s is -1"),
        ("/v1/settings", None, "object"),
        ("/v1/version", {}, "version"),
    ):
        got = server.put(path, body)
        assert (got.status_code, says in got.json()["detail"]) == (422, True), got.text
    assert server.client.put("/v1/policy", content=b"{", headers=HEADERS).status_code == 422
    assert server.client.put("/v1/policy", content=b"1" * 100_000, headers=HEADERS).status_code == 413


def test_thresholds_of_requests_keep_their_bounds(server: Server) -> None:
    assert server.put("/v1/settings", {"lowest_threshold": 0.1, "highest_threshold": 0.9}).status_code == 200
    for threshold, status in ((0.05, 422), (0.5, 200), (0.95, 422)):
        got = server.client.post(f"/v1/classify?threshold={threshold}", content=server.bodies[0], headers=PNG)
        assert got.status_code == status
        assert status == 200 or "from 0.1 to 0.9" in got.json()["detail"]
        assert server.put("/v1/policy", {"thresholds": [threshold]}).status_code == status
    assert server.put("/v1/policy", None).status_code == 200
    assert server.put("/v1/settings", {"lowest_threshold": None, "highest_threshold": None}).status_code == 200


def test_answers_name_the_nodes(server: Server) -> None:
    node = server.version()["replicas"][0]["node"]
    up = server.client.post("/v1/classify?threshold=-1", content=server.bodies[0], headers=PNG).json()
    assert up["served_by"] == {"edge": node, "cloud": node}
    stays = server.client.post("/v1/classify?edge_only=true", content=server.bodies[0], headers=PNG).json()
    assert stays["served_by"] == {"edge": node, "cloud": None}


def test_budget_holds_15_percent_while_the_input_drifts(server: Server) -> None:
    model = server.models[1]
    _, pending = EdgeRuntime(model).run(server.images, model.policy)
    order = np.argsort(complexity(pending.main, model.policy.measures[0]))
    generator, count, half = np.random.default_rng(0), 4096, len(order) // 2
    places = (np.linspace(0, 1, count) * half).astype(int) + generator.integers(0, len(order) - half, count)
    assert server.put("/v1/settings", {"budget": {"cloud_share": 0.15}}).status_code == 200
    wanted, thresholds = [], set()
    for start in range(0, count, 16):
        files = [("image", ("i.png", server.bodies[order[place]], "image/png")) for place in places[start : start + 16]]
        for answer in server.client.post("/v1/classify/batch", files=files).json()["answers"]:
            wanted.append(answer["exit"] == "cloud" or answer["degraded"])
            thresholds.add(answer["policy"]["thresholds"][0])
    sums = np.concatenate(([0], np.cumsum(wanted)))
    assert np.abs((sums[2000:] - sums[:-2000]) / 2000 - 0.15).max() <= 0.02
    assert len(thresholds) > 20
    assert server.client.get("/v1/policy").json()["moved_by_budget"] is True
    assert server.put("/v1/settings", {"budget": None}).status_code == 200
    assert applied(server) == {(1, server.threshold(1))}


def test_audit_finds_drift(server: Server) -> None:
    assert server.put("/v1/settings", {"audit": {"share": 1.0, "expected": 0.02}}).status_code == 200
    for turned, drifted in ((0, False), (1, True)):
        images = [np.ascontiguousarray(np.rot90(image, turned)) for image in server.images[:320]]
        for start in range(0, 320, 16):
            files = [("image", ("i.png", encode_png(image), "image/png")) for image in images[start : start + 16]]
            assert server.client.post("/v1/classify/batch", files=files).status_code == 200
        assert reached(lambda: server.client.get("/v1/audit").json()["count"] >= 50)
        assert reached(lambda wanted=drifted: server.client.get("/v1/audit").json()["drifted"] is wanted)  # type: ignore[misc]
    assert server.put("/v1/settings", {"audit": {"share": 0.0}}).status_code == 200


def test_edge_and_cloud_scale_up_and_down_apart(server: Server) -> None:
    assert reached(lasting(lambda: len(server.replicas("edge")) == 2 and len(server.replicas("cloud")) == 1))
    with Load(server, "?edge_only=true").of(24) as load:
        assert reached(lambda: len(server.replicas("edge")) == 3)
        assert len(server.replicas("cloud")) == 1, "the cloud has nothing to do with this load"
    load.check()
    assert reached(lambda: len(server.replicas("edge")) == 2)
    with Load(server, "?threshold=-1").of(12) as load:
        assert reached(lambda: len(server.replicas("cloud")) == 2)
    load.check()
    assert reached(lambda: len(server.replicas("edge")) == 2 and len(server.replicas("cloud")) == 1)
