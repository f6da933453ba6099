"""What an interrupted run has left in its storage: the newest checkpoint that is whole, and what nobody will take.

Ray Train goes on from the last checkpoint that it has *registered*, in a snapshot beside them. One that was written
just before the end is whole and not registered; one that was being written is neither. Ray forgets both.

Source: ray 2.60, train/v2/_internal/execution/checkpoint/checkpoint_manager.py.
"""

import json
import zipfile
from collections.abc import Iterable
from typing import Any

from meanet import s3
from meanet.storage import folders, resolve

STATE = "state.pt"
"""The one file of a checkpoint: a zip, whose directory stands at its end."""
_SNAPSHOT = "checkpoint_manager_snapshot.json"
_PREFIX = "checkpoint_"
"""Of a checkpoint's folder; its time follows, so that names sort by age."""


def tidied(storage: str, name: str) -> str | None:
    """Remove what an interruption has left of a run that is not under way: parts of uploads, checkpoints that are not
    whole, and whole ones that are neither registered nor the newest.

    Args:
        storage: absolute path or s3://.
        name: the run's, below it.

    Returns:
        The newest whole checkpoint, as a path in the storage's file system; None where there is none.
    """
    system, place = resolve(storage)
    root = f"{place.rstrip('/')}/{name}"
    if storage.startswith(s3.SCHEME):
        s3.abort_uploads(f"{storage.rstrip('/')}/{name}")
    found = [one for one in folders(f"{storage.rstrip('/')}/{name}") if one.startswith(_PREFIX)]
    newest = next((one for one in sorted(found, reverse=True) if _is_whole(system, f"{root}/{one}/{STATE}")), None)
    registered = _registered(system, f"{root}/{_SNAPSHOT}")
    if registered is not None:
        _remove(system, root, set(found) - registered - {newest})
    return None if newest is None else f"{root}/{newest}"


def _is_whole(system: Any, path: str) -> bool:
    """Whether a state's last bytes are there: an object appears at the end of its upload, a local file grows."""
    try:
        with system.open_input_file(path) as stream:
            return zipfile.is_zipfile(stream)
    except FileNotFoundError:
        return False


def _registered(system: Any, path: str) -> set[str] | None:
    """Folders that Ray's snapshot knows; None where that cannot be told, and nothing may be removed.

    One that was cut off while it was written is removed: Ray refuses to start beside it.
    """
    try:
        with system.open_input_stream(path, compression=None) as stream:
            text = stream.read()
        try:
            snapshot = json.loads(text)
        except ValueError:
            system.delete_file(path)
            return set()
        results = [*snapshot["checkpoint_results"], snapshot["latest_checkpoint_result"]]
        return {result["checkpoint_dir_name"] for result in results if result is not None}
    except FileNotFoundError:
        return set()
    except (KeyError, TypeError):
        return None


def _remove(system: Any, root: str, names: Iterable[str]) -> None:
    for name in names:
        system.delete_dir(f"{root}/{name}")
