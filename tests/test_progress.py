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
    show = TrainingProgress(EPOCHS, {"main": 1e12, "extension": 1e12, "cloud": 3e12})
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


def test_what_epochs_take_beyond_their_work_is_not_multiplied_by_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits: the cloud's epoch has a hundred times the main block's MACs, and takes three times as long."""
    now = [100.0]
    monkeypatch.setattr("jobs._progress.time.monotonic", lambda: now[0])
    epochs = {"main": 24, "extension": 40, "cloud": 20}
    show = TrainingProgress(epochs, {"main": 1e8, "extension": 7e8, "cloud": 1.4e10})
    show(START | {"phases": list(epochs)})
    for number in range(1, 25):
        now[0] += 0.51
        show(epoch("main", number) | {"epochs": 24})
    assert capsys.readouterr().err.endswith("left 1:00\n"), "40 times 0.57 s and 20 times 1.9 s"
    for number in range(1, 41):
        now[0] += 0.57
        show(epoch("extension", number) | {"epochs": 40})
    assert capsys.readouterr().err.endswith("left 0:37\n"), "20 times 1.9 s"


def test_phases_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    show = TrainingProgress(EPOCHS, dict.fromkeys(EPOCHS, 1.0))
    show(START | {"phases": list(EPOCHS), "epochs_done": 3, "resumed": True})
    show(epoch("cloud", 1))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("3 of 5 epochs done")
    assert show._done == {"main": 2, "extension": 1, "cloud": 1}
