"""The columns of an exits table: what each must be, checked before anything is computed from them.

split            validation | test
label            true class id, 0..C-1
main_logits      C numbers; their softmax is the main exit's
extension_logits H numbers, hardest class first; not needed where no class is hard
cloud_pred       the cloud's class id
upload_bytes_*   bytes sent for the sample, a column for each payload
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meanet.errors import UserError

_BYTES = "upload_bytes_"


def check_columns(table: pa.Table, source: str | Path, hard_classes: tuple[int, ...]) -> int:
    """Check every column; returns the number of classes C.

    Raises:
        UserError: a column is missing, of the wrong type, has nulls or values out of range; hard classes do not fit.
    """
    needed = ["split", "label", "main_logits", "cloud_pred", *(["extension_logits"] if hard_classes else [])]
    missing = [name for name in needed if name not in table.column_names]
    sizes = [name for name in table.column_names if name.startswith(_BYTES)]
    if missing or not sizes:
        lacks = ", ".join(missing or [f"{_BYTES}png (or another payload)"])
        raise UserError(f"{source} lacks the columns {lacks}: write it with jobs.evaluate, or add them")
    for name in (*needed, *sizes):
        _check_type(table, name, source)
    num_classes: int = matrix(table["main_logits"], table.num_rows, "main_logits").shape[1]
    for name in ("label", *(name for name in table.column_names if name.startswith("cloud_pred"))):
        _check_type(table, name, source)
        _check_range(table, name, 0, num_classes - 1, source)
    for name in sizes:
        _check_range(table, name, 0, 2**53, source)
    if hard_classes:
        width = matrix(table["extension_logits"], table.num_rows, "extension_logits").shape[1]
        if width != len(hard_classes):
            raise UserError(
                f"{source} has {width} extension logits and {len(hard_classes)} hard classes: give one class a column"
            )
    wrong = [class_id for class_id in hard_classes if not 0 <= class_id < num_classes]
    if wrong or len(set(hard_classes)) != len(hard_classes):
        raise UserError(
            f"{source}: hard classes {wrong or list(hard_classes)} must be distinct ids of the {num_classes} classes "
            f"0..{num_classes - 1}"
        )
    return num_classes


def _check_type(table: pa.Table, name: str, source: str | Path) -> None:
    kind, column = table.schema.field(name).type, table[name]
    if name == "split":
        sound, wanted = (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind),
            "text",
        )
    elif name.endswith("_logits"):
        lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
        sound, wanted = lists and pa.types.is_floating(kind.value_type), "lists of floating-point numbers"
    else:
        sound, wanted = pa.types.is_integer(kind), "integers"
    if not sound:
        raise UserError(f"{source}: column {name} holds {kind}, and must hold {wanted}")
    if column.null_count:
        raise UserError(f"{source}: column {name} has {column.null_count} rows without a value: fill or drop them")


def _check_range(table: pa.Table, name: str, least: int, most: int, source: str | Path) -> None:
    values = table[name].to_numpy()
    wrong = np.flatnonzero((values < least) | (values > most))
    if len(wrong):
        raise UserError(
            f"{source}: column {name} is {values[wrong[0]]} in row {wrong[0]} (and {len(wrong) - 1} more rows are out "
            f"of range): it must lie in {least}..{most}"
        )


def matrix(column: pa.ChunkedArray, count: int, name: str = "logits") -> NDArray[Any]:
    """(count, width) numbers of a column of lists.

    Raises:
        UserError: lists of different lengths.
    """
    values = column.combine_chunks().flatten()
    if values.null_count:
        raise UserError(f"column {name} has {values.null_count} lists with a missing number: fill or drop these rows")
    flat = values.to_numpy()
    width = len(flat) // count if count else 0
    lengths = pa.compute.list_value_length(column)
    if count and not (pa.compute.min(lengths).as_py() == width == pa.compute.max(lengths).as_py() and width):
        raise UserError(f"column {name} has lists of different lengths, or empty ones: give every row as many numbers")
    numbers: NDArray[Any] = flat.reshape(count, width)
    return numbers
