"""The phases in one process: what learns, from what, and that an interruption changes nothing."""

import copy
import dataclasses
from dataclasses import asdict
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import short
from hypothesis import given
from hypothesis import strategies as st

from meanet.class_split import class_precision, class_recall, confusion_pairs, hard_classes, lowest
from meanet.config import PhaseConfig, Recipe, SplitConfig, SplitMethod
from meanet.data import Splits
from meanet.errors import UserError
from meanet.loop import INDEPENDENT, PHASES, Epoch, PhaseRunner, SingleProcess, State, learning_rate, merged
from meanet.recipes import digits
from meanet.training import Networks, Trainer, check


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


def test_phase_that_has_begun_keeps_its_classes(kept: list[State], splits: Splits) -> None:
    """On another machine, rounding might choose others than the exit was half trained for."""
    begun = State(**copy.deepcopy(asdict(kept[2])))
    assert (begun.phase, begun.epoch) == (1, 1)
    begun.hard_classes.reverse()
    finished = Trainer(short(digits(), 2), splits, SingleProcess(), begun).run()
    assert finished.hard_classes == kept[-1].hard_classes[::-1]


def test_published_weights_of_phases_to_come_are_taken_on_resuming(
    kept: list[State], splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(_recipe: Recipe, networks: Networks) -> None:
        for parameter in [*networks.cloud.parameters(), *networks.meanet.main.parameters()]:
            torch.nn.init.constant_(parameter, 0.5)

    monkeypatch.setattr("meanet.training.load_published_weights", publish)
    begun = State(**copy.deepcopy(asdict(kept[2])))
    networks = Trainer(short(digits(), 2), splits, SingleProcess(), begun).networks
    assert all((parameter == 0.5).all() for parameter in networks.cloud.parameters())
    for name, tensor in networks.meanet.main.state_dict().items():
        assert torch.equal(tensor, kept[2].weights["main"][name]), "what was trained stays"


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


def test_phases_trained_apart_make_the_same_run(kept: list[State], splits: Splits) -> None:
    """Main and extension in one group, the cloud network in another: nothing of one depends on the other."""
    parts = [(phases, Trainer(short(digits(), 2), splits, SingleProcess()).run(phases)) for phases in INDEPENDENT]
    whole = merged(parts[::-1])
    assert same(whole, kept[-1])
    assert whole.finished
    rows = [[{**row, "seconds": 0.0} for row in state.history] for state in (whole, kept[-1])]
    assert rows[0] == rows[1]
    assert (whole.hard_classes, whole.class_precision) == (kept[-1].hard_classes, kept[-1].class_precision)


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


def test_recall_counts_by_true_class() -> None:
    pred, labels = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 2])
    assert class_recall(pred, labels, 4).tolist() == [1.0, 2 / 3, 0.0, 0.0]


def test_confused_pairs_stay_together() -> None:
    """0 and 3 are mixed up most, then 1 and 2; of the last pair the class of lower precision takes the place left."""
    mixed = [(0, 3)] * 5 + [(3, 0)] * 4 + [(1, 2)] * 4 + [(2, 2)] * 9 + [(1, 1)] * 3 + [(4, 4)] * 9
    labels, pred = (np.array(column) for column in zip(*mixed, strict=True))
    assert sorted(confusion_pairs(pred, labels, 5, 2)) == [0, 3]
    three = confusion_pairs(pred, labels, 5, 3)
    assert sorted(three[:2]) == [0, 3]
    precision = class_precision(pred, labels, 5)
    assert three[2] == min((1, 2), key=lambda class_id: precision[class_id])
    assert sorted(confusion_pairs(pred, labels, 5, 4)) == [0, 1, 2, 3]


@given(st.integers(2, 12), st.integers(0, 2**31), st.data())
def test_every_choice_gives_h_different_classes(num_classes: int, seed: int, drawn: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    num_hard = drawn.draw(st.integers(1, num_classes - 1))
    pred, labels = generator.integers(0, num_classes, (2, 40))
    for method in get_args(SplitMethod):
        found = [
            hard_classes(method, pred, labels, num_classes=num_classes, num_hard=num_hard, seed=seed) for _ in range(2)
        ]
        assert found[0] == found[1]
        assert len(set(found[0])) == num_hard
        assert set(found[0]) <= set(range(num_classes))


@pytest.mark.parametrize("method", get_args(SplitMethod))
def test_each_choice_trains(method: SplitMethod, splits: Splits) -> None:
    base = short(digits(), 1)
    recipe = dataclasses.replace(base, split=SplitConfig(num_hard_classes=3, method=method))
    assert len(Trainer(recipe, splits, SingleProcess()).run().hard_classes) == 3


def test_frozen_features_are_computed_once_where_nothing_is_random(
    state: State, recipe: Recipe, splits: Splits
) -> None:
    """Without augmentation each hard image passes the main block once, however many epochs follow."""
    for flip in (False, True):
        fixed = dataclasses.replace(recipe.data, crop_padding=0, flip=flip)
        begun = State(recipe.to_dict(), phase=1, weights=copy.deepcopy(state.weights))
        asked = dataclasses.replace(recipe, data=fixed, extension=dataclasses.replace(recipe.extension, epochs=3))
        trainer = Trainer(asked, splits, SingleProcess(), begun)
        trainer._split_classes()
        passed: list[int] = []
        trainer.networks.meanet.main.features.register_forward_hook(
            lambda _module, inputs, _out, passed=passed: passed.append(len(inputs[0]))
        )
        phase = trainer._extension()
        split_pass, validation, train = len(splits.validation), len(phase.validation_rows), len(phase.train_rows)
        runner = PhaseRunner(phase, trainer.feed, trainer.worker, begun, 0)
        runner.run()
        trained = 3 * runner.steps * 64 if flip else train
        assert sum(passed) == split_pass + validation + trained


def test_features_kept_equal_features_computed(state: State, recipe: Recipe, splits: Splits) -> None:
    trainer = Trainer(recipe, splits, SingleProcess(), State(**copy.deepcopy(asdict(state))))
    trainer.networks.meanet.main.eval()
    rows = torch.from_numpy(splits.train[:40])
    kept, computed = (trainer._features(rows, fixed=fixed) for fixed in (True, False))
    for part in (rows[:25], rows[10:40], rows):
        ((_, images),) = trainer.feed.evaluate(part, 64)
        torch.testing.assert_close(kept(images, part), computed(images, part))


def test_mixed_precision_trains_as_well(splits: Splits) -> None:
    """Digits under bfloat16 autocast: the same accuracy within what another seed would change."""
    full, mixed = (
        Trainer(dataclasses.replace(short(digits(), 6), precision=precision), splits, SingleProcess()).run()
        for precision in ("float32", "bfloat16")
    )
    for phase in PHASES:
        one, other = ([row for row in state.history if row["phase"] == phase][-1] for state in (full, mixed))
        assert abs(one["validation_accuracy"] - other["validation_accuracy"]) < 0.05
        assert other["loss"] == pytest.approx(one["loss"], abs=0.15)
    assert all(tensor.dtype != torch.bfloat16 for tensor in mixed.weights["main"].values()), "weights stay whole"


def test_steps_an_epoch_can_be_cut(splits: Splits) -> None:
    base = short(digits(), 1)
    recipe = dataclasses.replace(base, main=dataclasses.replace(base.main, max_steps=2))
    history = Trainer(recipe, splits, SingleProcess()).run().history
    assert next(row["samples"] for row in history) == 2 * 64


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
