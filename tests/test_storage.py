"""Folders that nodes share are known and tried without a trace; a local file is there as a whole, or as it was."""

import errno
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from meanet import storage
from meanet.errors import UserError
from meanet.storage import check_marked, check_writable, marked


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
