"""Runs and registry in a SQLite store, as the embedded default has it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas
import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import NoCredentialsError
from conftest import ENVIRONMENT
from mlflow import MlflowClient

from meanet import artifact, engines, onnx_export
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import AwayError, UserError
from meanet.preprocessing import encode_png
from meanet.routing import Exit
from meanet.runtime import Cascade
from meanet.tracking import Tracker, store_uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def tracker(uri: str) -> Tracker:
    return Tracker(uri)


@pytest.fixture(scope="module")
def run(tracker: Tracker, model: TrainedModel) -> str:
    return tracker.start_run("a-run", model.recipe.to_dict(), {"recipe": "digits"})


@pytest.fixture(scope="module")
def versions(tracker: Tracker, model: TrainedModel, run: str) -> tuple[int, int, int]:
    """Two versions of one recipe and one of another."""
    other = dataclasses.replace(model, recipe=dataclasses.replace(model.recipe, name="other"))
    return tracker.register(model, run), tracker.register(model, run), tracker.register(other, run)


def test_run_has_parameters_steps_and_dataset(tracker: Tracker, run: str, splits: Splits) -> None:
    tracker.log_steps(run, [(1, {"loss": 2.0}), (2, {"loss": 1.0})])
    tracker.log_dataset(run, splits.table)
    nested = tracker.start_run("main", {"epochs": 3}, {}, parent=run)
    found = tracker._client.get_run(run)
    assert found.data.params["main.epochs"] == "6"
    assert found.data.metrics["loss"] == 1.0
    assert tracker.logged_steps(run, "loss") == {1, 2}
    assert found.inputs.dataset_inputs[0].dataset.digest == splits.table.digest[:36]
    assert tracker._client.get_run(nested).data.tags["mlflow.parentRunId"] == run


def test_download_gives_back_the_same_model(
    tracker: Tracker, versions: tuple[int, ...], model: TrainedModel, tmp_path: Path
) -> None:
    downloaded = artifact.load(tracker.download_to(versions[0], tmp_path))
    assert downloaded.recipe == model.recipe
    assert downloaded.operating_point == model.operating_point
    assert downloaded.hard_classes == model.hard_classes


def test_exported_engines_travel_with_the_version(model: TrainedModel, splits: Splits, tmp_path: Path) -> None:
    """And the registered model answers by the one that is asked for."""
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db")
    run = tracker.start_run("r", {}, {})
    folder = artifact.save(model, tmp_path / "model")
    onnx_export.export(model, folder, splits, "onnx")
    version = tracker.register(model, run, folder)
    there = tracker.download_to(version, tmp_path / "there")
    assert engines.choose(there) == "onnx"
    assert (there / "engines.json").read_text() == (folder / "engines.json").read_text()
    images = splits.table.images[splits.test[:40]]
    wanted = Cascade(model).classify(images).pred.tolist()
    frame = pandas.DataFrame({"image": [encode_png(image) for image in images]})
    place = tracker._client.get_model_version_download_uri("meanet", str(version))
    for name, engine in (("auto", "OnnxEdge"), ("torch", "TorchEdge")):
        loaded = mlflow.pyfunc.load_model(place, model_config={"engine": name})
        assert loaded.predict(frame)["class_id"].tolist() == wanted
        assert type(loaded._model_impl._edge.engine).__name__ == engine


def test_newest_version_is_candidate(tracker: Tracker, versions: tuple[int, ...]) -> None:
    assert tracker.version_of("candidate") == versions[-1]


def test_promotion_and_rollback(tracker: Tracker, versions: tuple[int, int, int]) -> None:
    first, second, other = versions
    with pytest.raises(UserError, match=r"no alias 'champion'.*version"):
        tracker.version_of("champion")
    with pytest.raises(UserError, match="no champion"):
        tracker.rollback()
    assert tracker.promote(first) is None
    with pytest.raises(UserError, match="replaced no other"):
        tracker.rollback()
    assert tracker.promote(second) == first
    assert tracker.version_of("champion") == second
    assert tracker.rollback() == (second, first)
    assert tracker.version_of("champion") == first
    with pytest.raises(UserError, match=r"recipe 'digits'.*'other'.*--force"):
        tracker.promote(other)
    assert tracker.version_of("champion") == first
    assert tracker.promote(other, force=True) == first
    assert tracker.promote(first, force=True) == other


def test_missing_version_lists_those_there_are(tracker: Tracker, versions: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"no version '99'.*version 1"):
        tracker.version_of("99")


def test_store_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Tracker(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    (tmp_path / "garbage.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"garbage.db cannot be used.*MLFLOW_TRACKING_URI"):
        Tracker(f"sqlite:///{tmp_path / 'garbage.db'}")


def test_server_that_does_not_answer() -> None:
    with pytest.raises(AwayError, match=r"http://127.0.0.1:1 does not answer.*MLFLOW_TRACKING_URI"):
        Tracker("http://127.0.0.1:1")


PLAIN = """
import sys, os
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/meanet/1")
frame = model.predict(pandas.DataFrame({"image": [open(path, "rb").read() for path in sys.argv[1:]]}))
print(frame.to_json(orient="records"))
assert "ray" not in sys.modules, "the registered model must not need Ray"
assert "platform" not in sys.modules["meanet"].__file__, "the version brings its own code"
"""


def test_registered_model_answers_in_plain_python(
    uri: str, versions: tuple[int, ...], model: TrainedModel, splits: Splits, tmp_path: Path
) -> None:
    """The version brings its own code: nothing of this checkout is on the path, and no pickle may be read."""
    images = splits.table.images[splits.test[:8]]
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(encode_png(image))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, paths)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    expected = Cascade(model).classify(images)
    assert [row["class_id"] for row in rows] == expected.pred.tolist()
    assert [row["exit"] for row in rows] == [Exit(value).label for value in expected.exit]


def test_relative_store_is_one_file_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the working directory of the command: workers and replicas have others."""
    monkeypatch.chdir(tmp_path)
    uri = store_uri("sqlite:///mine/mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/mine/mlflow.db"
    run = Tracker(uri).start_run("r", {}, {})
    assert Tracker("sqlite:///mine/mlflow.db").resume_run(run)
    assert not Tracker(uri).resume_run("0" * 32)
    assert store_uri("http://mlflow:5000") == "http://mlflow:5000"


def test_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"^tracking_uri is no address \(Invalid IPv6 URL\): correct it"):
        store_uri("http://[", "tracking_uri")


