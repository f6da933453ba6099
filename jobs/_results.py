"""A study's results elsewhere, s3:// or a path, as they come: an interrupted study goes on from there anywhere."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import _progress
from jobs._study import RESULTS
from meanet import storage
from meanet.errors import UserError

_EVERY_S = 5.0
_RECORD, _TRIAL = "study.json", "trial.json"
_BASE = ("base/exits.parquet", "base/model", "base/run.json")
"""The default as others need it; what its training kept stays here."""


class Results:
    """Of one study: its folder here, and where they go."""

    def __init__(self, root: Path, uri: str | None, every_s: float = _EVERY_S) -> None:
        """`uri` is None where they go nowhere; every so many seconds it is looked what is new."""
        self._root, self._uri, self._every_s = root, uri, every_s
        self._copied = set[str]()
        self._record = ""
        self._lost = self._claimed = False

    def fetch(self) -> int:
        """Take what an interrupted study has left there, where the folder here holds no study; returns how many trials.

        Raises:
            UserError: it cannot be read.
        """
        if self._uri is None or (self._root / _RECORD).exists() or not storage.has_files(self._uri, _RECORD):
            return 0
        names = [name for name in storage.list_files(self._uri) if not Path(name).name.startswith(".")]  # whole ones
        (record,) = storage.read_files(self._uri, [_RECORD]) if _RECORD in names else (b"",)
        if not record or self._is_over(record):
            return 0
        trials = {_first_two(name) for name in names if name.startswith("trials/") and Path(name).name == _TRIAL}
        wanted = [name for name in names if name.startswith("base/") or _first_two(name) in trials]
        part = self._root / ".fetched"
        shutil.rmtree(part, ignore_errors=True)
        for name, data in zip(wanted, storage.read_files(self._uri, wanted), strict=True):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(data)
        for folder in sorted(trials | ({"base"} if (part / "base").exists() else set())):  # each whole, or not at all
            shutil.rmtree(self._root / folder, ignore_errors=True)
            (self._root / folder).parent.mkdir(parents=True, exist_ok=True)
            (part / folder).rename(self._root / folder)
        shutil.rmtree(part, ignore_errors=True)
        storage.write_text(record.decode(), self._root / _RECORD)
        _progress.say(f"  {len(trials)} trials of an interrupted study fetched from {self._uri}")
        return len(trials)

    def _is_over(self, record: bytes) -> bool:
        """Whether that study is: it is not gone on with."""
        try:
            return "report" in json.loads(record)["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._uri}/{_RECORD} cannot be read ({error!r}): remove it to start a new study there"
            ) from error

    @contextmanager
    def following(self) -> Iterator[None]:
        """Copy trials as they finish, in a thread, until the block is over."""
        if self._uri is None:
            yield
            return
        self._copy_new()
        with _progress.repeated(self._copy_new, self._every_s, "meanet-results"):
            yield

    def copy_all(self) -> None:
        """Copy all but the study's own record, which `close` does.

        Raises:
            UserError: a file cannot be written.
        """
        if self._uri is not None:
            self._claim()
            count = storage.upload(self._root, self._uri, (*_BASE, *RESULTS))
            _progress.say(f"  {count} files copied to {self._uri}")

    def close(self) -> None:
        """Say there that the study is over.

        Raises:
            UserError: it cannot be written.
        """
        if self._uri is not None:
            storage.upload(self._root, self._uri, (_RECORD,))

    def _copy_new(self) -> None:
        """A place that does not answer costs the copy, which is made again, not the study."""
        assert self._uri is not None
        try:
            self._claim()
            for name in self._new():
                storage.upload(self._root, self._uri, _BASE if name == "base" else (name,))
                self._copied.add(name)
            record = (self._root / _RECORD).read_text(encoding="utf-8")
            if record != self._record:
                storage.upload(self._root, self._uri, (_RECORD,))
                self._record = record
            self._lost = False
        except (UserError, OSError) as error:
            if not self._lost:
                _progress.say(f"  results are not copied for now: {error}")
            self._lost = True

    def _claim(self) -> None:
        """Drop there what another study has left: a trial is named by its parameters alone, so that its trials would be
        taken for this one's. Its record goes first: without one, nothing is gone on with."""
        assert self._uri is not None
        if self._claimed:
            return
        try:
            (theirs,) = storage.read_files(self._uri, [_RECORD])
        except FileNotFoundError:
            theirs = b""
        except OSError as error:
            raise UserError(f"{self._uri}/{_RECORD} cannot be read ({error}): give the same command again") from error
        if _id(theirs) != _id((self._root / _RECORD).read_bytes()):
            storage.remove(self._uri, (_RECORD, "trials"))
        self._claimed = True

    def _new(self) -> list[str]:
        """`base` and `trials/<id>` that are whole and not yet copied."""
        found = [f"trials/{path.parent.name}" for path in sorted((self._root / "trials").glob(f"*/{_TRIAL}"))]
        if (self._root / "base" / "exits.parquet").exists():
            found.insert(0, "base")
        return [name for name in found if name not in self._copied]


def _id(record: bytes) -> Any:
    """Of the study that a record is of; None if that is not to be read."""
    try:
        return json.loads(record)["id"]
    except (ValueError, KeyError, TypeError):
        return None


def _first_two(name: str) -> str:
    return "/".join(Path(name).parts[:2])
