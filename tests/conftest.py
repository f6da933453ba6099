"""What tests share. Ray clusters are started by the tests that need them, on free ports, and end by handle."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from untrained import Call, caller, run_folder_of, untrained_model

from meanet import artifact, data
from meanet.artifact import TrainedModel
from meanet.config import Recipe
from meanet.data import Splits
from meanet.evaluation import ExitsTable, exits_table
from meanet.loop import SingleProcess, State
from meanet.operating_point import search
from meanet.recipes import digits
from meanet.routing import Policy
from meanet.tracking import Tracker
from meanet.training import Trainer
from meanet.two_gate import EARLY
from serve_apps.settings import Settings

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))},
    "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
    "OMP_NUM_THREADS": "1",
}
"""For processes that tests start: this checkout's code, none of the caller's cluster or store."""

PATIENT = Settings(deadline_s=60.0, cloud_budget_s=30.0, max_cloud_calls=64)
"""For tests that are not about time: the machine may be busy."""

torch.set_num_threads(1)


def short(recipe: Recipe, epochs: int = 3) -> Recipe:
    """The recipe with few epochs."""
    return dataclasses.replace(
        recipe,
        main=dataclasses.replace(recipe.main, epochs=epochs),
        extension=dataclasses.replace(recipe.extension, epochs=epochs),
        cloud=dataclasses.replace(recipe.cloud, epochs=epochs),
    )


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return short(digits(), 6)


@pytest.fixture(scope="session")
def splits(recipe: Recipe) -> Splits:
    return data.divide(data.load(digits().data), recipe.data, recipe.seed)


@pytest.fixture(scope="session")
def state(recipe: Recipe, splits: Splits) -> State:
    """A finished training of six epochs a phase, in this process."""
    return Trainer(recipe, splits, SingleProcess()).run()


@pytest.fixture(scope="session")
def table(state: State, splits: Splits) -> ExitsTable:
    return ExitsTable(exits_table(artifact.from_state(state, splits), splits))


@pytest.fixture(scope="session")
def model(state: State, splits: Splits, table: ExitsTable) -> TrainedModel:
    """The trained model under its operating point."""
    found = search(table, state_recipe(state).operating_point, EARLY, range(1, len(table.hard_classes) + 1))
    return artifact.from_state(state, splits).with_operating_point(found.chosen)


@pytest.fixture(scope="session")
def point(table: ExitsTable) -> Policy:
    """A policy of one threshold, with every hard class in use."""
    return Policy.from_dict(search(table, table.operating_point, ["main_entropy"], [len(table.hard_classes)]).chosen)


def state_recipe(state: State) -> Recipe:
    return Recipe.from_dict(state.recipe)


@pytest.fixture(scope="module")
def untrained(splits: Splits) -> TrainedModel:
    return untrained_model(splits)


@pytest.fixture
def run_folder(untrained: TrainedModel, tmp_path: Path) -> Path:
    return run_folder_of(untrained, tmp_path)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that the tests of a session share."""

    url: str
    pid: int
    """Of `python -m serve_apps`; the cluster's processes descend from it."""


@pytest.fixture(scope="session")
def served(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m serve_apps` of the trained model; runs until the session ends."""
    from server import serving  # which imports this module

    folder = tmp_path_factory.mktemp("served")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracker = Tracker(uri)
    tracker.promote(tracker.register(model, tracker.start_run("r", {}, {})))
    with serving(folder, uri) as url:
        yield Server(url, json.loads((folder / "ready.json").read_text())["pid"])


@pytest.fixture
def client(served: Server) -> Iterator[httpx.Client]:
    """Asks the shared server; after whatever the test has sent, the same version answers."""
    with httpx.Client(base_url=served.url, timeout=30) as client:
        before = client.get("/v1/model").json()
        yield client
        assert client.get("/healthz").json() == {"status": "ok", "model_version": before["version"]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared server are marked so, and come last: no other cluster of theirs runs beside it."""
    for item in items:
        if "served" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.served)
    items.sort(key=lambda item: "served" in getattr(item, "fixturenames", ()))
