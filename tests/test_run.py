"""A run's folder: what goes on, and what begins anew; and what MLflow says of what was stopped."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs._run import RunFolder, tracked
from meanet import tracking
from meanet.errors import UserError
from meanet.recipes import digits
from meanet.tracking import Tracker


def begin(root: Path, seed: int = 0, store: str = "s", data: str = "d") -> RunFolder:
    return RunFolder.begin(root, dataclasses.replace(digits(), seed=seed), store, data, goal="evaluate")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With an interrupted run: trained, not evaluated."""
    run = begin(tmp_path)
    with run.stage("train"):
        run.model.mkdir()
    return tmp_path


def test_interrupted_run_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = begin(root)
    assert again.resumed
    assert again.done("train")
    assert again.model.exists()
    assert "going on with the interrupted run" in capsys.readouterr().err


def test_finished_run_again_is_a_new_one(root: Path) -> None:
    first = begin(root)
    with first.stage("evaluate"):
        pass
    again = begin(root)
    assert again.record.id != first.record.id
    assert not again.resumed
    assert not again.done("train")
    assert not again.model.exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"store": "t"}, {"data": "e"}])
def test_other_flags_store_or_images_begin_anew(root: Path, other: dict[str, str]) -> None:
    """Other images would be divided otherwise: what was trained on might be reported on."""
    again = begin(root, **other)  # type: ignore[arg-type]
    assert not again.resumed
    assert not again.model.exists()


def test_damaged_record_is_named(root: Path) -> None:
    (root / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json cannot be read .*: remove that file"):
        begin(root)


def _fail() -> None:
    raise UserError("no")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # the signal ends it


@pytest.mark.parametrize(
    ("end", "raised", "says"),
    [
        (_fail, UserError, "FAILED"),
        (_interrupt, KeyboardInterrupt, "KILLED"),
        (_terminate, SystemExit, "KILLED"),
    ],
    ids=["failed", "Ctrl-C", "SIGTERM"],
)
def test_no_run_stays_open_behind_what_fails_or_is_stopped(
    end: Callable[[], None], raised: type[BaseException], says: str, root: Path
) -> None:
    tracker, before = Tracker(f"sqlite:///{root / 'mlflow.db'}"), signal.getsignal(signal.SIGTERM)
    elsewhere, ended = Tracker(tracker.uri).start_run("another process's", {}, {}), tracker.start_run("ended", {}, {})
    tracker.end_run(ended)
    begun: list[str] = []

    def status(run: str) -> str:
        return str(tracker._client.get_run(run).info.status)

    def begin() -> None:
        with tracked(tracker):
            begun.append(tracker.start_run("r", {}, {}))
            begun.append(tracker.start_run("main", {}, {}, parent=begun[0]))
            end()

    def go_on() -> None:
        again = Tracker(tracker.uri)
        with tracked(again):
            assert again.resume_run(begun[0])
            assert status(begun[0]) == "RUNNING"
            end()

    with pytest.raises(raised):
        begin()
    assert [status(run) for run in (*begun, ended, elsewhere)] == [says, says, "FINISHED", "RUNNING"]
    with pytest.raises(raised):
        go_on()
    assert status(begun[0]) == says
    assert signal.getsignal(signal.SIGTERM) == before
    with tracked(tracker):
        assert tracker.resume_run(begun[0])
        tracker.end_run(begun[0])
    assert status(begun[0]) == "FINISHED"


def test_runs_are_closed_once_the_store_answers_again_and_else_it_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, checks = Tracker(f"sqlite:///{root / 'mlflow.db'}"), iter([1, 0])
    run = tracker.start_run("r", {}, {})

    def away(uri: str) -> None:
        if next(checks, 1):
            raise UserError("the store is locked")

    monkeypatch.setattr(tracking, "_check_reachable", away)

    def failing() -> None:
        with tracked(tracker):
            _fail()

    with pytest.raises(UserError, match=r"^no$"):
        failing()
    assert tracker._client.get_run(run).info.status == "FAILED"
    assert capsys.readouterr().err == ""
    assert tracker.resume_run(run)
    assert tracker.close_open_runs("KILLED", patience_s=0.1) == "the store is locked"
    monkeypatch.setattr(tracker, "close_open_runs", functools.partial(tracker.close_open_runs, patience_s=0.1))
    with pytest.raises(UserError, match=r"^no$"):
        failing()
    assert "showing its runs as RUNNING: the store is locked" in capsys.readouterr().err
