"""The commands with a user's mistakes: each names the value and the remedy, without a stack trace."""

import dataclasses
import importlib
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from pictures import coloured, encode, image_folder

from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.config import DataConfig
from meanet.data import load
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.tracking import Tracker


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Job = Callable[..., Done]


@pytest.fixture
def job(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Run a command's `main` in this process, in `folder`; an escaping exception (a stack trace) fails the test."""

    def run(name: str, *words: str, **environment: str) -> Done:
        monkeypatch.chdir(folder)
        for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(sys, "argv", [name, *words])
        capsys.readouterr()
        code = 0
        try:
            importlib.import_module(name).main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: TrainedModel, table: ExitsTable) -> Path:
    """A working directory with the run of a finished training in outputs/digits."""
    root = tmp_path_factory.mktemp("jobs")
    run = root / "outputs" / "digits"
    artifact.save(model, run / "model")
    record = {"id": "r", "recipe": "digits", "digest": "d", "tracking_uri": "u", "seconds": {"train": 1.0}}
    (run / "run.json").write_text(json.dumps(record))
    return root


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("train",), ("no recipe", "digits")),
        (("train", "cifar1000"), ("'cifar1000'", "digits")),
        (("train", "digits", "--main.epoch", "3"), ("--main.epoch",)),
        (("train", "digits", "--main.epochs", "many"), ("many",)),
        (("train", "digits", "--main.epochs", "0"), ("epochs is 0", "1 or more")),
        (("train", "digits", "--output", "/proc/nowhere"), ("/proc/nowhere", "--output")),
        (("evaluate", "digits", "--output", "elsewhere"), ("elsewhere", "jobs.train digits")),
        (("evaluate", "digits", "--main.epochs", "99"), ("flags ask for another recipe", "drop the flags")),
        (("train", "digits", "--name", "mine"), ("--name is 'mine'", "drop the flag")),
        (("sweep", "nothing.parquet"), ("nothing.parquet does not exist", "run the job")),
        (("register", "elsewhere"), ("elsewhere", "jobs.train")),
        (("promote",), ("version", "--rollback")),
        (("promote", "7"), ("no version '7'", "jobs.register")),
        (("promote", "--rollback"), ("no champion", "nothing to roll back")),
    ],
)
def test_mistakes_are_named(job: Job, folder: Path, words: tuple[str, ...], names: tuple[str, ...]) -> None:
    done = job(f"jobs.{words[0]}", *words[1:])
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said
    for name in names:
        assert name in said


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--workers", "0"), ("--workers is 0", "1 or more")),
        (("--workers", "99"), ("99 workers", "CPUs", "lower --workers")),
        (("--storage", "/proc/nowhere"), ("/proc/nowhere cannot be written", "--storage")),
    ],
)
def test_what_the_cluster_refuses_keeps_the_earlier_run(
    job: Job, folder: Path, words: tuple[str, ...], names: tuple[str, ...]
) -> None:
    done = job("jobs.train", "digits", *words)
    assert done.returncode == 1
    for name in names:
        assert name in done.stderr
    assert (folder / "outputs" / "digits" / "model" / "model.json").exists()


@pytest.mark.parametrize("hard", ["0", "10"])
def test_class_split_of_none_or_all(job: Job, folder: Path, hard: str) -> None:
    """Found before a worker starts, and the earlier run's model is still there."""
    done = job("jobs.train", "digits", "--split.num-hard-classes", hard, "--output", "split")
    assert done.returncode == 1
    assert f"num_hard_classes is {hard} of 10 classes: choose 1 to 9" in done.stderr


