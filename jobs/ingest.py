"""Write any source as sharded Parquet: `python -m jobs.ingest folder:photos outputs/photos`, then train on parquet:...

The set carries its class names, counts, channel statistics and a digest, and beside each row what streaming must know,
so that a training that streams it begins at once.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from jobs import _cli, _progress
from meanet.config import DataConfig
from meanet.data import load
from meanet.data.shards import write
from meanet.errors import exit_on_user_error


@dataclass(frozen=True)
class Flags:
    """Check every image of a source and write the usable ones."""

    source: Annotated[str, tyro.conf.Positional]
    """digits, cifar100[:FOLDER], folder:PATH or parquet:PATH; PATH may be s3://."""
    output: Annotated[str, tyro.conf.Positional]
    """Folder to write, a path or s3://; a source with test images of its own gets train/ and test/ in it."""
    image_column: str | None = None
    """Column of a Parquet source with the encoded images; the only such column if not given."""
    label_column: str | None = None
    """Column of a Parquet source with integer labels; `label`, `fine_label` or the only integer one if not given."""
    image_size: int | None = None
    """Side in pixels that training will bring images to; their bytes are kept as they are."""
    channels: Literal[1, 3] | None = None
    """1 = grey, 3 = RGB; what most images have if not given."""
    max_bad_fraction: float = 0.01
    """Share of unusable images that may be skipped, 0..1; more is an error."""
    rows_per_shard: int = 8192
    """Images in a file."""
    json: bool = False
    """Print the result as JSON."""


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse("ingest", Flags)
    config = DataConfig(
        source=flags.source,
        image_column=flags.image_column,
        label_column=flags.label_column,
        image_size=flags.image_size,
        channels=flags.channels,
        max_bad_fraction=flags.max_bad_fraction,
    )
    built_in = not flags.source.startswith(("folder:", "parquet:"))
    table = load(config, keep=None if built_in else "streaming")
    for line in table.skipped.lines():
        _progress.say(f"  skipped {line}")
    written: list[dict[str, Any]] = write(table, flags.output, flags.image_size, flags.rows_per_shard)
    skipped = dict(table.skipped.counts)
    if flags.json:
        print(json.dumps({"sets": written, "skipped": skipped, "examples": table.skipped.examples}))
        return
    for one in written:
        mean, std = ([round(value, 4) for value in one[key]] for key in ("mean", "std"))
        print(f"{one['uri']}: {one['rows']} images {one['shape']}, {one['classes']} classes, {one['shards']} shards")
        print(f"  mean {mean}, standard deviation {std}, digest {one['digest'][:16]}")
    print(f"skipped: {skipped or 'none'}\nnext: python -m jobs.train RECIPE --data.source {written[0]['uri']}")


if __name__ == "__main__":
    main()
