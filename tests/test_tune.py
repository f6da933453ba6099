"""Studies on Ray Tune: what is proposed, and a study that is killed in the middle and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import ENVIRONMENT
from mlflow import MlflowClient
from ray.tune.execution import class_cache

from jobs import register, tune
from meanet import artifact, tuning
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.phases import PhaseStore
from meanet.proposals import Plan, StudySearch, distribution, draw
from meanet.recipes import digits
from meanet.replay import replay
from meanet.study import Choice, FloatRange, IntRange, Measured, Space, Trial, read_trials, trial_id, write_trial
from meanet.trial import rungs
from meanet.tuning import StudyScheduler
from tune_spaces.class_split import class_split

TRIALS = 8
EPOCHS = {"main": 3, "extension": 40, "cloud": 3}
"""Trials take seconds each, so that a signal finds some of them still to do."""


# What is proposed


def proposals(search: StudySearch, count: int, first: int = 0) -> list[Any]:
    """So many, each told at once."""
    found = []
    for number in range(first, first + count):
        params = search.suggest(f"t{number}")
        if isinstance(params, dict):
            value = float(params["x"]) if "x" in params else 0.5
            search.on_trial_complete(f"t{number}", {"accuracy": value, "joules": value})
        found.append(params)
    return found


@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_each_configuration_is_proposed_once_the_default_first(tmp_path: Path, searcher: Any) -> None:
    space = Space("s", {"x": IntRange(1, 6), "y": Choice(("a", "b"))}, ({"x": 3, "y": "b"},))
    search = StudySearch(space, 0, Plan(searcher=searcher), tmp_path)
    found = proposals(search, 12)
    assert found[0] == {"x": 3, "y": "b"}
    assert len({trial_id(params) for params in found}) == 12, "all there are"
    assert proposals(search, 1, 12) == ["FINISHED"]


def test_restored_search_proposes_what_finished_unnoticed(tmp_path: Path) -> None:
    """Killed, Tune's record may be a moment older than the folders of trials."""
    space = Space("s", {"x": FloatRange(0.0, 1.0)}, ({"x": 0.5},))
    search = StudySearch(space, 0, Plan(), tmp_path)
    proposals(search, 3)
    search.save(str(tmp_path / "state"))
    unnoticed, cut_off = proposals(search, 2, 3)
    for number, params in enumerate((cut_off, unnoticed)):
        line = json.dumps({"trial": trial_id(params), "at": number, "event": "start", "params": params})
        (tmp_path / "progress").mkdir(exist_ok=True)
        (tmp_path / "progress" / f"{trial_id(params)}.jsonl").write_text(line + "\n")
    done = Trial(trial_id(unnoticed), unnoticed, "finished", Measured(0.5, 0.5, 0.5), ())
    write_trial(done, tmp_path / "trials" / done.id)
    restored = StudySearch(space, 1, Plan(), tmp_path)
    restored.restore(str(tmp_path / "state"))
    assert proposals(restored, 2, 4) == [unnoticed, cut_off]
    assert proposals(restored, 1, 6)[0] not in (unnoticed, cut_off)


def test_no_credential_travels_to_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    tuning.keep_credentials()

    class Trainable:
        pass

    sent = class_cache._ActorClassCache().get(Trainable)._default_options["runtime_env"]
    assert "secret-of-the-test" not in str(sent)
    assert "PL_DISABLE_FORK" in sent["env_vars"], "what Tune needs is sent as before"


