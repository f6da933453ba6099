"""Studies without Ray: fronts, what phases are known by, and a whole trial in this process."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import short
from hypothesis import given
from hypothesis import strategies as st
from test_study_folder import record

from jobs._study import StudyFolder, TrialLog
from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.config import ModelConfig, Recipe
from meanet.data import Splits
from meanet.energy import CostModel
from meanet.errors import UserError
from meanet.evaluation import ExitsTable, exits_table
from meanet.fronts import pareto_front
from meanet.judge import Study, reference_of
from meanet.loop import SingleProcess
from meanet.operating_point import PolicySpace, sweep
from meanet.phases import PhaseStore, Trained, phase_keys
from meanet.recipes import RECIPES, digits
from meanet.replay import Exits, replay
from meanet.routing import Policy
from meanet.study import (
    FrontPoint,
    Measured,
    Params,
    Reference,
    Trial,
    gain,
    hypervolumes,
    measure,
    read_trial,
    read_trials,
    trial_id,
    union_front,
    write_trial,
)
from meanet.study_report import Chosen, Facts, best_trial, build, figures, front_csv
from meanet.study_report import write as write_report
from meanet.thresholds import Points
from meanet.tracking import Tracker
from meanet.training import build_networks, resident_feed
from meanet.trial import RUNGS, Rung, TrialRun, keep_base, rungs
from tune_spaces.blocks import blocks
from tune_spaces.class_split import class_split

POLICIES = PolicySpace(("main_entropy", "max_softmax"), smallest_split=1)


# Fronts


def point(accuracy: float, joules: float) -> FrontPoint:
    return FrontPoint(accuracy, joules, 0.0, "main_entropy", (0.5,), scaled=False, num_hard_classes=1)


points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@given(points)
def test_hypervolume_equals_counting_cells(found: list[tuple[int, int]]) -> None:
    """On a grid, where accuracy above 6/20 and joules below 15 count."""
    reference = Reference(6 / 20, 15.0)
    cells = sum(
        any(a / 20 >= (row + 1) / 20 and j <= column for a, j in found) for row in range(6, 20) for column in range(15)
    )
    accuracy, joules = (np.array(values, dtype=float) for values in zip(*found, strict=True))
    assert reference.hypervolume(accuracy / 20, joules) == pytest.approx(cells / (14 * 15))


@given(points)
def test_best_point_alone_dominates_most(found: list[tuple[int, int]]) -> None:
    reference = Reference(6 / 20, 15.0)
    front = [point(a / 20, float(j)) for a, j in found]
    measured = measure(front, reference)
    alone = [measure([one], reference).hypervolume for one in front]
    mine = measure([point(measured.accuracy, measured.joules)], reference).hypervolume
    assert mine == pytest.approx(max(alone))
    assert measured.hypervolume >= max(alone) - 1e-12


def finished(name: str, *front: FrontPoint, state: str = "finished") -> Trial:
    return Trial(name, {"x": name}, state, measure(front or [point(0, 1)], Reference(0.5, 10.0)), front)


def test_union_front_and_gain() -> None:
    default = finished("a", point(0.6, 1.0), point(0.8, 4.0), point(0.9, 9.0))
    other = finished("b", point(0.5, 0.5), point(0.85, 4.0), point(0.9, 9.0))
    stopped = finished("c", point(1.0, 0.1), state="stopped")
    union = union_front([default, other, stopped])
    assert [(one.trial, one.point.accuracy) for one in union] == [("b", 0.5), ("a", 0.6), ("b", 0.85), ("a", 0.9)]
    over = gain([one.point for one in union], default.front)
    assert (over.accuracy, over.at_joules) == (pytest.approx(0.05), 4.0)
    assert over.dominates
    assert not gain(default.front, default.front).dominates
    cheaper = gain([point(0.8, 3.0)], default.front)
    assert cheaper.joules_share == pytest.approx(0.25)
    assert hypervolumes([default, other], Reference(0.5, 10.0)) == sorted(
        hypervolumes([default, other], Reference(0.5, 10.0))
    )
    assert front_csv(union).splitlines()[1].startswith("b,0.5,0.5,")


# Phases


def test_keys_cover_what_matters_and_nothing_else() -> None:
    recipe = digits()
    keys = phase_keys(recipe, "d", 10)

    def changed(**fields: object) -> set[str]:
        other = dataclasses.replace(recipe, **fields)  # type: ignore[arg-type]
        return {phase for phase, key in phase_keys(other, "d", 10).items() if key != keys[phase]}

    def model(**fields: object) -> ModelConfig:
        return dataclasses.replace(recipe.model, **fields)  # type: ignore[arg-type]

    assert changed(split=dataclasses.replace(recipe.split, num_hard_classes=3)) == {"extension"}
    assert changed(split=dataclasses.replace(recipe.split, method="random")) == {"extension"}
    assert changed(extension=dataclasses.replace(recipe.extension, epochs=3)) == {"extension"}
    assert changed(model=model(join="sum")) == {"extension"}
    assert changed(model=model(main_pool=1)) == {"main", "extension"}
    assert changed(main=dataclasses.replace(recipe.main, epochs=3)) == {"main", "extension"}
    assert changed(cloud=dataclasses.replace(recipe.cloud, epochs=3)) == {"cloud"}
    assert changed(model=model(cloud_stem_width=8)) == {"cloud"}
    assert changed(seed=3) == {"main", "extension", "cloud"}
    assert changed(energy=dataclasses.replace(recipe.energy, link="lte")) == set()
    assert {phase for phase, key in phase_keys(recipe, "e", 10).items() if key != keys[phase]} == set(keys)
    implicit = dataclasses.replace(recipe, split=dataclasses.replace(recipe.split, num_hard_classes=None))
    assert phase_keys(implicit, "d", 10) == keys, "half of ten classes is five"


def test_every_field_of_a_model_is_in_some_key() -> None:
    recipe = RECIPES["imagenet_resnet18_b"]()
    keys = phase_keys(recipe, "d", 10)
    other: dict[str, object] = {"backbone": "residual", "main": recipe.model.adaptive, "cloud_backbone": "resnet18"}
    other |= {"stem": "3x3", "cloud_stem": "3x3", "join": "sum", "pretrained": True, "cloud_pretrained": True}
    other |= {"extension": recipe.model.adaptive[:1] * 4, "adaptive": recipe.model.adaptive[1:]}
    for field in dataclasses.fields(ModelConfig):
        value = other.get(field.name, 7)
        if field.name in ("main", "cloud"):
            continue  # only with a residual backbone, which changes its key in itself
        extra = {"main": recipe.model.adaptive} if field.name == "backbone" else {}
        model = dataclasses.replace(recipe.model, **{field.name: value}, **extra)  # type: ignore[arg-type]
        assert phase_keys(dataclasses.replace(recipe, model=model), "d", 10) != keys, field.name


def test_store_keeps_the_first_whole_and_logs_it(tmp_path: Path) -> None:
    store = PhaseStore(tmp_path / "phases")
    assert not store.has("main", "k")
    store.save("main", "k", Trained({"w": torch.ones(2)}, {"a": 1}), "one")
    store.save("main", "k", Trained({"w": torch.zeros(2)}, {"a": 2}), "two")
    kept = store.load("main", "k")
    assert torch.equal(kept.weights["w"], torch.ones(2))
    assert kept.facts == {"a": 1}
    assert [row["by"] for row in store.log()] == ["one"]
    (store.folder("main", "k") / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"main-k cannot be read .*: remove it to train that phase again"):
        store.load("main", "k")


def test_lock_admits_one_at_a_time(tmp_path: Path) -> None:
    store, order = PhaseStore(tmp_path), []

    def other() -> None:
        with store.lock("main", "k"):
            order.append("other")

    with store.lock("main", "k"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(5)
    assert order == ["first", "other"]


# A trial


def test_rungs_divide_the_schedule() -> None:
    assert rungs(40) == [10, 20, 30, 40]
    assert rungs(2) == [1, 2]
    assert rungs(1) == [1]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model: TrainedModel, table: ExitsTable, recipe: Recipe) -> Study:
    """Over the session's trained digits: its phases are the study's."""
    root = tmp_path_factory.mktemp("study")
    keep_base(root, model, 10)
    exits = table.exits("validation")
    space = class_split(recipe, 10)
    return Study(str(root), recipe, space, POLICIES, reference_of(exits, table.costs), exits)


def exact(exits: Exits, costs: CostModel) -> Points:
    """The front of the study's policies, by the exact search itself."""
    sizes = range(1, len(exits.hard_classes) + 1)
    return pareto_front(sweep(exits, costs, POLICIES.gates, sizes).points)


