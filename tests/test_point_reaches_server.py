"""From the search to the server by files and the registry alone: nobody copies a number."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ENVIRONMENT
from server import serving

from meanet import artifact, storage
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.evaluation import ExitsTable
from meanet.preprocessing import encode_png
from meanet.routing import Exit, Policy, route

pytestmark = [pytest.mark.cluster, pytest.mark.served]


def test_chosen_point_is_what_the_server_applies(
    model: TrainedModel, table: ExitsTable, splits: Splits, tmp_path: Path
) -> None:
    artifact.save(dataclasses.replace(model, operating_point=None), tmp_path / "run" / "model")
    storage.write_parquet(table.table, tmp_path / "run" / "exits.parquet")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def job(name: str, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", f"jobs.{name}", *words, "--json"]
        environment = ENVIRONMENT | {"MLFLOW_TRACKING_URI": store}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    point = job("sweep", "run/exits.parquet", "--max-cloud-share", "0.15", "--link", "lte")["operating_point"]
    version = job("register", "run")["version"]
    job("promote", "candidate")
    test, policy = table.exits("test"), Policy.from_dict(point)
    wanted = route(test.main_logits, test.extension_logits, test.cloud_pred, policy)
    with serving(tmp_path, store) as url, httpx.Client(base_url=url, timeout=30) as client:
        served = client.get("/v1/model").json()
        assert point["energy"]["link"] == "lte"
        assert (served["version"], served["operating_point"]) == (version, point)
        for row in range(80):
            body = encode_png(splits.table.images[splits.test[row]])
            answer = client.post("/v1/classify", content=body, headers={"content-type": "image/png"}).json()
            assert (answer["class_id"], answer["exit"]) == (wanted.pred[row], Exit(wanted.exit[row]).label)
            assert answer["policy"]["id"] == point["id"]
            assert answer["joules"]["source"] == "modelled:horowitz_45nm+lte"
    assert len(set(wanted.exit[:80])) > 1