@pytest.mark.parametrize("uri", ["https://me:s3cret@mlflow:5000", "postgresql://me:s3cret@db/mlflow"])
def test_password_in_the_stores_address_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match=r"password for (mlflow|db).*MLFLOW_TRACKING_PASSWORD") as refused:
        store_uri(uri)
    assert "s3cret" not in str(refused.value)
    assert str(refused.value).startswith("MLFLOW_TRACKING_URI holds")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (ConnectionError("connection refused"), "connection refused"),
        (S3UploadFailedError("no such bucket"), "no such bucket"),
        (NoCredentialsError(), "Unable to locate credentials"),
    ],
)
def test_store_that_goes_away_is_no_stack_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception, said: str
) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = tracker.start_run("r", {}, {})

    def gone(*_args: object, **_options: object) -> None:
        raise trouble

    monkeypatch.setattr(MlflowClient, "log_batch", gone)
    with pytest.raises(AwayError, match=rf"does not answer any more \({said}\).*the same command again"):
        tracker.log_steps(run, [(1, {"loss": 1.0})])


def test_registered_model_names_all_that_it_needs(tracker: Tracker, versions: tuple[int, ...]) -> None:
    uri = tracker._client.get_model_version_download_uri("meanet", str(versions[0]))
    path = mlflow.artifacts.download_artifacts(uri, tracking_uri=tracker.uri)
    needed = {line.split("==")[0] for line in (Path(path) / "requirements.txt").read_text().splitlines()}
    assert needed >= {
        "torch",
        "torchvision",
        "pyarrow",
        "safetensors",
        "pydantic",
        "numpy",
        "pandas",
        "pillow",
        "onnxruntime",
    }
