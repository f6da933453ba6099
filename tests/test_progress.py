"""What a person sees of a training."""

from typing import Any

import pytest

from jobs._progress import TrainingProgress

EPOCHS = {"main": 2, "extension": 1, "cloud": 2}
START: dict[str, Any] = {"event": "start", "pid": 7, "workers": 1, "nodes": ["a"], "epochs_done": 0, "resumed": False}


def epoch(phase: str, number: int) -> dict[str, Any]:
    row = {"loss": 0.5, "validation_accuracy": 0.9, "epochs": EPOCHS[phase]}
    return {"event": "epoch", "phase": phase, "epoch": number, **row}


def test_phases_side_by_side_are_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("jobs._progress.time.monotonic", lambda: now[0])
    show = TrainingProgress(EPOCHS, {"main": 1.0, "extension": 1.0, "cloud": 3.0})
    show(START | {"phases": ["main", "extension"]})
    show(START | {"phases": ["cloud"], "epochs_done": 1, "resumed": True})
    now[0] += 10
    show(epoch("main", 1))
    now[0] += 10
    show(epoch("cloud", 2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("started on 1 node(s), pid 7, 0 of 3 epochs done (main and extension)")
    assert lines[1].endswith("resumed from the last checkpoint on 1 node(s), pid 7, 1 of 2 epochs done (cloud)")
    assert lines[2].endswith("left 0:50"), "10 s a unit of work, of which five are left"
    assert lines[3].endswith("left 0:10"), "20 s for four, and two are left"


def test_phases_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    show = TrainingProgress(EPOCHS, dict.fromkeys(EPOCHS, 1.0))
    show(START | {"phases": list(EPOCHS), "epochs_done": 3, "resumed": True})
    show(epoch("cloud", 1))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("3 of 5 epochs done")
    assert show._done == {"main": 2, "extension": 1, "cloud": 1}
