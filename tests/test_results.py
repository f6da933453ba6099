"""A study's results go to S3 as they come, and an interrupted study goes on from there in another folder."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import S3Server, s3_server

from jobs._results import Results
from meanet import storage
from meanet.errors import UserError

__all__ = ["s3_server"]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def within(reached: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def content(uri: str) -> dict[str, str]:
    names = storage.list_files(uri)
    return {name: data.decode() for name, data in zip(names, storage.read_files(uri, names), strict=True)}


BASE = {
    "base/run.json": "{}",
    "base/model/edge": "weights",
    "base/exits.parquet": "rows",
    "base/train/big": "kept here",
}
ONE = {"trials/one/model/edge": "first", "trials/one/trial.json": "{}"}
TWO = {"trials/two/model/edge": "second", "trials/two/trial.json": "{}"}
"""A trial's record is written last."""


def test_trials_arrive_while_the_study_runs_and_another_folder_goes_on_from_them(
    s3_server: S3Server, tmp_path: Path
) -> None:
    uri = "s3://meanet/study/one"
    here = write(tmp_path / "here", {**BASE, **ONE, "study.json": '{"id": "s", "seconds": {"base": 1}}'})
    write(here, {"trials/.part/trial.json": "{}", "trials/three/model/edge": "not over yet"})
    results = Results(here, uri, every_s=0.05)
    assert results.fetch() == 0, "this folder holds the study already"
    with results.following():  # one trial is over, and the study goes on
        within(lambda: storage.has_files(uri, "study.json"))
        assert set(content(uri)) == {*BASE, *ONE, "study.json"} - {"base/train/big"}
        write(here, TWO)
        within(lambda: "trials/two/trial.json" in storage.list_files(uri))

    storage.upload(here, uri, ("trials/three",))  # as a kill leaves it: without its last file
    other = tmp_path / "other"
    assert Results(other, uri).fetch() == 2
    found = {path.relative_to(other).as_posix(): path.read_text() for path in other.rglob("*") if path.is_file()}
    assert found == {
        **{name: text for name, text in (BASE | ONE | TWO).items() if name != "base/train/big"},
        "study.json": '{"id": "s", "seconds": {"base": 1}}',
    }

    write(other, {"study.json": '{"id": "s", "seconds": {"report": 1}}', "report.json": "{}"})
    ended = Results(other, uri)
    ended.copy_all()
    assert "report" not in json.loads(content(uri)["study.json"])["seconds"], "not said to be over before all is there"
    ended.close()
    assert (content(uri)["report.json"], "report" in content(uri)["study.json"]) == ("{}", True)
    assert Results(tmp_path / "third", uri).fetch() == 0, "a study that is over is not gone on with"


@pytest.mark.parametrize(
    "theirs", ['{"id": "old", "seconds": {"report": 1}}', '{"id": "old", "seconds": {}}', '{"se', None]
)
@pytest.mark.parametrize("uri", ["s3://meanet{folder}", "{folder}/there"])
def test_trials_of_an_older_study_are_not_taken_for_those_of_a_new_one(
    s3_server: S3Server, tmp_path: Path, uri: str, theirs: str | None
) -> None:
    """Other flags, the same parameters: the same names. The new study is killed, and goes on from there elsewhere."""
    uri = uri.format(folder=tmp_path)
    old = write(
        tmp_path / "old", {**ONE, **TWO, "trials/two/model/more": "of the old", "tune/old/tuner.pkl": "its own"}
    )
    record = {} if theirs is None else {"study.json": theirs}
    storage.upload(write(old, record), uri, ("trials", "tune", "study.json"))
    two = {"trials/two/model/edge": "of the new", "trials/two/trial.json": '{"new": 1}'}
    here = write(tmp_path / "here", {**BASE, **two, "study.json": '{"id": "new", "seconds": {}}'})
    with Results(here, uri).following():
        pass
    assert {name for name in content(uri) if name.startswith("trials/")} == set(two)
    assert content(uri)["tune/old/tuner.pkl"] == "its own", "what has a name of its own is left alone"
    with Results(here, uri).following():  # interrupted, and gone on with here: nothing is dropped
        assert {name for name in content(uri) if name.startswith("trials/")} == set(two)

    if not uri.startswith("s3://"):
        write(Path(uri), {"trials/two/.model-1.partial": "as a kill amid a copy leaves it"})
    other = tmp_path / "other"
    assert Results(other, uri).fetch() == 1
    trials = {
        path.relative_to(other).as_posix(): path.read_text() for path in other.glob("trials/**/*") if path.is_file()
    }
    assert trials == two


def test_a_study_whose_trials_are_over_drops_an_older_ones_too(tmp_path: Path) -> None:
    there = write(tmp_path / "there", {**ONE, "study.json": '{"id": "old", "seconds": {}}'})
    here = write(tmp_path / "here", {**TWO, "study.json": '{"id": "new", "seconds": {"trials": 1}}'})
    Results(here, str(there)).copy_all()
    assert set(content(str(there))) == set(TWO)


def test_a_place_that_does_not_answer_costs_the_copy_and_not_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = write(tmp_path / "here", {**ONE, "study.json": "{}"})
    blocked = write(tmp_path, {"file": "no folder"}) / "file"
    with Results(here, str(blocked / "there"), every_s=0.01).following():
        time.sleep(0.1)
    assert capsys.readouterr().err.count("results are not copied for now") == 1
    with pytest.raises(UserError, match=r"there/study.json cannot be read .*give the same command again"):
        Results(write(here, {"report.json": "{}"}), str(blocked / "there")).copy_all()


def test_damaged_record_and_no_place_at_all(tmp_path: Path) -> None:
    there = write(tmp_path / "there", {"study.json": '{"seconds": '})
    with pytest.raises(UserError, match=r"study.json cannot be read .*remove it"):
        Results(tmp_path / "here", str(there)).fetch()
    assert Results(tmp_path / "here", str(tmp_path / "empty")).fetch() == 0
    nowhere = Results(tmp_path / "here", None)
    assert nowhere.fetch() == 0
    with nowhere.following():
        pass
    nowhere.copy_all()
    nowhere.close()
