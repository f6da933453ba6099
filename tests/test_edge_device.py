"""The edge part alone: no Ray, no torch, and nothing beside what its extra installs."""

import json
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from packaging.requirements import Requirement

from meanet import artifact, edge_device, engines, onnx_export
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.edge_device import Cloud, EdgeDevice
from meanet.errors import UserError
from meanet.preprocessing import encode_png
from meanet.routing import Exit
from meanet.runtime import EdgeRuntime

ALONE = """
import json, runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
allowed = set(json.loads(sys.argv.pop(1))) | set(sys.stdlib_module_names) | {"meanet"}
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec(name, path, target) if name.split(".")[0] in allowed else None
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Installed]
runpy.run_module("meanet.edge_device", run_name="__main__", alter_sys=True)
"""


def installed_by(names: list[str]) -> set[str]:
    """Distributions that installing these brings along."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        one = waiting.pop()
        if one.name.lower() not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(one.name.lower())
            waiting += [Requirement(text) for text in metadata.requires(one.name) or ()]
    return found


def modules_of_the_extra() -> list[str]:
    """What may be imported after `pip install .[edge]`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = installed_by([*project["dependencies"], *project["optional-dependencies"]["edge"]])
    return [name for name, owners in metadata.packages_distributions().items() if {o.lower() for o in owners} & there]


@pytest.fixture(scope="module")
def device(model: TrainedModel, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is copied onto a device: neither weights nor the cloud's network."""
    folder = artifact.save(model, tmp_path_factory.mktemp("device") / "model")
    onnx_export.export(model, folder, splits, "onnx")
    for path in folder.iterdir():
        if path.name.startswith(("cloud", "edge")):
            path.unlink()
    return folder


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test[:60]]]  # type: ignore[attr-defined]


def test_extra_is_light() -> None:
    allowed = modules_of_the_extra()
    assert {"numpy", "PIL", "safetensors", "onnxruntime"} <= set(allowed)
    assert not {"torch", "ray", "mlflow", "pandas", "pyarrow", "pydantic", "yaml", "scipy", "onnx"} & set(allowed)