def test_unreachable_mlflow_keeps_what_was_finished(job: Job, folder: Path) -> None:
    done = job("jobs.train", "digits", MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert done.returncode == 1
    assert "http://127.0.0.1:1 does not answer" in done.stderr
    assert (folder / "outputs" / "digits" / "model" / "model.json").exists()


def test_demo_refuses_to_replace_a_champion_of_another_recipe(
    job: Job, folder: Path, tmp_path: Path, model: TrainedModel
) -> None:
    """Before it has trained anything."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Tracker(store)
    other = dataclasses.replace(model, recipe=dataclasses.replace(model.recipe, name="other"))
    tracker.promote(tracker.register(other, tracker.start_run("r", {}, {})))
    done = job("jobs.demo", "digits", "--output", str(tmp_path / "demo"), MLFLOW_TRACKING_URI=store)
    assert done.returncode == 1
    assert "is of recipe 'other' and the new one of 'digits': add --force" in done.stderr
    assert not (tmp_path / "demo").exists()


def test_registration_that_fails_closes_its_run(
    job: Job, folder: Path, tmp_path: Path, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise UserError("the disk is full")

    (folder / "outputs/digits/operating_point.json").write_text(json.dumps(model.operating_point))
    monkeypatch.setattr(Tracker, "register", full)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = job("jobs.register", "outputs/digits", "--engines", "none", MLFLOW_TRACKING_URI=store)
    assert (done.returncode, "the disk is full" in done.stderr) == (1, True)
    (run,) = MlflowClient(store).search_runs(["1"])
    assert (run.info.run_name, run.info.status) == ("register-digits", "FAILED")


def test_checkpoint_of_another_recipe(job: Job, folder: Path) -> None:
    other = folder / "other"
    shutil.copytree(folder / "outputs" / "digits", other)
    (other / "run.json").write_text((other / "run.json").read_text().replace('"digits"', '"imagenet"'))
    done = job("jobs.evaluate", "digits", "--output", "other")
    assert done.returncode == 1
    assert "holds a model of recipe 'imagenet', not 'digits'" in done.stderr


def test_model_of_another_recipe_in_the_folder(job: Job, folder: Path, model: TrainedModel) -> None:
    mixed = folder / "mixed"
    shutil.copytree(folder / "outputs" / "digits", mixed)
    artifact.save(dataclasses.replace(model, recipe=dataclasses.replace(model.recipe, name="other")), mixed / "model")
    done = job("jobs.evaluate", "digits", "--output", "mixed")
    assert done.returncode == 1
    assert "holds a model of recipe 'other', not 'digits'" in done.stderr


def test_evaluate_sweep_register_promote_by_json(job: Job, folder: Path) -> None:
    """The jobs hand on to each other by what they write."""
    evaluated = json.loads(job("jobs.evaluate", "digits", "--json").stdout)
    assert evaluated["split"] == "test"
    swept = json.loads(job("jobs.sweep", evaluated["exits"], "--json").stdout)
    assert swept["points"] > 1000
    gates = {"main_entropy", "accepted_entropy", "max_softmax", "margin", "two_gate"}
    assert {row["gate"] for row in swept["front"]} == gates
    assert {row["scaled"] for row in swept["front"]} == {False, True}
    assert all(row["split"] == "validation" and 0 <= row["test"]["accuracy"] <= 1 for row in swept["front"])
    assert swept["operating_point"]["split"] == "validation"
    registered = job("jobs.register", "outputs/digits", "--json")
    first = json.loads(registered.stdout)
    assert "exported onnx" in registered.stderr
    assert "onnx_int8 is " in registered.stderr
    assert json.loads(job("jobs.promote", "candidate", "--json").stdout)["champion"] == first["version"]
    again = job("jobs.register", "outputs/digits", "--json")
    second = json.loads(again.stdout)
    assert "exported" not in again.stderr, "the same weights need it once"
    promoted = json.loads(job("jobs.promote", str(second["version"]), "--json").stdout)
    assert promoted == {"model": "meanet", "champion": second["version"], "replaced": first["version"]}
    back = json.loads(job("jobs.promote", "--rollback", "--json").stdout)
    assert back["champion"] == first["version"]


def test_paper_space_and_other_link(job: Job, folder: Path) -> None:
    exits = "outputs/digits/exits.parquet"
    if not (folder / exits).exists():
        assert job("jobs.evaluate", "digits").returncode == 0
    paper = json.loads(
        job("jobs.sweep", exits, "--space", "paper", "--link", "lte", "--output", "p.json", "--json").stdout
    )
    assert {row["gate"] for row in paper["front"]} == {"main_entropy"}
    assert paper["operating_point"]["expected"]["joules_source"] == "modelled:horowitz_45nm+lte"
    assert json.loads((folder / "p.json").read_text())["id"] == paper["operating_point"]["id"]
    nowhere = job("jobs.sweep", exits, "--output", "/proc/nowhere/p.json")
    assert nowhere.returncode == 1
    assert "/proc/nowhere/p.json cannot be written" in nowhere.stderr
    unknown = job("jobs.sweep", exits, "--link", "pigeon")
    assert unknown.returncode == 1
    assert "unknown link profile 'pigeon': choose one of wifi, lte, 3g" in unknown.stderr


def test_constraints_choose_and_say_when_they_cannot_be_kept(job: Job, folder: Path) -> None:
    exits = "outputs/digits/exits.parquet"
    if not (folder / exits).exists():
        assert job("jobs.evaluate", "digits").returncode == 0

    def point(*flags: str) -> dict[str, Any]:
        done = job("jobs.sweep", exits, "--space", "one_gate", "--json", "--output", "c.json", *flags)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["operating_point"]
        return found

    share = point("--max-cloud-share", "0.1")
    assert share["expected"]["share"]["cloud"] <= 0.1
    assert share["constraint"] == {"max_cloud_share": 0.1, "confidence": 0.95, "objective": "max accuracy"}
    energy = point("--max-energy", "0.000005", "--min-accuracy", "0.5")
    assert sum(energy["expected"]["joules"].values()) <= 5e-6
    assert energy["constraint"]["objective"] == "min joules"
    latency = point("--max-latency", "0.00001")
    assert latency["expected"]["latency"] <= 1e-5
    impossible = job("jobs.sweep", exits, "--min-accuracy", "1", "--max-cloud-share", "0.01")
    assert impossible.returncode == 1
    assert "no policy keeps min-accuracy 1, max-cloud-share 0.01" in impossible.stderr
    assert "accuracy can reach 0." in impossible.stderr
    for flag, value in (("--max-cloud-share", "2"), ("--max-energy", "0"), ("--min-accuracy", "-1")):
        wrong = job("jobs.sweep", exits, flag, value)
        assert wrong.returncode == 1
        assert f"{flag[2:].replace('-', '_')} is {float(value)}" in wrong.stderr


def test_truncated_exits_table(job: Job, folder: Path, table: ExitsTable) -> None:
    path = folder / "cut.parquet"
    pq.write_table(table.table, path)
    path.write_bytes(path.read_bytes()[:-1000])
    done = job("jobs.sweep", "cut.parquet")
    assert done.returncode == 1
    assert "cut.parquet is no whole Parquet file" in done.stderr


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_serving_on_a_busy_port_or_without_a_champion(job: Job, folder: Path, tmp_path: Path, busy_port: int) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    none = job("serve_apps.__main__", MLFLOW_TRACKING_URI=store)
    assert none.returncode == 1
    assert "no alias 'champion'" in none.stderr
    assert "jobs.promote" in none.stderr
    busy = job("serve_apps.__main__", "--port", str(busy_port), MLFLOW_TRACKING_URI=store)
    assert busy.returncode == 1
    assert f"127.0.0.1:{busy_port} is in use: choose another with --port" in busy.stderr
    beyond = job("serve_apps.__main__", "--port", "70000", MLFLOW_TRACKING_URI=store)
    assert beyond.returncode == 1
    assert "127.0.0.1:70000 cannot be used" in beyond.stderr
    none = job("serve_apps.__main__", "--edge-replicas", "0", "--port", "0", MLFLOW_TRACKING_URI=store)
    assert none.returncode == 1
    assert "--edge-replicas is 0: it must be 1 or more" in none.stderr
    for seconds in ("-1", "nan", "inf"):
        none = job("serve_apps.__main__", f"--follow-s={seconds}", "--port", "0", MLFLOW_TRACKING_URI=store)
        assert none.returncode == 1
        assert f"--follow-s is {seconds}: it must be a number of seconds, or 0 for never" in none.stderr


def test_help_of_serving_names_what_the_ready_file_holds(job: Job) -> None:
    """As `tests/conftest.py` and the benchmarks read it."""
    done = job("serve_apps.__main__", "--help", COLUMNS="200")
    assert done.returncode == 0
    assert '{"url", "pid"}' in " ".join(done.stdout.replace("\u2502", " ").split())


def test_describe_says_what_blocks_and_exits_cost(job: Job, folder: Path) -> None:
    """By recipe, link and upload; no data is read."""
    found = json.loads(job("jobs.describe", "cifar100_resnet32_b", "--json").stdout)
    assert set(found["blocks"]) == {"main", "adaptive", "extension", "cloud"}
    assert all(set(block) >= {"macs", "params", "training_bytes"} for block in found["blocks"].values())
    assert found["blocks"]["main"]["macs"] / 1e6 == pytest.approx(69.13, rel=0.015)
    main, extension, cloud, cloud_only = (found["exits"][name] for name in ("main", "extension", "cloud", "cloud_only"))
    assert main["edge_compute"] == pytest.approx(69.13e6 * 4.6e-12, rel=0.015)
    assert extension["edge_compute"] > main["edge_compute"] == cloud["edge_compute"] > cloud_only["edge_compute"] == 0
    assert cloud["upload"] == pytest.approx(7.13e-3, rel=1e-3), "a raw 32x32x3 image over WiFi"
    words = ("--energy.link", "lte", "--image-bytes", "1000", "--model.join", "sum", "--num-classes", "10")
    other = json.loads(job("jobs.describe", "cifar100_resnet32_b", *words, "--json").stdout)
    assert other["joules_source"] == "modelled:horowitz_45nm+lte"
    assert other["num_hard_classes"] == 5
    assert other["blocks"]["extension"]["macs"] < found["blocks"]["extension"]["macs"]
    assert "69.13 M" in job("jobs.describe", "cifar100_resnet32_b").stdout
    small = job("jobs.describe", "cifar100_resnet32_b", "--image-shape", "3", "8", "8")
    assert small.returncode == 1
    assert "model.main_pool is 8 but the main block's feature map is 2x2: lower it" in small.stderr


def test_ingest_writes_what_training_reads(job: Job, folder: Path, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", 2, 10, 12)
    (photos / "class1" / "cut.png").write_bytes(encode(coloured(1, 12, 0))[:100])
    done = job("jobs.ingest", f"folder:{photos}", str(tmp_path / "set"), "--max-bad-fraction", "0.1", "--json")
    said = json.loads(done.stdout)
    assert said["skipped"] == {"truncated": 1}
    assert "skipped 1 truncated: class1/cut.png" in done.stderr
    (written,) = said["sets"]
    assert (written["rows"], written["counts"]) == (20, {"class0": 10, "class1": 10})
    assert load(DataConfig(source=written["uri"])).digest == written["digest"]
    again = job("jobs.ingest", f"folder:{photos}", str(tmp_path / "set"), "--max-bad-fraction", "0.1")
    assert again.returncode == 1
    assert "holds Parquet files already: choose another folder" in again.stderr
    strict = job("jobs.ingest", f"folder:{photos}", str(tmp_path / "other"), "--max-bad-fraction", "0")
    assert strict.returncode == 1
    assert "1 of 21 rows" in strict.stderr
    assert "1 truncated: class1/cut.png" in strict.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["train", "evaluate", "demo", "sweep", "register", "promote", "describe", "ingest"])
def test_help(job: Job, folder: Path, name: str) -> None:
    words = (name, "digits", "--help") if name in ("train", "evaluate", "demo", "describe") else (name, "--help")
    done = job(f"jobs.{words[0]}", *words[1:])
    assert done.returncode == 0
    assert "--json" in done.stdout
    if name == "train":
        assert "--main.epochs" in done.stdout
