"""Two commands in one run's or study's folder exclude each other; one that is killed gives it up."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ENVIRONMENT, ROOT
from untrained import Call, run_folder_of

from jobs import demo, evaluate, register, train, tune
from jobs._alone import alone
from jobs._results import Results
from jobs._run import RunFolder
from jobs._study import Record, StudyFolder
from meanet import storage
from meanet.artifact import TrainedModel
from meanet.errors import UserError
from meanet.recipes import digits

HOLDS = """
import sys, time
from pathlib import Path
from jobs._alone import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """Another process has the folder."""
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_free_again_after_the_block_and_after_a_kill(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        with (
            pytest.raises(UserError, match=rf"another command is at work in {tmp_path}: wait .* with --output"),
            alone(tmp_path),
        ):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(2):
            with alone(tmp_path):
                pass


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (train, ("digits",)),
        (evaluate, ("digits",)),
        (demo, ("digits",)),
        (tune, ("class_split", "digits")),
        (tune, ("gates", "digits")),
    ],
    ids=["train", "evaluate", "demo", "tune", "gates"],
)
def test_second_command_in_a_folder_is_refused_and_changes_nothing(
    job: ModuleType, words: tuple[str, ...], untrained: TrainedModel, tmp_path: Path, call: Call
) -> None:
    folder = run_folder_of(untrained, tmp_path)
    with alone(folder):
        before = content(folder)
        done = call(job, *words, "--output", str(folder), "--seed", "1")
        assert content(folder) == before
    assert done.code == 1
    assert f"error: another command is at work in {folder}: wait for it to end" in done.err


def test_commands_that_read_are_not_refused(untrained: TrainedModel, tmp_path: Path, call: Call) -> None:
    folder = run_folder_of(untrained, tmp_path)
    (folder / "operating_point.json").write_text("{}")
    with alone(folder):
        done = call(register, str(folder))
    assert (done.code, "at work" in done.err) == (1, False), "it reads, and finds no operating point"
    done = call(evaluate, "digits", "--output", str(tmp_path / "mistyped"))
    assert "holds no finished training" in done.err
    assert not (tmp_path / "mistyped").exists()


def test_lock_outlives_what_clears_a_folder_and_is_copied_nowhere(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with alone(here):
        for data in ("one", "another"):  # the second drops what the first has left
            RunFolder.begin(here, digits(), "s", data, goal="train")
            StudyFolder.begin(here, Record("", "s", "digits", "d", data, "s", {}))
        storage.write_text("weights", here / "model" / "edge")
        results = Results(here, str(there))
        results.copy_all()
        results.close()
        assert set(storage.list_files(str(there))) == {"model/edge", "study.json"}
        with pytest.raises(UserError), alone(here):
            pass


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path):
        (tmp_path / "done").touch()
    assert (tmp_path / "done").exists()
    assert f"note: {tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err
