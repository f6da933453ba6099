"""The whole life in one command: killed in the middle, gone on with, finished, and nothing of it left running."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT
from mlflow import MlflowClient
from server import MARK, left_running

from meanet import artifact
from meanet.config import Recipe
from meanet.data import Splits
from meanet.evaluation import ExitsTable
from meanet.loop import PHASES, SingleProcess
from meanet.operating_point import policy_of, search
from meanet.recipes import digits
from meanet.replay import replay
from meanet.routing import Policy
from meanet.training import Trainer
from tune_spaces.policies import SPACES

pytestmark = pytest.mark.cluster
EPOCHS = {"main": 5, "extension": 8, "cloud": 10}
POLICIES = {"main_only", "edge_only", "cloud_only", "operating_point", "oracle"}
POLICIES |= {"authors_threshold", "sedna_filter", "random"}


@dataclass(frozen=True)
class Demo:
    folder: Path
    store: str
    report: dict[str, Any]
    recipe: Recipe
    first: list[str]
    """Progress of the attempt that was killed between the main and the extension phase."""
    second: list[str]
    """Progress of the one that SIGTERM ended inside the cloud phase."""
    end: str
    """What that one said after the signal."""
    stopped: dict[str, str]
    """What MLflow then said of each run."""
    third: list[str]
    """Progress of the one that finished."""
    left: list[str]
    """Processes that stayed."""


def start(folder: Path, mark: str) -> "subprocess.Popen[str]":
    flags = [f"--{phase}.epochs={epochs}" for phase, epochs in EPOCHS.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.demo", "digits", "--json", *flags],
        env=ENVIRONMENT | {MARK: mark},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after(process: "subprocess.Popen[str]", pattern: str, number: int) -> tuple[list[str], str]:
    """Send the driver a signal as soon as its progress says so; what it had said, and what it said afterwards."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if re.search(pattern, line):
            os.kill(process.pid, number)
            break
    return said, process.communicate()[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder, mark = tmp_path_factory.mktemp("demo"), uuid.uuid4().hex
    first, _ = stop_after(start(folder, mark), rf"main +epoch +{EPOCHS['main']}/", signal.SIGKILL)
    second, end = stop_after(start(folder, mark), r"cloud +epoch +2/", signal.SIGTERM)
    store = f"sqlite:///{folder / 'outputs/mlflow/mlflow.db'}"
    stopped = statuses(store)
    finished = start(folder, mark)
    stdout, stderr = finished.communicate(timeout=400)
    assert finished.returncode == 0, stderr
    recipe = digits()
    for phase, epochs in EPOCHS.items():
        shorter = dataclasses.replace(getattr(recipe, phase), epochs=epochs)
        recipe = dataclasses.replace(recipe, **{phase: shorter})  # type: ignore[arg-type]
    return Demo(
        folder, store, json.loads(stdout), recipe, first, second, end, stopped, stderr.splitlines(), left_running(mark)
    )


def statuses(store: str) -> dict[str, str]:
    """By name; the run's own, which has a day and a time in it, as `digits`."""
    runs = MlflowClient(store).search_runs(["1"])
    return {str(run.info.run_name).partition("-")[0]: str(run.info.status) for run in runs}


def trained(said: list[str]) -> list[tuple[str, int]]:
    """Phase and number of each epoch in a command's progress."""
    found = [re.search(r"(\w+) +epoch +(\d+)/", line) for line in said]
    return [(match[1], int(match[2])) for match in found if match]


WHOLE = [(phase, epoch) for phase in PHASES for epoch in range(1, EPOCHS[phase] + 1)]


def test_interrupted_run_goes_on_where_it_stopped(demo: Demo) -> None:
    """Between phases and inside one: each command trains what the one before had not (its workers may outlive it)."""
    assert trained(demo.first) == WHOLE[: EPOCHS["main"]]
    begun = WHOLE.index(trained(demo.second)[0])
    assert begun >= EPOCHS["main"] - 1, "the main phase is not run again"
    assert trained(demo.second) == WHOLE[begun : WHOLE.index(("cloud", 2)) + 1]
    assert any("going on with the interrupted run" in line for line in demo.third)
    left = trained(demo.third)
    assert 0 < len(left) < EPOCHS["cloud"], "finished phases are not run again"
    assert left == WHOLE[-len(left) :]


def test_runs_of_a_command_that_was_stopped_are_closed_until_it_goes_on(demo: Demo) -> None:
    assert demo.stopped == dict.fromkeys(("digits", "main", "extension", "cloud"), "KILLED"), demo.end
    assert statuses(demo.store) == dict.fromkeys(demo.stopped, "FINISHED")


def test_interrupted_run_equals_an_uninterrupted_one(demo: Demo, splits: Splits) -> None:
    """Killed twice, it ends with the weights and hard classes of one that was left alone, in one process."""
    alone = Trainer(demo.recipe, splits, SingleProcess()).run()
    model = artifact.load(demo.folder / "outputs/demo/model")
    assert list(model.hard_classes) == alone.hard_classes
    for phase, module in model.networks.trained.items():
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, alone.weights[phase][name], msg=lambda m, name=name: f"{name}: {m}")


