"""Engines of a model's folder, exported where they are not there yet."""

import time
from pathlib import Path

from jobs import _progress
from jobs.train import load_splits
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.onnx_export import Engines, export, exported_already


def export_engines(model: TrainedModel, folder: Path, wanted: Engines, splits: Splits | None = None) -> Path | None:
    """See to it that the folder has these engines; returns it, None where none are wanted.

    Args:
        model: what the folder holds.
        folder: it.
        wanted: which.
        splits: of the data that it was trained on; loaded if not given.

    Raises:
        UserError: that data cannot be had, or is not the same any more; the export fails.
    """
    if wanted == "none":
        return None
    if exported_already(folder, wanted):
        return folder
    started = time.perf_counter()
    exported = export(model, folder, splits or _data_of(model), wanted)
    assert exported is not None, "some were wanted"
    seconds = time.perf_counter() - started
    _progress.say(f"  exported {', '.join(reversed(exported.engines))} in {seconds:.1f} s")
    if exported.int8:
        _progress.say(f"  onnx_int8 is {'kept' if exported.int8['kept'] else 'dropped'}: {exported.int8['reason']}")
    return folder


def _data_of(model: TrainedModel) -> Splits:
    remedy = "exporting engines compares and calibrates on it; give --engines none to register without"
    try:
        splits = load_splits(model.recipe)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    if splits.table.digest != model.data_digest:
        raise UserError(
            f"the data of {model.recipe.data.source!r} is not what this model was trained on (digest "
            f"{splits.table.digest[:12]}, then {model.data_digest[:12]}): {remedy}, or restore it"
        )
    return splits
