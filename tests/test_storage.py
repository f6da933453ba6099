"""Folders that nodes share are known and tried without a trace; a local file is there as a whole, or as it was."""

import errno
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ENVIRONMENT
from pyarrow import fs

from meanet import storage
from meanet.errors import UserError
from meanet.storage import check_marked, check_writable, marked, upload, write_parquet


def test_another_folder_under_the_same_path_is_found_out(tmp_path: Path) -> None:
    folder, other = check_writable(str(tmp_path / "runs")), tmp_path / "of another machine"
    with marked(folder) as marker:
        check_marked(folder, marker)
        with pytest.raises(UserError, match=r"is another folder there: with --storage give one that all nodes share"):
            check_marked(str(other), marker)
    assert not other.exists(), "a node that does not share it gets no folder"
    assert list(Path(folder).iterdir()) == []


def test_nodes_may_try_one_folder_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str] = []

    class Shared(fs.LocalFileSystem):  # type: ignore[misc]
        """Another node's whole trial lies between this one's writing and removing."""

        def delete_file(self, path: str) -> None:
            if not others:
                others.append("begun")
                others.append(check_writable(str(tmp_path)))
            super().delete_file(path)

    monkeypatch.setattr(storage, "resolve", lambda uri: (Shared(), str(uri)))
    assert check_writable(str(tmp_path)) == str(tmp_path)
    assert others == ["begun", str(tmp_path)]
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(fs.LocalFileSystem):  # type: ignore[misc]
        def open_output_stream(self, path: str, *_: Any, **__: Any) -> Any:
            Path(path).touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "resolve", lambda uri: (Full(), str(uri)))
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be written .*No space left.*--storage"):
        check_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


COPIES = """
import resource, signal, sys
from pathlib import Path
from meanet.storage import upload
signal.signal(signal.SIGXFSZ, signal.Handlers(int(sys.argv[3])))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
upload(Path(sys.argv[1]), sys.argv[2], ("study.json",))
"""
"""The kernel lets a file have 1 MiB; what is written beyond kills the process, or fails."""


@pytest.mark.parametrize("end", [signal.SIG_DFL, signal.SIG_IGN], ids=["killed", "failed"])
def test_copy_that_ends_halfway_leaves_what_was_there(end: signal.Handlers, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, text in ((here, "n" * 2**21), (there, "old")):
        folder.mkdir()
        (folder / "study.json").write_text(text)
    command = [sys.executable, "-c", COPIES, str(here), str(there), str(int(end))]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (there / "study.json").read_text() == "old"
    left = [path.name for path in there.iterdir() if path.name != "study.json"]
    if end is signal.SIG_DFL:
        assert done.returncode == -signal.SIGXFSZ, done.stderr
        assert all(name.startswith(".") for name in left), "nobody takes it for a whole file"
    else:
        assert "study.json cannot be copied to" in done.stderr
        assert left == []
    assert upload(here, str(there), ("study.json",)) == 1
    assert (there / "study.json").read_text() == "n" * 2**21


def test_table_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "exits.parquet"
    write_parquet(pa.table({"a": [1]}), path)
    before = path.read_bytes()
    with pytest.raises(pa.ArrowNotImplementedError):
        write_parquet(pa.table({"a": pa.array([None], pa.month_day_nano_interval())}), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