def run(study: Study, params: Params, splits: Splits) -> tuple[Trial, list[Measured | None]]:
    """What a Tune trial does, in this process."""
    shown: list[Measured | None] = []
    one = TrialRun(study, params, splits, ("extension",))
    one.start()
    assert not one.needs_main, "the split is no matter of the main block"
    if not one.needs_extension:
        return one.leave(), shown
    rung = Rung(one, shown.append)
    trial = one.train_extension(SingleProcess(rung), resident_feed, rung)
    assert trial is not None
    return trial, shown


@pytest.fixture(scope="module")
def trial(study: Study, splits: Splits) -> tuple[Trial, list[Measured | None]]:
    return run(study, {"split.num_hard_classes": 3, "split.method": "lowest_recall"}, splits)


def test_trial_leaves_a_model_whose_exits_are_the_front(
    study: Study, splits: Splits, trial: tuple[Trial, list[Measured | None]]
) -> None:
    """What was judged on the cached answers is what every network run once says."""
    found, shown = trial
    assert len(shown) == len(rungs(study.recipe.extension.epochs)) - 1, "the last rung is the finished trial"
    assert read_trial(study.trials / found.id) == found
    model = artifact.load(study.trials / found.id / "model")
    assert len(model.hard_classes) == 3
    assert model.operating_point == found.operating_point
    whole = ExitsTable(exits_table(model, splits))
    exits = whole.exits("validation")
    front = exact(exits, whole.costs)
    np.testing.assert_allclose([p.accuracy for p in found.front], front.accuracy, atol=2 / exits.num_samples)
    np.testing.assert_allclose([p.joules for p in found.front], front.joules, rtol=0.02)
    expected = replay(exits, whole.costs, model.policy)
    assert found.operating_point is not None
    assert found.operating_point["expected"]["accuracy"] == pytest.approx(expected.accuracy, abs=2 / exits.num_samples)