def test_domains_in_optunas_words() -> None:
    assert distribution(IntRange(1, 3)) == optuna.distributions.IntDistribution(1, 3)
    assert distribution(FloatRange(0.1, 1.0, log=True)) == optuna.distributions.FloatDistribution(0.1, 1.0, log=True)
    import numpy as np

    generator = np.random.default_rng(0)
    for domain in (IntRange(2, 2), FloatRange(0.1, 10.0, log=True), FloatRange(-1.0, 1.0), Choice(("a", 1))):
        assert all(domain.holds(draw(domain, generator)) for _ in range(50))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no space given: choose one of blocks, class_split, gates, joint, training"),
        (("digits",), "unknown space 'digits'"),
        (("class_split",), "no recipe given"),
        (("class_split", "nothing"), "unknown recipe 'nothing'"),
        (("class_split", "--trials", "3"), "'--trials' stands where the recipe belongs"),
        (("class_split", "digits", "--trials", "0"), "--trials is 0: it must be 1 or more"),
        (("class_split", "digits", "--concurrent", "0"), "--concurrent is 0"),
        (("class_split", "digits", "--workers-per-trial", "-1"), "--workers-per-trial is -1: it must be 0 or more"),
        (("class_split", "digits", "--exits", "e.parquet"), "--exits e.parquet is for the space gates"),
        (("gates", "digits", "--exits", "e.parquet"), "e.parquet does not exist"),
        (("class_split", "digits", "--base", "nowhere"), "nowhere/model/model.json does not exist"),
        (("class_split", "digits", "--split.num-hard-classes", "10"), "num_hard_classes is 10 of 10 classes"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune", *words])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "tune-class_split-digits").exists()


# A study


@dataclass(frozen=True)
class Study:
    folder: Path
    store: str
    report: dict[str, Any]
    interrupted: set[str]
    """What MLflow said of its runs once Ctrl-C had ended it."""
    resumed: list[tuple[dict[str, float], list[str]]]
    """Of each attempt that went on: the trials that were finished before it, and its progress."""


def start(folder: Path) -> "subprocess.Popen[str]":
    flags = [f"--{phase}.epochs={epochs}" for phase, epochs in EPOCHS.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", "class_split", "digits", "--trials", str(TRIALS), "--json", *flags],
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(folder: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("trials/[!.]*/trial.json")}


def stop_at(process: "subprocess.Popen[str]", event: str, count: int, number: int) -> list[str]:
    """Send a signal at so many lines of trials about an event; what the command has said."""
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if sum(re.search(rf"trial \w+ {event}", one) is not None for one in said) == count:
            os.kill(process.pid, number)
            break
    else:
        raise AssertionError("".join(said))
    return [*said, *process.communicate()[1].splitlines()]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("tune")
    root = folder / "outputs" / "tune-class_split-digits"
    stop_at(start(folder), "finished", 2, signal.SIGKILL)
    kept = records(root)
    interrupted = start(folder)
    second = stop_at(interrupted, "started", 1, signal.SIGINT)
    assert interrupted.returncode == 130, "".join(second)
    kept_then = records(root)
    store = f"sqlite:///{folder / 'outputs/mlflow/mlflow.db'}"
    statuses = {str(run.info.status) for run in MlflowClient(store).search_runs(["1"])}
    finished = start(folder)
    stdout, stderr = finished.communicate(timeout=300)
    assert finished.returncode == 0, stderr
    return Study(root, store, json.loads(stdout), statuses, [(kept, second), (kept_then, stderr.splitlines())])


@pytest.mark.cluster
def test_study_that_was_cut_off_goes_on_and_repeats_no_finished_trial(study: Study) -> None:
    """First killed, then interrupted by Ctrl-C."""
    assert study.interrupted == {"FINISHED", "KILLED"}, "the default's runs were over"
    now = records(study.folder)
    for kept, said in study.resumed:
        assert len(kept) >= 2
        assert any("going on with the interrupted study" in line for line in said)
        assert not any("epoch" in line or "Traceback" in line for line in said), "the default is not trained again"
        assert {name: now[name] for name in kept} == kept, "their records are as they were"
        started = [match[1] for line in said if (match := re.search(r"trial (\w+) started", line))]
        assert not set(started) & set(kept)
    trained = [(row["phase"], row["key"]) for row in PhaseStore(study.folder / "phases").log()]
    assert len(trained) == len(set(trained))
    assert [phase for phase, _ in trained].count("main") == 1, "the split is no matter of the main block"


@pytest.mark.cluster
def test_study_is_whole(study: Study) -> None:
    report = study.report
    trials = read_trials(study.folder / "trials")
    assert len(trials) == TRIALS
    assert report["trials"]["finished"] + report["trials"]["stopped"] == TRIALS
    assert report["failed"] == {}
    by_trial = report["hypervolume"]["by_trial"]
    assert by_trial == sorted(by_trial)
    assert len(by_trial) == report["trials"]["finished"]
    default = class_split(digits(), 10).first[0]
    assert trial_id(default) in {trial.id for trial in trials}
    assert report["gain"]["dominates"] == ("dominates the default" in report["summary"])
    front = report["union_front"]
    assert [p["joules"] for p in front] == sorted(p["joules"] for p in front)
    assert [p["accuracy"] for p in front] == sorted(p["accuracy"] for p in front)
    for name in ("report.html", "union_front.csv", "parallel_coordinates.png", "exits.parquet"):
        assert (study.folder / name).stat().st_size > 0
    assert json.loads((study.folder / "report.json").read_text()) == report


@pytest.mark.cluster
def test_trials_report_every_rung(study: Study) -> None:
    default = trial_id(class_split(digits(), 10).first[0])
    for trial in read_trials(study.folder / "trials"):
        rows = [json.loads(line) for line in (study.folder / f"progress/{trial.id}.jsonl").read_text().splitlines()]
        shown = [row["epoch"] for row in rows if row["event"] == "rung"]
        whole = [] if trial.id == default else rungs(EPOCHS["extension"])[:-1]
        assert shown == whole[: len(shown)]
        assert trial.state == "stopped" or shown == whole


@pytest.mark.cluster
def test_chosen_model_is_the_cheapest_and_its_figures_are_of_test(study: Study) -> None:
    chosen, trials = study.report["chosen"], read_trials(study.folder / "trials")
    joules = {t.id: sum(t.operating_point["expected"]["joules"].values()) for t in trials if t.operating_point}
    assert joules[chosen["trial"]] == min(joules.values())
    model = artifact.load(study.folder / "model")
    table = ExitsTable.read(study.folder / "exits.parquet")
    assert list(model.hard_classes) == chosen["hard_classes"]
    outcome = replay(table.exits("test"), table.costs, model.policy)
    assert (outcome.accuracy, outcome.joules) == (chosen["test"]["accuracy"], chosen["test"]["joules"])


@pytest.mark.cluster
def test_every_trial_is_one_nested_run(study: Study) -> None:
    client = MlflowClient(study.store)
    runs = client.search_runs([client.get_experiment_by_name("meanet").experiment_id], max_results=100)  # type: ignore[union-attr]
    record = json.loads((study.folder / "study.json").read_text())
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == record["mlflow_run"]]
    of_trials = [run.data.tags["trial"] for run in nested if "trial" in run.data.tags]
    assert sorted(of_trials) == sorted(trial.id for trial in read_trials(study.folder / "trials"))
    for run in nested:
        assert run.info.status in ("FINISHED", "KILLED")
        if "trial" in run.data.tags:
            assert {"split.method", "split.num_hard_classes"} <= set(run.data.params)
            assert "hypervolume" in run.data.metrics
    parent = client.get_run(record["mlflow_run"])
    assert parent.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(record["mlflow_run"])}
    files |= {file.path for file in client.list_artifacts(record["mlflow_run"], "plots")}
    assert files >= {"report.html", "union_front.csv", "plots/parallel_coordinates.png", "plots/hypervolume.png"}


