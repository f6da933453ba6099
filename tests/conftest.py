"""What tests share. Ray clusters are started by the tests that need them, on free ports, and end by handle."""

import dataclasses
import os
from pathlib import Path

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
from meanet.training import Trainer
from meanet.two_gate import EARLY

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))},
    "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
    "OMP_NUM_THREADS": "1",
}
"""For processes that tests start: this checkout's code, none of the caller's cluster or store."""

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
