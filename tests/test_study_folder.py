"""A study's folder: which study goes on in it, and what is shown and logged of its trials while they run."""

import json
import threading
import time
from pathlib import Path

import pytest

from jobs._study import News, Record, StudyFolder, TrialLog
from meanet.tracking import Tracker


def record(root: Path, **other: object) -> Record:
    plan = {"trials": 4}
    fields = {"space": "s", "recipe": "digits", "digest": "d", "data_digest": "e", "plan": plan, **other}
    return Record(id="", tracking_uri=f"sqlite:///{root / 'mlflow.db'}", **fields)  # type: ignore[arg-type]


def test_interrupted_study_goes_on_and_a_finished_one_begins_anew(tmp_path: Path) -> None:
    first = StudyFolder.begin(tmp_path, record(tmp_path))
    (tmp_path / "phases").mkdir()
    (tmp_path / "trials" / "x").mkdir(parents=True)
    again = StudyFolder.begin(tmp_path, record(tmp_path))
    assert (again.record.id, again.resumed) == (first.record.id, True)
    assert not StudyFolder.begin(tmp_path, record(tmp_path, plan={"trials": 5})).resumed
    with StudyFolder.begin(tmp_path, record(tmp_path, plan={"trials": 5})).stage("report"):
        pass
    fresh = StudyFolder.begin(tmp_path, record(tmp_path, plan={"trials": 5}))
    assert not fresh.resumed
    assert not (tmp_path / "trials").exists()
    assert (tmp_path / "phases").exists(), "what phases have trained is good for every study"


def test_a_slow_store_holds_up_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = StudyFolder.begin(tmp_path, record(tmp_path))
    tracker = Tracker(folder.record.tracking_uri)
    answers, asked = threading.Event(), []

    def slow(name: str, *_: object) -> str:
        asked.append(name)
        assert answers.wait(60)
        return "run"

    def started(name: str) -> None:
        line = json.dumps({"trial": name, "event": "start", "params": {"x": 1}})
        (tmp_path / "progress" / f"{name}.jsonl").write_text(line + "\n")

    monkeypatch.setattr(tracker, "start_run", slow)
    (tmp_path / "progress").mkdir()
    with TrialLog(folder, tracker).following():
        started("a")
        until = time.monotonic() + 30
        while not asked and time.monotonic() < until:
            time.sleep(0.01)
        started("b")  # while the store is asked for a's run
        started("c")
        said = ""
        while said.count("started: x=1") < 3 and time.monotonic() < until:
            time.sleep(0.05)
            said += capsys.readouterr().err
        assert said.count("started: x=1") == 3
        assert set(folder.record.trial_runs) == set(), "the store has not answered yet"
        answers.set()
    assert asked == ["trial-a", "trial-b", "trial-c"]
    assert "started" not in capsys.readouterr().err, "each line once"


def test_what_trials_say_is_news_once_and_again_when_a_trial_begins_again(tmp_path: Path) -> None:
    news = News(tmp_path)
    assert news.read() == [], "no trial has begun"
    progress = tmp_path / "progress" / "a.jsonl"
    progress.parent.mkdir()
    first, rung, again = '{"event": "start", "at": 1}', '{"event": "rung", "at": 2}', '{"event": "start", "at": 3}'
    progress.write_text(f"{first}\n{rung[:9]}")
    assert [event["at"] for event in news.read()] == [1], "the second line is not whole"
    progress.write_text(f"{first}\n{rung}\n")
    assert [event["at"] for event in news.read()] == [2]
    assert news.read() == []
    progress.write_text(f"{again}\n{rung}\n{rung}\n")
    assert [event["at"] for event in news.read()] == [3, 2, 2], "of a new attempt, the first line, too"
