"""The whole life on three Ray nodes, a real S3 server and a real MLflow server, from one command; then nodes die."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient
from whole_cluster import Here, Load, here, keys, python, training_raylets

from jobs import _processes
from jobs.deploy import CONFIG
from meanet import data
from meanet.loop import PHASES
from meanet.preprocessing import encode_png
from meanet.recipes import digits

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
        "-m", "jobs.life", *words, *EPOCHS, "--json", environment=environment, cwd=here.elsewhere, timeout=900
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


SUBMIT = ("-m", "ray.scripts.scripts", "job", "submit", "--runtime-env", "jobs/runtime_env.yaml")


def test_sweep_of_the_buckets_table_as_a_job(here: Here, lived: Lived) -> None:
    job = ["--", "python", "-m", "jobs.sweep", f"s3://meanet/life/{lived.record['id']}/exits.parquet"]
    done = python(*SUBMIT, *job, environment=here.environment, cwd=here.elsewhere, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^(\d+) policies covered", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert int(found[1]) > 100
    assert re.search(r"^operating point \w+, on validation", done.stdout, re.MULTILINE)


def test_failed_job_says_why_last(here: Here, lived: Lived) -> None:
    command = [sys.executable, *SUBMIT, "--", "python", "-m", "jobs.promote", "99"]
    done = subprocess.run(  # both streams in one, as a terminal has them
        command,
        env=here.environment,
        cwd=here.elsewhere,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    said = [line for line in done.stdout.splitlines() if line.strip()]
    assert "error: model 'meanet' has no version '99'" in said[-1], said[-5:]


def test_serve_deploy_of_the_committed_yaml(here: Here, lived: Lived, tmp_path: Path) -> None:
    """As committed, but for addresses: what the life has deployed already, so that nothing restarts."""
    port = lived.record["url"].rpartition(":")[2]
    text = CONFIG.read_text().replace("http://127.0.0.1:5000", here.environment["MLFLOW_TRACKING_URI"])
    (tmp_path / "meanet.yaml").write_text(text.replace("port: 8000", f"port: {port}"))
    before = httpx.get(f"{lived.record['url']}/v1/version", timeout=30).json()["replicas"]
    serve = [str(Path(sys.executable).parent / "serve"), "deploy", "meanet.yaml"]
    subprocess.run(serve, env=here.environment, cwd=tmp_path, check=True, capture_output=True)
    done = python("-m", "jobs.deploy", "--port", port, "--json", environment=here.environment, cwd=tmp_path)
    assert json.loads(done.stdout) == {"application": "meanet", "url": lived.record["url"], "version": 1}
    after = httpx.get(f"{lived.record['url']}/v1/version", timeout=30).json()["replicas"]
    assert [one["replica"] for one in before] == [one["replica"] for one in after]


def test_submission_returns_and_a_stop_leaves_things_clean(here: Here, lived: Lived, tmp_path: Path) -> None:
    words = [
        "python",
        "-m",
        "jobs.train",
        "digits",
        "--workers",
        "2",
        "--output",
        str(tmp_path),
        "--main.epochs",
        "500",
    ]
    done = python(*SUBMIT, "--no-wait", "--", *words, environment=here.environment, cwd=here.elsewhere, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = set(re.findall(r"raysubmit_\w+", done.stdout + done.stderr))
    cli = (sys.executable, "-m", "ray.scripts.scripts", "job")
    with subprocess.Popen(
        [*cli, "logs", "--follow", job],
        env=here.environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as logs:
        assert logs.stdout is not None
        assert any("epoch   2/500" in line for line in logs.stdout), "logs follow"
        mark = json.loads((here.folder / "cluster.json").read_text())["mark"]
        assert training_raylets(mark), "workers run"
        python(*cli[1:], "stop", job, environment=here.environment, cwd=tmp_path, timeout=60)
        logs.stdout.read()
    deadline = time.monotonic() + 60
    while training_raylets(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert training_raylets(mark) == set(), "no worker is left"
    run = json.loads((tmp_path / "run.json").read_text())["mlflow_run"]
    client = MlflowClient(tracking_uri=here.environment["MLFLOW_TRACKING_URI"])
    assert client.get_run(run).info.status == "KILLED"


# Nodes die


def test_cloud_node_dies_under_load_and_a_new_one_is_used(here: Here, lived: Lived) -> None:
    url, before = lived.record["url"], here.nodes()
    table = data.load(digits().data)
    bodies = [encode_png(table.images[row]) for row in range(400)]
    with httpx.Client(base_url=url, timeout=30) as client:
        first = [client.post("/v1/classify", content=body, headers={"content-type": "image/png"}) for body in bodies]
    complex_ones = [body for body, answer in zip(bodies, first, strict=True) if answer.json()["exit"] == "cloud"]
    assert complex_ones, "some images go to the cloud"
    load = Load(url, complex_ones)
    load.start()
    try:
        load.until(lambda answer: answer["served_by"]["cloud"] == before["cloud"])
        os.kill(here.raylet("cloud-1"), signal.SIGKILL)
        lost = load.until(lambda answer: answer["degraded"])
        assert lost["reason"].startswith("cloud ")
        assert (lost["exit"] in ("main", "extension"), lost["served_by"]["edge"]) == (True, before["edge"])
        added = here.command("add", "cloud")
        assert added.returncode == 0, added.stderr
        back = load.until(lambda answer: answer["served_by"]["cloud"] not in (None, before["cloud"]))
    finally:
        load.stop()
    assert back["exit"] == "cloud"
    assert set(load.statuses) == {200}, "no request failed"
    assert here.nodes() == {"edge": before["edge"], "cloud": back["served_by"]["cloud"]}


def test_training_goes_on_when_a_node_with_a_worker_dies(here: Here, tmp_path: Path) -> None:
    epochs = 12
    words = ["jobs.train", "digits", "--workers", "2", "--output", str(tmp_path / "run"), "--json"]
    words += ["--storage", "s3://meanet/killed", *(f"--{phase}.epochs={epochs}" for phase in PHASES)]
    mark, nodes = json.loads((here.folder / "cluster.json").read_text())["mark"], here.view()["parts"]
    others = {part["raylet"] for part in nodes if part["raylet"] and part["name"] != "Ray node head"}
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env=here.environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    killed: set[int] = set()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if not killed and re.search(r"main +epoch +3/", line):
                killed = set(sorted(training_raylets(mark) & others)[:1])
                assert killed, "a worker runs on a node other than the head"
                os.kill(next(iter(killed)), signal.SIGKILL)
        assert process.stdout is not None
        result = process.stdout.read()
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    text = "".join(said)
    assert process.returncode == 0, text
    resumed = re.search(r"2 worker\(s\) resumed from the last checkpoint on (\d) node\(s\), pid \d+, (\d+) of", text)
    assert resumed is not None, text
    assert int(resumed[2]) >= 2, "epochs that were over are not trained again"
    client = MlflowClient(tracking_uri=here.environment["MLFLOW_TRACKING_URI"])
    run = json.loads(result)["mlflow_run"]
    query = f"tags.`mlflow.parentRunId` = '{run}'"
    phases = client.search_runs([client.get_run(run).info.experiment_id], query)
    steps = {one.data.tags["phase"]: client.get_metric_history(one.info.run_id, "loss") for one in phases}
    assert {name: {point.step for point in points} for name, points in steps.items()} == {
        phase: set(range(1, epochs + 1)) for phase in PHASES
    }


def test_failed_deployment_says_why_last(here: Here, lived: Lived, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(CONFIG.read_text().replace("serve_apps.graph:app", "serve_apps.nothing:app"))
    words = ["-m", "jobs.deploy", "--port", lived.record["url"].rpartition(":")[2], "--config", str(broken)]
    done = python(*words, environment=here.environment, cwd=tmp_path, timeout=200)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r"error: meanet could not be deployed: .*serve_apps.nothing", last), done.stderr
