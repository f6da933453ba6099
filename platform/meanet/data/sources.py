"""Where images come from: a URI -> what can be read there, a shard at a time.

    digits              scikit-learn's 1,797 scans
    cifar100[:FOLDER]   torchvision's CIFAR-100: found in FOLDER, or downloaded
    folder:PATH         a subfolder a class, as ImageNet and torchvision's ImageFolder have it
    parquet:PATH        the hubs' layout: a struct of bytes and path, and an integer label; a file or a folder of them

PATH is local or s3://.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meanet import storage
from meanet.config import DataConfig
from meanet.data.table import ImageTable
from meanet.errors import UserError

KNOWN = "digits, cifar100[:FOLDER], folder:PATH, parquet:PATH"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision.datasets.ImageFolder's."""
_FOLDER_SHARD = 256
_KEY = b"meanet"
MISSING = -1
"""The label of a row that has none."""


@dataclass(frozen=True)
class Facts:
    """What `jobs.ingest` has noted of a set beside each row, so that nothing need be decoded to know it."""

    image_size: int | None
    """As in `DataConfig`, when it was written."""
    shape: tuple[int, int, int]
    """(H, W, C) of each decoded image."""
    moments: NDArray[np.int64]
    """(N, 2, C)."""
    digests: NDArray[np.uint8]
    """(N, 32)."""


class Shard(Protocol):
    """What is read at once: small, plain data that may travel to another process."""

    def read(self, offsets: Sequence[int] | None = None) -> list[bytes | None]:
        """The encoded images of its rows, or of those at these offsets."""


class Encoded(Protocol):
    """Encoded images and their labels."""

    @property
    def uri(self) -> str:
        """What names it."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """By label; None where the source has no names."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) as they stand there; MISSING where there is none."""

    @property
    def bounds(self) -> Sequence[tuple[int, int]]:
        """Of each shard: the first row, and the one after the last."""

    @property
    def facts(self) -> Facts | None:
        """What is known of the rows without decoding them."""

    def shard(self, number: int) -> Shard:
        """What reads the rows between those bounds."""

    def name(self, row: int) -> str:
        """Which image that is, for a person."""


Source = ImageTable | Encoded


def open_source(uri: str, config: DataConfig) -> Source:
    """What a URI names.

    Raises:
        UserError: no such source, or nothing there to read.
    """
    kind, _, place = uri.partition(":")
    if kind == "digits" and not place:
        return _digits()
    if kind == "cifar100":
        return _cifar100(place)
    if kind == "folder" and place:
        return FolderSource.open(place)
    if kind == "parquet" and place:
        return ParquetSource.open(place, config.image_column, config.label_column)
    raise UserError(f"unknown data source {uri!r}: known sources are {KNOWN}")


