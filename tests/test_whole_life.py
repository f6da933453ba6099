"""The whole life on three Ray nodes, a real S3 server and a real MLflow server, from one command."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from whole_cluster import Here, here, keys, python

from jobs import _processes
from meanet.loop import PHASES

__all__ = ["here"]
pytestmark = pytest.mark.cluster
EPOCHS = [f"--{phase}.epochs=3" for phase in PHASES]


@dataclass(frozen=True)
class Lived:
    record: dict[str, Any]
    said: str
    output: Path


@pytest.fixture(scope="module")
def lived(here: Here, tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One command, from another folder, with a shell's environment; each job is submitted."""
    output = tmp_path_factory.mktemp("life")
    port = str(_processes.free_ports(1)[0])
    environment = here.environment | {"PYTHONPATH": f"{here.elsewhere / 'platform'}{os.pathsep}{here.elsewhere}"}
    words = ["digits", "--output", str(output), "--port", port, "--submit", "--workers", "2", "--trials", "2"]
    done = python(
        "-m", "jobs.life", *words, *EPOCHS, "--json", environment=environment, cwd=here.elsewhere, timeout=590
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Lived(json.loads(done.stdout), done.stderr, output)


def test_second_cluster_in_the_folder_is_refused(here: Here) -> None:
    done = here.command("up")
    assert done.returncode == 1
    assert "error: a cluster is running in" in done.stderr


def test_whole_life_from_one_command(here: Here, lived: Lived) -> None:
    result, nodes = lived.record["result"], here.nodes()
    assert result["images"] >= 450
    assert (result["mismatches"], result["accuracy"] > 0.8) == (0, True)
    assert set(result["nodes"]["edge"]) == {nodes["edge"]}, "edge replicas run on the edge node"
    assert set(result["nodes"]["cloud"]) == {nodes["cloud"]}, "cloud replicas run on the cloud node"
    assert sum(result["nodes"]["cloud"].values()) == result["exits"]["cloud"] > 0
    assert "2 worker(s) started on 2 node(s)" in lived.said, "the main phase is data-parallel over nodes"
    assert list(lived.record["seconds"]) == [
        "ingest",
        "train",
        "evaluate",
        "tune",
        "register",
        "promote",
        "deploy",
        "classify",
    ]


def test_everything_lies_in_s3(here: Here, lived: Lived) -> None:
    place = f"life/{lived.record['id']}"
    ours, theirs = keys(here, "meanet"), keys(here, "mlflow")
    assert f"{lived.record['data'].removeprefix('parquet:s3://meanet/')}/00000-of-00001.parquet" in ours
    assert any(re.fullmatch(rf"{place}/checkpoints/.*/state.pt", key) for key in ours)
    assert f"{place}/exits.parquet" in ours
    results = {"exits.parquet", "operating_point.json", "report.json", "model/model.json"}
    assert {f"{place}/study/{name}" for name in results} <= set(ours)
    assert sum(bool(re.fullmatch(rf"{place}/study/trials/\w+/trial.json", key)) for key in ours) == 2
    assert any(re.fullmatch(rf"{place}/study/tune/.*/tuner.pkl", key) for key in ours), "Tune's own record"
    assert [key.rpartition("/")[2] for key in theirs].count("MLmodel") == 1, "the registered model"
    assert any(key.endswith("/report.json") for key in theirs), "artifacts of the study's run"
    client = MlflowClient(tracking_uri=here.environment["MLFLOW_TRACKING_URI"])
    assert client.get_model_version_by_alias("meanet", "champion").version == "1"
    (version,) = lived.record["result"]["versions"]
    assert version == "1"