@pytest.mark.cluster
def test_register_takes_the_chosen_or_any_other_trial(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.store)
    chosen = study.report["chosen"]["trial"]
    other = next(t for t in read_trials(study.folder / "trials") if t.operating_point and t.id != chosen)
    for words, hard in ((), study.report["chosen"]["hard_classes"]), (("--trial", other.id), other.hard_classes):
        monkeypatch.setattr(sys, "argv", ["register", str(study.folder), *words, "--json"])
        register.main()
        version = json.loads(capsys.readouterr().out)["version"]
        model = artifact.load(tune.Tracker(study.store).download_to(version, tmp_path / str(version)))
        assert model.hard_classes == tuple(hard)
        assert model.policy.hard_classes == model.hard_classes[: len(model.policy.hard_classes)]
    monkeypatch.setattr(sys, "argv", ["register", str(study.folder), "--trial", "none"])
    with pytest.raises(SystemExit):
        register.main()
    assert "has no trial 'none' with an operating point: choose one of" in capsys.readouterr().err


@pytest.mark.cluster
def test_gates_search_a_tables_policies(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The exact front's points come first, and what is chosen registers with one threshold a class."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.store)
    words = ["gates", "digits", "--exits", str(study.folder / "exits.parquet"), "--trials", "8", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.tune", *words],
        env=ENVIRONMENT | {"MLFLOW_TRACKING_URI": study.store},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["trials"] == {"finished": 8, "stopped": 0}
    point = report["chosen"]["operating_point"]
    assert (point["gate"], len(point["thresholds"])) == ("per_class", 10)
    monkeypatch.setattr(sys, "argv", ["register", str(tmp_path / "outputs/tune-gates-digits"), "--json"])
    register.main()
    version = json.loads(capsys.readouterr().out)["version"]
    model = artifact.load(tune.Tracker(study.store).download_to(version, tmp_path / "there"))
    assert model.policy.gate == "per_class"


def test_more_workers_than_the_plan_allows() -> None:
    with pytest.raises(UserError, match="--workers-per-trial is -2: it must be 0 or more"):
        Plan(workers=-2)


def test_scheduler_stops_the_worse_half_but_never_the_default() -> None:
    @dataclass
    class Tried:
        """What the scheduler looks at of a trial."""

        trial_id: str
        config: dict[str, Any]

    default = {"x": 0}
    scheduler = StudyScheduler(default)
    trials = [Tried(str(number), {"x": number}) for number in range(8)]
    decisions: dict[int, list[str]] = {number: [] for number in range(8)}
    for trial in reversed(trials):  # the later ones are better
        scheduler.on_trial_add(None, trial)
    for rung in (1, 2):
        for number, trial in reversed(list(enumerate(trials))):
            result = {"training_iteration": rung, "hypervolume": number / 10}
            decisions[number].append(scheduler.on_trial_result(None, trial, result))
    assert decisions[0] == ["CONTINUE", "CONTINUE"]
    assert [decisions[number][1] for number in (7, 1, 2)] == ["CONTINUE", "STOP", "STOP"]