def _digits() -> ImageTable:
    """scikit-learn's digits: 1,797 scans, (8, 8), 17 grey levels; times 15 they fill a byte without loss.

    Source: https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * 15).astype(np.uint8)[..., np.newaxis]
    return ImageTable(images, bunch.target.astype(np.int64), tuple(str(digit) for digit in range(10)), "digits")


def _cifar100(folder: str) -> ImageTable:
    """CIFAR-100 (Krizhevsky, 2009), training images first, then its own 10,000 test images; (32, 32, 3), 100 classes.

    torchvision checks the files against published digests before it reads them.
    """
    from torchvision.datasets import CIFAR100

    root = Path(folder).expanduser() if folder else Path.home() / ".cache" / "meanet" / "cifar100"
    try:
        train, test = (CIFAR100(root, train=is_train, download=not folder) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-100 cannot be had from {root} ({str(error).splitlines()[0]}): give the folder that holds "
            "cifar-100-python as cifar100:FOLDER, or run once on a machine that can download it"
        ) from error
    images = np.concatenate([train.data, test.data])
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    test_rows = np.arange(len(train.data), len(images))
    return ImageTable(images, labels, tuple(train.classes), f"cifar100:{folder}" if folder else "cifar100", test_rows)


@dataclass(frozen=True)
class FolderShard:
    """Some files."""

    root: str
    paths: tuple[str, ...]

    def read(self, offsets: Sequence[int] | None = None) -> list[bytes | None]:
        """Their bytes, or those of the files at these offsets."""
        paths = self.paths if offsets is None else [self.paths[offset] for offset in offsets]
        return list(storage.read_files(self.root, paths))


@dataclass(frozen=True)
class ParquetShard:
    """One row group."""

    file: str
    group: int
    column: str

    def read(self, offsets: Sequence[int] | None = None) -> list[bytes | None]:
        """The bytes of its images, or of those at these offsets."""
        column = storage.read_row_group(self.file, self.group, self.column)
        if offsets is not None:
            column = column.take(pa.array(offsets, pa.int64()))
        return [row["bytes"] if isinstance(row, dict) else row for row in column.to_pylist()]


@dataclass(frozen=True)
class FolderSource:
    """A subfolder a class; classes in alphabetical order."""

    uri: str
    root: str
    """Path or s3:// of the folder."""
    paths: tuple[str, ...]
    """Of each image, below the root."""
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    facts: None = None

    @staticmethod
    def open(root: str) -> "FolderSource":
        """List a folder.

        Raises:
            UserError: it does not exist or has no images in subfolders.
        """
        storage.check_readable(root)
        files = [path for path in storage.list_files(root) if path.lower().endswith(EXTENSIONS) and "/" in path]
        if not files:
            raise UserError(
                f"{root} has no images in class subfolders (expected CLASS/NAME with one of {', '.join(EXTENSIONS)}): "
                "check the path"
            )
        names = tuple(sorted({path.split("/", 1)[0] for path in files}))
        ids = {name: class_id for class_id, name in enumerate(names)}
        labels = np.array([ids[path.split("/", 1)[0]] for path in files], dtype=np.int64)
        return FolderSource(f"folder:{root}", root, tuple(files), names, labels)

    @property
    def bounds(self) -> Sequence[tuple[int, int]]:
        """A few hundred files a shard."""
        total = len(self.paths)
        return [(start, min(start + _FOLDER_SHARD, total)) for start in range(0, total, _FOLDER_SHARD)]

    def shard(self, number: int) -> Shard:
        """Some of the files."""
        start, stop = self.bounds[number]
        return FolderShard(self.root, self.paths[start:stop])

    def name(self, row: int) -> str:
        """The file."""
        return self.paths[row]


@dataclass(frozen=True)
class ParquetSource:
    """One Parquet file or a folder of them; a row group is read at once."""

    uri: str
    files: tuple[str, ...]
    """Paths or s3:// URIs."""
    groups: tuple[tuple[int, int], ...]
    """File and row group of each shard."""
    bounds: tuple[tuple[int, int], ...]
    image_column: str
    class_names: tuple[str, ...] | None
    labels: NDArray[np.int64]
    facts: Facts | None

    @staticmethod
    def open(place: str, image_column: str | None, label_column: str | None) -> "ParquetSource":
        """Read the labels, not the images.

        Raises:
            UserError: nothing there, or no columns of images and labels.
        """
        storage.check_readable(place)
        files = storage.parquet_files(place)
        schema = storage.parquet_schema(files[0])
        image = _image_column(schema, image_column, place)
        label = _label_column(schema, label_column, place)
        facts = [name for name in ("meanet_moments", "meanet_digest") if name in schema.names]
        groups: list[tuple[int, int]] = []
        bounds: list[tuple[int, int]] = []
        tables = []
        for number, file in enumerate(files):
            table, sizes = storage.read_columns(file, [label, *facts])
            tables.append(table)
            for group, size in enumerate(sizes):
                start = bounds[-1][1] if bounds else 0
                groups.append((number, group))
                bounds.append((start, start + size))
        columns = pa.concat_tables(tables)
        labels = columns[label].cast(pa.int64()).fill_null(MISSING).to_numpy()
        names = _class_names(schema, label)
        noted = _facts(schema, columns, place) if len(facts) == 2 else None
        return ParquetSource(
            f"parquet:{place}", tuple(files), tuple(groups), tuple(bounds), image, names, labels, noted
        )

    def shard(self, number: int) -> Shard:
        """One row group."""
        file, group = self.groups[number]
        return ParquetShard(self.files[file], group, self.image_column)

    def name(self, row: int) -> str:
        """File and row within it."""
        shard = int(np.searchsorted([stop for _, stop in self.bounds], row, side="right"))
        file = self.groups[shard][0]
        first = next(start for (number, _), (start, _) in zip(self.groups, self.bounds, strict=True) if number == file)
        return f"{self.files[file].rsplit('/', 1)[-1]} row {row - first}"