def test_default_trains_nothing_and_has_the_default_models_front(
    study: Study, splits: Splits, table: ExitsTable
) -> None:
    found, shown = run(study, study.space.first[0], splits)
    assert shown == []
    front = exact(table.exits("validation"), table.costs)
    np.testing.assert_allclose([p.accuracy for p in found.front], front.accuracy, atol=2e-3)
    assert found.hard_classes == table.hard_classes


def test_trials_share_the_clouds_file_and_the_main_blocks_answers(
    study: Study, splits: Splits, trial: tuple[Trial, list[Measured | None]]
) -> None:
    run(study, study.space.first[0], splits)
    files = list(study.trials.glob("*/model/cloud.safetensors"))
    assert len(files) >= 2
    assert len({file.stat().st_ino for file in files}) == 1
    phases = [row["phase"] for row in study.store.log()]
    assert phases.count("main") == phases.count("cloud") == 1


def test_other_main_block_is_trained_once_for_the_trials_that_share_it(
    study: Study, splits: Splits, recipe: Recipe
) -> None:
    shaped = dataclasses.replace(study, space=blocks(recipe, 10), recipe=short(recipe, 1))
    keep = {**shaped.space.first[0], "blocks.main_blocks": 2}
    assert TrialRun(shaped, {**keep, "model.join": "sum"}, splits).needs_main
    one = TrialRun(shaped, {**keep, "model.join": "concat"}, splits, ("main", "extension"))
    one.train_main(SingleProcess(), resident_feed)
    rung = Rung(one, lambda _measured: None)
    store = shaped.store
    keep_cloud = store.load("cloud", phase_keys(study.recipe, splits.table.digest, 10)["cloud"])
    store.save("cloud", one.keys["cloud"], keep_cloud)
    trial = one.train_extension(SingleProcess(rung), resident_feed, rung)
    assert trial is not None
    assert artifact.load(shaped.trials / trial.id / "model").macs.main > study_main_macs(study)
    assert not TrialRun(shaped, {**keep, "model.join": "sum"}, splits).needs_main


def study_main_macs(study: Study) -> int:
    networks = build_networks(study.recipe, (1, 8, 8), 10)
    from meanet.models import macs_of

    return macs_of(networks.meanet, networks.cloud, (1, 8, 8)).main


def test_damaged_record_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "x"
    write_trial(finished("x", point(0.5, 1.0)), folder)
    assert [one.id for one in read_trials(tmp_path / "trials")] == ["x"]
    (folder / "trial.json").write_text("{")
    with pytest.raises(UserError, match=r"trial.json cannot be read .*: remove .* to run the trial again"):
        read_trials(tmp_path / "trials")


