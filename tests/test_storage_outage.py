"""A training whose checkpoints lie in a bucket and whose metrics go to a server: both go away in the middle of it."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from s3_server import S3Server

from meanet.loop import PHASES

pytestmark = pytest.mark.cluster
EPOCHS = 10
S3_AWAY_S, MLFLOW_AWAY_S = 8.0, 12.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, MlflowServer]]:
    folder = tmp_path_factory.mktemp("servers")
    bucket = S3Server(folder / "s3")
    tracking = MlflowServer(folder / "mlflow", "s3://mlflow/artifacts", bucket.environment)
    try:
        bucket.start()
        tracking.start()
        yield bucket, tracking
    finally:
        tracking.stop()
        bucket.stop()


def _away(server: S3Server | MlflowServer, seconds: float) -> threading.Timer:
    server.stop()
    back = threading.Timer(seconds, server.start)
    back.start()
    return back


def test_training_outlives_both_and_loses_nothing(servers: tuple[S3Server, MlflowServer], tmp_path: Path) -> None:
    bucket, tracking = servers
    command = [sys.executable, "-m", "jobs.train", "digits", "--workers", "1", "--output", str(tmp_path / "run")]
    command += ["--storage", "s3://meanet/checkpoints", "--json", *(f"--{name}.epochs={EPOCHS}" for name in PHASES)]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT | bucket.environment | {"MLFLOW_TRACKING_URI": tracking.url},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    timers: list[threading.Timer] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if not timers and re.search(r"main +epoch +3/", line):
                timers += [_away(bucket, S3_AWAY_S), _away(tracking, MLFLOW_AWAY_S)]
        assert process.stdout is not None
        result = process.stdout.read()
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
        for timer in timers:
            timer.join()
    said = "".join(lines)
    assert process.returncode == 0, said
    assert said.count("worker(s) started") == 1, f"it went on, and did not begin again: {said}"
    assert "MLflow: points are kept in points.jsonl and follow" in said
    client = MlflowClient(tracking_uri=tracking.url)
    run = json.loads(result)["mlflow_run"]
    experiment = client.get_run(run).info.experiment_id
    phases = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    assert {phase.data.tags["phase"] for phase in phases} == set(PHASES)
    for phase in phases:
        steps = {metric.step for metric in client.get_metric_history(phase.info.run_id, "loss")}
        assert steps == set(range(1, EPOCHS + 1))
        assert phase.info.status == "FINISHED"
    assert client.list_artifacts(run), "artifacts went through the server into the bucket"
    assert (tmp_path / "run" / "model" / "model.json").exists()
