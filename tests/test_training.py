"""The phases in one process: what learns, from what, and that an interruption changes nothing."""

import copy
import dataclasses
from dataclasses import asdict

import pytest
import torch
from conftest import short

from meanet.class_split import class_precision, lowest
from meanet.config import PhaseConfig, Recipe
from meanet.data import Splits
from meanet.errors import UserError
from meanet.loop import PHASES, Epoch, SingleProcess, State, learning_rate
from meanet.recipes import digits
from meanet.training import Trainer, check


def snapshots(recipe: Recipe, splits: Splits) -> list[State]:
    """The state after every epoch, as a checkpoint would hold it."""
    kept: list[State] = []

    def on_epoch(_row: Epoch, state: State) -> None:
        kept.append(State(**copy.deepcopy(asdict(state))))

    Trainer(recipe, splits, SingleProcess(on_epoch)).run()
    return kept


@pytest.fixture(scope="module")
def kept(splits: Splits) -> list[State]:
    return snapshots(short(digits(), 2), splits)


def same(one: State, other: State) -> bool:
    return one.hard_classes == other.hard_classes and all(
        torch.equal(tensor, other.weights[phase][name])
        for phase, weights in one.weights.items()
        for name, tensor in weights.items()
    )


@pytest.mark.parametrize("stop", range(5))
def test_resumed_after_any_epoch_equals_uninterrupted(kept: list[State], splits: Splits, stop: int) -> None:
    resumed = State(**copy.deepcopy(asdict(kept[stop])))
    finished = Trainer(short(digits(), 2), splits, SingleProcess(), resumed).run()
    assert finished.finished
    assert same(finished, kept[-1])
    assert [row["loss"] for row in finished.history] == [row["loss"] for row in kept[-1].history]


def test_same_seed_same_weights_other_seed_other(kept: list[State], splits: Splits) -> None:
    assert same(snapshots(short(digits(), 2), splits)[-1], kept[-1])
    other = snapshots(dataclasses.replace(short(digits(), 2), seed=1), splits)[-1]
    assert not same(other, kept[-1])


def test_main_block_stays_as_it_is_after_its_phase(kept: list[State]) -> None:
    """Weights and batch-norm statistics: the extension phase must not touch them."""
    after_main = next(state for state in kept if state.phase == 1)
    for name, tensor in after_main.weights["main"].items():
        assert torch.equal(tensor, kept[-1].weights["main"][name]), name


def test_phases_follow_in_order_and_learn(state: State) -> None:
    assert [row["phase"] for row in state.history] == [phase for phase in PHASES for _ in range(6)]
    for phase in PHASES:
        losses = [row["loss"] for row in state.history if row["phase"] == phase]
        assert losses[-1] < 0.7 * losses[0], phase


def test_extension_sees_hard_classes_only(state: State, recipe: Recipe, splits: Splits) -> None:
    trainer = Trainer(recipe, splits, SingleProcess(), State(**copy.deepcopy(asdict(state))))
    phase = trainer._extension()
    true = splits.table.labels[phase.train_rows.numpy()]
    assert set(true) == set(state.hard_classes)
    assert [state.hard_classes[label] for label in phase.labels[phase.train_rows].tolist()] == true.tolist()
    assert set(phase.train_rows.tolist()) <= set(splits.train.tolist())
    assert not trainer.networks.meanet.main.training


def test_hard_classes_have_the_lowest_validation_precision(state: State) -> None:
    hard, easy = state.hard_classes, set(range(10)) - set(state.hard_classes)
    precision = state.class_precision
    assert max(precision[c] for c in hard) <= min(precision[c] for c in easy)
    assert [precision[c] for c in hard] == sorted(precision[c] for c in hard)


def test_precision_counts_by_predicted_class() -> None:
    pred, labels = torch.tensor([0, 0, 1, 1, 1]).numpy(), torch.tensor([0, 1, 1, 1, 2]).numpy()
    precision = class_precision(pred, labels, 4)
    assert precision.tolist() == [1 / 3, 2 / 4, 0.0, 0.0]  # denominators start at 1; 2 and 3 are never predicted
    assert lowest(precision, 3) == [2, 3, 0]


def test_learning_rates() -> None:
    steps = PhaseConfig(epochs=10, schedule="steps", milestones=(4, 8), gamma=0.1, learning_rate=1.0)
    assert [round(learning_rate(steps, epoch * 5, 5), 6) for epoch in (0, 3, 4, 7, 8)] == [1, 1, 0.1, 0.1, 0.01]
    cycle = PhaseConfig(epochs=10, learning_rate=1.0)
    rates = [learning_rate(cycle, step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert 25 <= rates.index(max(rates)) <= 35
    assert rates[-1] < 0.01


@pytest.mark.parametrize("num_hard", [0, 10, 11])
def test_split_of_none_or_all_classes_is_refused(splits: Splits, num_hard: int) -> None:
    recipe = dataclasses.replace(digits(), split=dataclasses.replace(digits().split, num_hard_classes=num_hard))
    with pytest.raises(UserError, match=rf"num_hard_classes is {num_hard} of 10 classes: choose 1 to 9"):
        check(recipe, splits)