def test_a_trial_is_named_by_its_parameters() -> None:
    assert trial_id({"a": 1, "b": 0.5}) == trial_id({"b": 0.5, "a": 1}) != trial_id({"a": 2, "b": 0.5})


# What a study says of itself


def test_report_says_whether_the_default_is_beaten(
    tmp_path: Path, study: Study, table: ExitsTable, trial: tuple[Trial, list[Measured | None]]
) -> None:
    found = trial[0]
    outcome = replay(table.exits("test"), table.costs, Policy(hard_classes=table.hard_classes))
    assert found.operating_point is not None
    stopped = dataclasses.replace(found, id="s", state="stopped", front=(), operating_point=None)
    trials = [found, stopped]
    assert best_trial(trials, digits().operating_point) is found
    with pytest.raises(UserError, match=r"no policy of any of the 1 trials keeps max_accuracy_loss_vs_cloud 0.005"):
        best_trial([stopped], digits().operating_point)
    facts = Facts(study.space, "digits", 0, "optuna", "c", study.reference, found.front, "the default's front")
    report = build(trials, facts, Chosen(found, found.operating_point, outcome, outcome))
    assert report["gain"]["dominates"] is False
    assert "does not dominate the default's front anywhere" in report["summary"]
    assert report["trials"] == {"finished": 1, "stopped": 1}
    worse = tuple(dataclasses.replace(p, accuracy=p.accuracy - 0.1) for p in found.front)
    beaten = build(trials, dataclasses.replace(facts, default=worse), Chosen(found, {}, outcome, outcome))
    assert "by up to 10.00 points of accuracy" in beaten["summary"]
    write_report(tmp_path, report, trials, facts)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert set(figures(trials, facts)) == {"union_front", "hypervolume", "parallel_coordinates"}


def test_trials_reach_mlflow_once(tmp_path: Path, trial: tuple[Trial, list[Measured | None]]) -> None:
    folder = StudyFolder.begin(tmp_path, record(tmp_path))
    tracker = Tracker(folder.record.tracking_uri)
    folder.record.mlflow_run = tracker.start_run("study", {}, {})
    log = TrialLog(folder, tracker)
    log.complete([trial[0]])
    TrialLog(StudyFolder.begin(tmp_path, record(tmp_path)), tracker).complete([trial[0]])
    runs = tracker._client.search_runs([tracker._experiment_id])
    nested = [one for one in runs if one.data.tags.get("mlflow.parentRunId") == folder.record.mlflow_run]
    assert len(nested) == 1
    assert nested[0].data.params["split.num_hard_classes"] == "3"
    assert nested[0].info.status == "FINISHED"
    assert {file.path for file in tracker._client.list_artifacts(nested[0].info.run_id)} == {"front.json", "plots"}


def test_rungs_that_mlflow_has_missed_are_logged_when_the_study_is_over(
    tmp_path: Path, trial: tuple[Trial, list[Measured | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder.begin(tmp_path, record(tmp_path))
    tracker = Tracker(folder.record.tracking_uri)
    folder.record.mlflow_run = tracker.start_run("study", {}, {})
    found, figures = trial[0], {"accuracy": 0.9, "joules": 1e-6}
    events: list[dict[str, object]] = [{"event": "start", "params": found.params}]
    events += [{"event": "rung", "rung": rung, "hypervolume": rung / 10, **figures} for rung in (1, 2, 3)]
    lines = [json.dumps({"trial": found.id, **event}) for event in events]
    progress = tmp_path / "progress" / f"{found.id}.jsonl"
    progress.parent.mkdir()
    log = TrialLog(folder, tracker)
    progress.write_text("\n".join(lines[:2]))
    log._log_news()
    with monkeypatch.context() as away:

        def gone(*_: object) -> None:
            raise ConnectionError("MLflow is away")

        away.setattr(tracker, "log_steps", gone)
        progress.write_text("\n".join(lines))
        log._log_news()
    log.complete([found])
    run = folder.record.trial_runs[found.id]
    history = tracker._client.get_metric_history(run, "hypervolume")
    values = [(1, 0.1), (2, 0.2), (3, 0.3), (RUNGS, found.measured.hypervolume)]
    assert sorted((point.step, point.value) for point in history) == values, "none twice"
