"""Any table -> sharded Parquet that `parquet:` reads back: the hubs' layout, and what is known of each row."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from meanet import storage
from meanet.data.loading import StreamedTable
from meanet.data.sources import schema_of
from meanet.data.table import Images, ImageTable, Rows
from meanet.errors import UserError

_ROW_GROUP_BYTES = 16 * 2**20
"""A reader takes a row group at once: so much, decoded."""


def write(table: Images, output: str, image_size: int | None, rows_per_shard: int) -> list[dict[str, Any]]:
    """Write a table below `output`; one with test images of its own as train/ and test/.

    Args:
        table: what to write.
        output: folder, a path or s3://.
        image_size: the side that images were brought to when the table was loaded, as in `DataConfig`.
        rows_per_shard: images in a file.

    Returns:
        Of each set written: uri, rows, shape, classes, counts, mean, std, digest, shards.

    Raises:
        UserError: a set stands there already, or a number makes no sense.
    """
    if rows_per_shard < 1:
        raise UserError(f"rows_per_shard is {rows_per_shard}: it must be 1 or more")
    everything = np.arange(len(table.labels))
    parts = {"": everything}
    if table.test_rows is not None:
        parts = {"/train": np.setdiff1d(everything, table.test_rows), "/test": table.test_rows}
    folders = {f"{output.rstrip('/')}{name}": rows for name, rows in parts.items()}
    storage.check_writable(output)
    for folder in folders:
        if storage.has_files(folder, ".parquet"):
            raise UserError(f"{folder} holds Parquet files already: choose another folder, or remove them first")
    return [_write_set(table, rows, folder, image_size, rows_per_shard) for folder, rows in folders.items()]


def _write_set(table: Images, rows: Rows, folder: str, image_size: int | None, rows_per_shard: int) -> dict[str, Any]:
    mean, std = table.channel_statistics(rows)
    counts = Counter(table.class_names[label] for label in table.labels[rows].tolist())
    facts = {
        "rows": len(rows),
        "counts": {name: counts[name] for name in table.class_names},
        "mean": mean,
        "std": std,
        "digest": table.digest_of(rows),
    }
    schema = schema_of(table.class_names, table.image_shape, image_size, **facts)
    sums, digests = table.moments()[rows], table.pixel_digests()[rows]
    starts = range(0, len(rows), rows_per_shard)
    for number, start in enumerate(starts):
        part = slice(start, start + rows_per_shard)
        shard = _rows(schema, table, rows[part], sums[part], digests[part])
        name = f"{folder}/{number:05d}-of-{len(starts):05d}.parquet"
        storage.write_parquet(shard, name, row_group_size=max(1, _ROW_GROUP_BYTES // int(np.prod(table.image_shape))))
    classes = len(table.class_names)
    return {"uri": f"parquet:{folder}", "shape": table.image_shape, "classes": classes, "shards": len(starts), **facts}


def _rows(schema: pa.Schema, table: Images, rows: Rows, sums: Rows, digests: "np.ndarray[Any, Any]") -> pa.Table:
    images = pa.StructArray.from_arrays(
        [pa.array(list(_encoded(table, rows)), pa.binary()), pa.nulls(len(rows), pa.string())], names=["bytes", "path"]
    )
    return pa.Table.from_arrays(
        [
            images,
            pa.array(table.labels[rows]),
            pa.FixedSizeListArray.from_arrays(pa.array(sums.reshape(-1)), 2 * table.image_shape[2]),
            pa.array([digest.tobytes() for digest in digests], pa.binary(32)),
        ],
        schema=schema,
    )


def _encoded(table: Images, rows: Rows) -> Iterator[bytes]:
    """Files' own bytes where there are files; PNG of what is in memory."""
    from meanet.preprocessing import encode_png

    if isinstance(table, StreamedTable):
        for piece in table.pieces(rows):
            yield from piece.read()
        return
    assert isinstance(table, ImageTable), "there are two kinds of table"
    for row in rows:
        yield encode_png(table.images[row])