def test_nothing_stays_running(demo: Demo) -> None:
    assert demo.left == []


def test_report_has_its_contract(demo: Demo) -> None:
    report = demo.report
    written = json.loads((demo.folder / "outputs/demo/report.json").read_text())
    assert written == report
    keys = {"recipe", "seed", "commit", "split", "hard_classes", "seconds", "routing_efficiency", "policies"}
    assert set(report) >= keys | {"operating_point", "files"}
    assert (report["recipe"], report["split"], len(report["hard_classes"])) == ("digits", "test", 5)
    assert set(report["policies"]) == POLICIES
    for policy in report["policies"].values():
        assert sum(policy["share"].values()) == pytest.approx(1)
        assert policy["joules_source"] == "modelled:horowitz_45nm+wifi"
    assert all(Path(path).exists() for path in report["files"].values())
    page = (demo.folder / "outputs/demo/report.html").read_text()
    assert page.count("<svg") == 4


def test_answers_over_http_equal_the_replayed_table(demo: Demo) -> None:
    http, point = demo.report["http"], demo.report["policies"]["operating_point"]
    assert http["images"] == demo.report["samples"] >= 450
    assert http["mismatches"] == 0
    assert http["degraded"] == 0
    assert http["accuracy"] == pytest.approx(point["accuracy"])
    for name, share in point["share"].items():
        assert http["exits"].get(name, 0) / http["images"] == pytest.approx(share)


def test_operating_point_was_chosen_on_validation_alone(demo: Demo) -> None:
    """The table's validation rows give the same point, whatever stands in its test rows."""
    table = ExitsTable.read(demo.folder / "outputs/demo/exits.parquet")
    split = table.table["split"].to_pylist()
    validation = ExitsTable(table.table.filter([name == "validation" for name in split]))
    space = SPACES["early_gates"]()
    sizes = space.sizes(len(table.hard_classes))
    found = search(validation, digits().operating_point, space.gates, sizes)
    assert found.chosen["id"] == demo.report["operating_point"]["id"]
    policy = Policy.from_dict(demo.report["operating_point"])
    assert replay(table.exits("test"), table.costs, policy).accuracy == pytest.approx(
        demo.report["policies"]["operating_point"]["accuracy"]
    )
    assert policy_of(found.front, 0, table.hard_classes).hard_classes == table.hard_classes[:1]


def test_mlflow_has_the_run_its_phases_and_the_champion(demo: Demo) -> None:
    client = MlflowClient(demo.store, demo.store)
    champion = client.get_model_version_by_alias("meanet", "champion")
    assert champion.version == client.get_model_version_by_alias("meanet", "candidate").version
    assert int(champion.version) == demo.report["model_version"]
    parent = client.get_run(str(champion.run_id))
    assert parent.info.status == "FINISHED"
    assert parent.data.params["main.epochs"] == str(EPOCHS["main"])
    assert parent.data.metrics["test/operating_point/accuracy"] == pytest.approx(
        demo.report["policies"]["operating_point"]["accuracy"]
    )
    assert len(parent.inputs.dataset_inputs) == 1
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"report.html", "report.json", "exits.parquet", "operating_point.json", "plots"}
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in nested} == {"main", "extension", "cloud"}
    for run in nested:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(set(steps)) == list(range(1, EPOCHS[run.info.run_name] + 1))
        assert run.info.status == "FINISHED"
