"""A run's folder: what goes on, and what begins anew."""

import dataclasses
from pathlib import Path

import pytest

from jobs._run import RunFolder
from meanet.errors import UserError
from meanet.recipes import digits


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