def _image_column(schema: pa.Schema, asked: str | None, place: str) -> str:
    fitting = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    fitting = [name for name in fitting if name != "meanet_digest"]
    return _Role("image", fitting, fitting).choose(asked, schema, place)


def _label_column(schema: pa.Schema, asked: str | None, place: str) -> str:
    fitting = [field.name for field in schema if pa.types.is_integer(field.type)]
    usual = [name for name in ("label", "fine_label") if name in fitting]
    return _Role("label", fitting, usual[:1] or fitting).choose(asked, schema, place)


@dataclass(frozen=True)
class _Role:
    """What a column is for."""

    name: str
    """image or label."""
    fitting: list[str]
    """Columns of the right type."""
    usual: list[str]
    """Those of them that need not be asked for, if it is one."""

    def choose(self, asked: str | None, schema: pa.Schema, place: str) -> str:
        if asked in self.fitting:
            return asked
        if asked is None and len(self.usual) == 1:
            return self.usual[0]
        problem = (
            f"no {self.name} column {asked!r}" if asked else f"{len(self.fitting) or 'no'} columns of {self.name}s"
        )
        types = {"image": "encoded images (a struct with `bytes`, or binary)", "label": "integer labels"}[self.name]
        raise UserError(
            f"{place} has {problem} among {', '.join(schema.names)}: name one of {types} with --data.{self.name}-column"
        )


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """From our own metadata, a comma-separated `class_names`, or the hubs' `huggingface` features."""
    metadata = schema.metadata or {}
    try:
        if _KEY in metadata:
            return tuple(json.loads(metadata[_KEY])["class_names"])
        if b"class_names" in metadata:
            return tuple(metadata[b"class_names"].decode().split(","))
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _facts(schema: pa.Schema, columns: pa.Table, place: str) -> Facts | None:
    count = columns.num_rows
    try:
        noted = json.loads((schema.metadata or {})[_KEY])
        height, width, channels = noted["shape"]
        written = noted["rows"]
    except (KeyError, ValueError, TypeError):
        return None
    if written != count and not place.endswith(".parquet"):
        raise UserError(f"{place} has {count} of the {written} images that it was written with: run jobs.ingest again")
    sums = columns["meanet_moments"].combine_chunks().flatten().to_numpy().reshape(count, 2, channels)
    joined = b"".join(columns["meanet_digest"].to_pylist())
    digests = np.frombuffer(joined, dtype=np.uint8).reshape(count, 32)
    return Facts(noted["image_size"], (height, width, channels), sums, digests)


def schema_of(
    class_names: Sequence[str], shape: tuple[int, int, int], image_size: int | None, **more: object
) -> pa.Schema:
    """The layout that `jobs.ingest` writes and `ParquetSource` reads; `more` goes into its metadata."""
    noted = {"class_names": list(class_names), "shape": shape, "image_size": image_size, **more}
    return pa.schema(
        [
            ("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
            ("meanet_moments", pa.list_(pa.int64(), 2 * shape[2])),
            ("meanet_digest", pa.binary(32)),
        ],
        metadata={_KEY: json.dumps(noted).encode(), b"class_names": ",".join(class_names).encode()},
    )