def test_edge_alone_answers_as_torch(
    model: TrainedModel, device: Path, splits: Splits, bodies: list[bytes], tmp_path: Path
) -> None:
    """In a process that can import what the extra installs and nothing else."""
    paths = [tmp_path / f"{number}.png" for number in range(len(bodies))]
    for path, data in zip(paths, bodies, strict=True):
        path.write_bytes(data)
    words = [json.dumps(modules_of_the_extra()), str(device), *map(str, paths), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    runtime, policy = EdgeRuntime(model), model.policy
    answers, pending = runtime.run(splits.table.images[splits.test[: len(bodies)]], policy)  # type: ignore[attr-defined]
    complex_rows = set(pending.rows.tolist())
    runtime.finish(answers, pending, policy)
    assert 0 < len(complex_rows) < len(bodies)
    assert [row["class_id"] for row in rows] == answers.pred.tolist()
    assert [row["exit"] for row in rows] == [Exit(value).label for value in answers.exit]
    np.testing.assert_allclose([row["confidence"] for row in rows], answers.confidence, atol=1e-4)
    np.testing.assert_allclose([row["entropy"] for row in rows], answers.entropy, atol=1e-3)
    assert {number for number, row in enumerate(rows) if row["degraded"]} == complex_rows
    assert {row["reason"] for row in rows if row["degraded"]} == {"no cloud given"}
    costs = model.costs
    for row, extended in zip(rows, answers.extended.tolist(), strict=True):
        assert row["joules"]["edge_compute"] == costs.main_joules + extended * costs.extension_joules
        assert (row["joules"]["upload"], row["joules"]["source"]) == (0.0, "modelled:horowitz_45nm+wifi")


def test_without_its_files_it_says_what_is_missing(model: TrainedModel, tmp_path: Path) -> None:
    folder = artifact.save(model, tmp_path / "model")
    words = [json.dumps(modules_of_the_extra()), str(folder), "x.png"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torch is not installed" in done.stderr
    assert "--engines" in done.stderr


class Server(HTTPServer):
    """A cloud that answers what it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.answer = 200, b""
        self.received: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, body))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


GOOD = {"class_id": 4, "confidence": 0.75, "exit": "cloud", "degraded": False, "reason": None}


def test_complex_images_go_up_as_they_are(
    device: Path, server: Server, bodies: list[bytes], model: TrainedModel
) -> None:
    server.answer = json.dumps(GOOD).encode()
    found = EdgeDevice(device, cloud=Cloud(server.url + "/")).answer(bodies)
    cloud = [number for number, answer in enumerate(found) if answer.exit == "cloud"]
    assert 0 < len(cloud) < len(bodies)
    assert [body for _, body in server.received] == [bodies[number] for number in cloud], "the original bytes"
    assert {path for path, _ in server.received} == {"/v1/classify"}
    assert {(found[number].class_id, found[number].confidence) for number in cloud} == {(4, 0.75)}
    assert not any(answer.degraded for answer in found)
    for number, answer in enumerate(found):
        price = float(model.costs.upload_joules(len(bodies[number]))) if number in cloud else 0.0
        assert answer.joules is not None
        assert answer.joules["upload"] == pytest.approx(price)


def test_joules_that_are_not_known_are_not_told(device: Path, bodies: list[bytes], tmp_path: Path) -> None:
    """In a folder of an earlier version, and under an operating point that was chosen by other profiles."""
    folder = shutil.copytree(device, tmp_path / "device")
    assert all(answer.joules is not None for answer in EdgeDevice(folder).answer(bodies[:5]))
    point = json.loads((folder / "operating_point.json").read_text())
    other = {**point, "expected": {**point["expected"], "joules_source": "modelled:horowitz_45nm+lte"}}
    (folder / "operating_point.json").write_text(json.dumps(other))
    assert {answer.joules for answer in EdgeDevice(folder).answer(bodies[:5])} == {None}
    (folder / "operating_point.json").write_text(json.dumps(point))
    described = json.loads((folder / "model.json").read_text())
    del described["joules"]
    (folder / "model.json").write_text(json.dumps(described))
    assert {answer.joules for answer in EdgeDevice(folder).answer(bodies[:5])} == {None}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((503, GOOD), "cloud answered 503"),
        ((200, GOOD | {"class_id": 10}), "cloud answered class 10 at confidence 0.75"),
        ((200, GOOD | {"confidence": float("nan")}), "cloud answered class 4 at confidence nan"),
        ((200, GOOD | {"degraded": True, "reason": "cloud timed out"}), "server: cloud timed out"),
        ((200, [1, 2]), "cloud failed: ValueError"),
        ((200, {}), "cloud failed: KeyError"),
        ((200, GOOD | {"class_id": None}), "cloud failed: TypeError"),
    ],
)
def test_a_cloud_that_fails_leaves_the_edges_best_answer(
    device: Path, server: Server, bodies: list[bytes], answer: tuple[int, Any], reason: str
) -> None:
    alone = EdgeDevice(device).answer(bodies)
    server.status, server.answer = answer[0], json.dumps(answer[1]).encode()
    found = EdgeDevice(device, cloud=Cloud(server.url)).answer(bodies)
    assert {each.reason for each in found if each.degraded} == {reason}
    for one, other in zip(alone, found, strict=True):
        assert (one.class_id, one.exit, one.degraded) == (other.class_id, other.exit, other.degraded)


def test_no_server_at_all(device: Path, server: Server, bodies: list[bytes]) -> None:
    server.shutdown()
    server.server_close()
    found = EdgeDevice(device, cloud=Cloud(server.url, timeout_s=0.5)).answer(bodies[:20])
    assert {each.reason for each in found if each.degraded} <= {"cloud failed: URLError"}
    assert any(each.degraded for each in found)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cloud", "ftp://host"), "--cloud is 'ftp://host'"),
        (("--cloud", "http://host", "--timeout", "0"), "--timeout is 0.0"),
        (("--engine", "onnx_int8"), "no engine onnx_int8"),
        ((), "nowhere.png cannot be read"),
    ],
)
def test_mistakes_are_named(
    device: Path,
    words: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["edge_device", str(device), "nowhere.png", *words])
    with pytest.raises(SystemExit):
        edge_device.main()
    assert says in capsys.readouterr().err


def test_lines_for_a_person(
    device: Path, bodies: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "a.png").write_bytes(bodies[0])
    monkeypatch.setattr(sys, "argv", ["edge_device", str(device), str(tmp_path / "a.png"), "--engine", "onnx"])
    edge_device.main()
    found = EdgeDevice(device, "onnx").answer(bodies[:1])[0]
    words = capsys.readouterr().out.split()
    assert words[1:3] == [found.class_name, found.exit]
    assert found.joules is not None
    assert float(words[4]) == pytest.approx(found.joules["edge_compute"], rel=0.01)
    assert words[5:7] == ["J", "(modelled:horowitz_45nm+wifi)"]
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        edge_device.main()
    assert "no readable PNG or JPEG" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):
        EdgeDevice(tmp_path)
    assert engines.choose(device) == "onnx"
