"""Versions as replicas load them: tried before they are served, and networks shared where the weights are the same."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.preprocessing import Preprocessing
from meanet.runtime import Images
from meanet.tracking import Tracker
from serve_apps import loading
from serve_apps.cloud_calls import CloudRequest
from serve_apps.loading import Loader, fetched


@pytest.fixture(scope="module")
def loader(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """A store with version 1; 2, its weights under another threshold; 3, weights that are not finite; 4, other weights;
    5, the weights of 1 with images scaled otherwise."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}")
    run = tracker.start_run("r", {}, {})
    assert model.operating_point is not None
    other = model.with_operating_point(model.operating_point | {"thresholds": [0.123]})
    networks = artifact.build_networks(model.recipe, model.preprocessing.image_shape, 10)
    for name in ("meanet", "cloud"):
        state = getattr(model.networks, name).state_dict()
        getattr(networks, name).load_state_dict({key: value * float("nan") for key, value in state.items()})
    nudged = artifact.build_networks(model.recipe, model.preprocessing.image_shape, 10)
    for name in ("meanet", "cloud"):
        state = getattr(model.networks, name).state_dict()
        getattr(nudged, name).load_state_dict({key: value + (value != 0) * 1e-3 for key, value in state.items()})
    scaled = dataclasses.replace(model.preprocessing, mean=(0.5,))
    for one in (
        model,
        other,
        dataclasses.replace(model, networks=networks),
        dataclasses.replace(model, networks=nudged),
        dataclasses.replace(model, preprocessing=scaled),
    ):
        tracker.register(one, run)
    return Loader(tracker.uri, "auto", "node")


def test_new_operating_point_shares_the_networks(loader: Loader) -> None:
    first = loader.edge(1, {})
    second = loader.edge(2, {1: first})
    assert second.runtime.engine is first.runtime.engine
    assert (second.version, second.policy.thresholds) == (2, (0.123,))
    assert first.policy.thresholds != second.policy.thresholds
    assert first.node == "node"
    cloud = loader.cloud(1, {})
    assert loader.cloud(2, {1: cloud}).runtime.engine is cloud.runtime.engine


def test_versions_are_tried_on_an_image_that_is_read_as_clients_files_are(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, decode = list[Images](), Preprocessing.decode

    def decoded(self: Preprocessing, data: bytes) -> Images:
        read.append(decode(self, data))
        return read[-1]

    monkeypatch.setattr(Preprocessing, "decode", decoded)
    loader.edge(1, {})
    loader.cloud(1, {})
    assert [(image.shape, image.any()) for image in read] == [((8, 8, 1), False)] * 2


def test_other_weights_are_not_shared(loader: Loader) -> None:
    first, cloud = loader.edge(1, {}), loader.cloud(1, {})
    for version in (4, 5):
        assert loader.edge(version, {1: first}).runtime.engine is not first.runtime.engine
        assert loader.cloud(version, {1: cloud}).runtime.engine is not cloud.runtime.engine


def test_weights_that_say_nothing_are_refused(loader: Loader) -> None:
    with pytest.raises(UserError, match="main exit of version 3 says nothing of a blank image"):
        loader.edge(3, {})
    with pytest.raises(UserError, match="cloud's network of version 3"):
        loader.cloud(3, {})


def test_cloud_answers_by_its_own_preprocessing(loader: Loader, splits: Splits) -> None:
    cloud = loader.cloud(1, {})
    class_ids, confidences = cloud.classify(CloudRequest(1, None, splits.table.images[splits.test[:5]]))
    assert len(class_ids) == len(confidences) == 5
    assert all(0 < confidence <= 1 for confidence in confidences)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Versions that were fetched, each in a moment, into a place that all share."""
    found: list[int] = []

    @contextlib.contextmanager
    def place() -> Iterator[Path]:
        yield tmp_path

    def fetch(_uri: str, version: int, folder: Path) -> str:
        found.append(version)
        time.sleep(0.3)
        (folder / "model.json").write_text(str(version))
        return str(folder)

    monkeypatch.setattr(loading, "_shared_place", place)
    monkeypatch.setattr(loading, "_fetch", fetch)
    return found


def test_replicas_wait_for_one_fetch_and_read_it_together(fetches: list[int]) -> None:
    inside, seen = threading.Barrier(4), []

    def load() -> None:
        with fetched("sqlite:///store", 7) as folder:
            inside.wait(20)  # passes only if all of them are here at once
            seen.append((folder / "model.json").read_text())

    replicas = [threading.Thread(target=load) for _ in range(4)]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    assert (seen, fetches) == (["7"] * 4, [7])


def test_only_what_nobody_reads_is_forgotten(fetches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_KEPT_S", -1.0)
    with fetched("sqlite:///store", 1) as first:
        with fetched("sqlite:///store", 2) as second:
            assert (first / "model.json").exists()
            assert (second / "model.json").exists()
        with fetched("sqlite:///store", 3):
            assert (first / "model.json").exists()
            assert not second.exists(), "it was read, and nobody reads it any more"
    with fetched("sqlite:///store", 1):
        assert fetches == [1, 2, 3]


@pytest.fixture
def old(fetches: list[int], tmp_path: Path) -> list[Path]:
    """What says that versions 1 and 2 are there, fetched long ago."""
    for version in (1, 2):
        with fetched("sqlite:///store", version):
            pass
    found = sorted(tmp_path.glob("*.done"))
    for done in found:
        os.utime(done, (0, 0))
    fetches.clear()
    return found


def test_version_that_another_replica_forgets_first_stops_no_fetch(
    fetches: list[int], old: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_folder = shutil.rmtree

    def remove(folder: Path, **_words: object) -> None:
        remove_folder(folder, ignore_errors=True)
        for done in old:  # between the look at the folder and the look at the file
            done.unlink(missing_ok=True)

    monkeypatch.setattr(loading.shutil, "rmtree", remove)
    with fetched("sqlite:///store", 3) as folder:
        assert (folder / "model.json").read_text() == "3"
    assert fetches == [3]


def test_version_that_was_fetched_anew_meanwhile_is_not_forgotten(
    fetches: list[int], old: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def late(file: object, kind: int) -> None:
        if kind == fcntl.LOCK_EX | fcntl.LOCK_NB:  # had only after another replica has fetched it, and read it
            for done in old:
                os.utime(done)
        lock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(loading.fcntl, "flock", late)
    with fetched("sqlite:///store", 3):
        pass
    with fetched("sqlite:///store", 1) as first, fetched("sqlite:///store", 2) as second:
        assert (first / "model.json").exists()
        assert (second / "model.json").exists()
    assert fetches == [3]


def test_fetch_that_failed_is_tried_again(fetches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    working = loading._fetch

    def broken(*_words: object) -> str:
        raise UserError("away")

    monkeypatch.setattr(loading, "_fetch", broken)
    with pytest.raises(UserError, match="away"), fetched("sqlite:///store", 1):
        pass
    monkeypatch.setattr(loading, "_fetch", working)
    with fetched("sqlite:///store", 1) as folder:
        assert (folder / "model.json").read_text() == "1"
