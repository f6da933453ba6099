"""A source -> images of one shape with good labels. Everything is decoded once, in parallel: unusable rows are found,
counted and named before anything is trained on, and what is known of the others is the same however they are kept.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meanet.config import DataConfig
from meanet.data.sources import MISSING, Encoded, Facts, Shard, open_source
from meanet.data.table import Images, ImageTable, Rows
from meanet.errors import UserError
from meanet.images import MODES, BadImageError, ImageSpec, Pixels, Skipped, moments, open_image, pixel_digest

Kept = Literal["resident", "streaming"]
_PROBED = 64
_USUAL_SHARE = 0.8
"""A size that fewer of the first images have is not the set's: the user must choose one."""
_RESIDENT_SHARE = 4
"""A set that takes less than this part of the machine's memory is kept in it."""


@dataclass(frozen=True)
class StreamedTable(Images):
    """Images that stay where they are, encoded, and are decoded as they are asked for."""

    sources: tuple[Encoded, ...]
    spec: ImageSpec
    rows: Rows
    """(N,) of the usable images: their number among all rows of all sources."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    source: str
    facts: Facts
    """Of the usable images."""
    test_rows: Rows | None
    skipped: Skipped

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.spec.shape

    def moments(self) -> NDArray[np.int64]:
        """(N, 2, C) sum and sum of squares of each channel's bytes."""
        return self.facts.moments

    def pixel_digests(self) -> NDArray[np.uint8]:
        """(N, 32) SHA-256 of each image's pixels."""
        return self.facts.digests

    def pieces(self, rows: Rows) -> list["Piece"]:
        """What must be read to have these rows, each shard once; within a piece, in order of rows."""
        order = np.sort(rows)
        numbers = self.rows[order]
        pieces, first = [], 0
        for source in self.sources:
            for number, (start, stop) in enumerate(source.bounds):
                low, high = np.searchsorted(numbers, [first + start, first + stop])
                if high > low:
                    pieces.append(Piece(source.shard(number), order[low:high], numbers[low:high] - first - start))
            first += len(source.labels)
        return pieces

    def batches(self, rows: Rows, size: int) -> Iterator[Pixels]:
        """The images of `rows` in that order, up to `size` at a time; rows in ascending order are read once each."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(rows), size):
                asked = rows[start : start + size]
                out = np.empty((len(asked), *self.image_shape), dtype=np.uint8)
                for piece in self.pieces(np.unique(asked)):
                    encoded = piece.read()
                    for row, image in zip(piece.rows, pool.map(self.spec.decode, encoded), strict=True):
                        out[asked == row] = image
                yield out


@dataclass(frozen=True)
class Piece:
    """Some images of one shard; plain data that may travel to another process."""

    shard: Shard
    rows: Rows
    """In the table."""
    offsets: Rows
    """In the shard."""

    def read(self) -> list[bytes]:
        """Their encoded bytes."""
        return [data or b"" for data in self.shard.read(self.offsets.tolist())]

    def split(self, size: int) -> "list[Piece]":
        """The same images, at most `size` in a piece."""
        starts = range(0, len(self.rows), size)
        return [Piece(self.shard, self.rows[at : at + size], self.offsets[at : at + size]) for at in starts]


def load(config: DataConfig, keep: Kept | None = None) -> Images:
    """Everything that a config names, checked.

    Args:
        config: sources and what is done with unusable rows.
        keep: resident or streaming whatever the config says and the sizes are.

    Raises:
        UserError: no such source; images of several sizes; more unusable rows than may be skipped.
    """
    source = open_source(config.source, config)
    test = open_source(config.test_source, config) if config.test_source else None
    if isinstance(source, ImageTable) and (test is None or isinstance(test, ImageTable)):
        return _built_in(source, test, config)
    parts = [part for part in (source, test) if part is not None]
    if any(isinstance(part, ImageTable) for part in parts):
        raise UserError(
            f"data.source is {config.source!r} and data.test_source {config.test_source!r}: a built-in set and one of "
            "files cannot be mixed; give both of one kind"
        )
    encoded = [part for part in parts if not isinstance(part, ImageTable)]
    return _Loader(encoded, config, keep).load()


def _built_in(source: ImageTable, test: ImageTable | None, config: DataConfig) -> ImageTable:
    if config.feed == "streaming":
        raise UserError(f"data.source {config.source!r} is in memory already: streaming is for folder: and parquet:")
    if config.image_size not in (None, *source.image_shape[:2]):
        raise UserError(
            f"data.image_size is {config.image_size} and the images of {config.source!r} are "
            f"{source.image_shape[0]} pixels: a built-in set is not resized; drop the flag"
        )
    if test is None:
        return source
    count = len(source.labels)
    return ImageTable(
        np.concatenate([source.images, test.images]),
        np.concatenate([source.labels, test.labels]),
        source.class_names,
        f"{source.source}+{test.source}",
        np.arange(count, count + len(test.labels)),
    )


def resident_limit() -> int:
    """Bytes of decoded pixels up to which a set is kept in memory: a quarter of this machine's."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _RESIDENT_SHARE


class _Loader:
    """Reads one or two sources (all, or training and test) as one."""

    def __init__(self, sources: Sequence[Encoded], config: DataConfig, keep: Kept | None) -> None:
        self.sources, self.config = sources, config
        self.uri = "+".join(source.uri for source in sources)
        self.class_names = _common_names(sources)
        self.labels = np.concatenate([_renamed(source, self.class_names) for source in sources])
        self.first = np.cumsum([0, *(len(source.labels) for source in sources)])
        self.skipped = Skipped(len(self.labels))
        self.spec = self._probe()
        self.resident = self._is_resident(keep)

    def load(self) -> Images:
        good = self._check_labels()
        noted = [_fitting_facts(source, self.config, self.spec) for source in self.sources]
        if not self.resident and all(noted):
            facts = [fact for fact in noted if fact is not None]
            sums, digests = (np.concatenate([getattr(f, name) for f in facts]) for name in ("moments", "digests"))
            pixels = None
        else:
            pixels, sums, digests = self._decode(good)
        rows = np.flatnonzero(good)
        self._check_share()
        test_rows = np.flatnonzero(rows >= self.first[1]) if len(self.sources) > 1 else None
        labels = self.labels[rows]
        if pixels is not None:
            pixels = pixels if len(rows) == len(pixels) else pixels[rows]
            return ImageTable(pixels, labels, self.class_names, self.uri, test_rows, self.skipped)
        return StreamedTable(
            tuple(replace(source, facts=None) for source in self.sources),  # type: ignore[type-var]
            self.spec,
            rows,
            labels,
            self.class_names,
            self.uri,
            Facts(self.config.image_size, self.spec.shape, sums[rows], digests[rows]),
            test_rows,
            self.skipped,
        )

    def _name(self, row: int) -> str:
        number = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.sources[number].name(row - int(self.first[number]))

    def _is_resident(self, keep: Kept | None) -> bool:
        if keep or self.config.feed != "auto":
            return (keep or self.config.feed) == "resident"
        return len(self.labels) * int(np.prod(self.spec.shape)) <= resident_limit()

    def _probe(self) -> ImageSpec:
        """The shape of most images, by the headers of a few spread over the source; checked on all of them later."""
        sizes: Counter[tuple[int, int]] = Counter()
        modes: Counter[str] = Counter()
        for image in _headers(self.sources):
            sizes[(image.height, image.width)] += 1
            modes[image.mode] += 1
        if not sizes:
            raise UserError(f"{self.uri}: none of the first images can be decoded; give PNG, JPEG or WebP files")
        known = {mode: channels for channels, mode in MODES.items()}
        usual = max((mode for mode in modes if mode in known), key=lambda mode: modes[mode], default="RGB")
        channels = self.config.channels or known[usual]
        if self.config.image_size:
            return ImageSpec(self.config.image_size, self.config.image_size, channels, resize=True)
        ((height, width), count), *others = sizes.most_common()
        if others and count < _USUAL_SHARE * sizes.total():
            shown = ", ".join(f"{width}x{height}" for height, width in list(sizes)[:4])
            raise UserError(
                f"{self.uri} has images of several sizes ({shown}): say which they are to have with --data.image-size"
            )
        return ImageSpec(height, width, channels)

    def _check_labels(self) -> NDArray[np.bool_]:
        good = (self.labels >= 0) & (self.labels < len(self.class_names))
        for row in np.flatnonzero(~good).tolist():
            label = int(self.labels[row])
            if label == MISSING:
                self.skipped.add("without label", self._name(row), "")
            else:
                self.skipped.add("label out of range", self._name(row), f"{label} of {len(self.class_names)} classes")
        return good

    def _decode(self, good: NDArray[np.bool_]) -> tuple[Pixels | None, NDArray[np.int64], NDArray[np.uint8]]:
        """Decode every row with a label; `good` loses those that cannot be."""
        total = len(self.labels)
        pixels = np.empty((total, *self.spec.shape), dtype=np.uint8) if self.resident else None
        sums = np.zeros((total, 2, self.spec.channels), dtype=np.int64)
        digests = np.zeros((total, 32), dtype=np.uint8)
        jobs = [(number, shard) for number, source in enumerate(self.sources) for shard in range(len(source.bounds))]

        def scan(job: tuple[int, int]) -> list[tuple[int, BadImageError]]:
            number, shard = job
            first = int(self.first[number]) + self.sources[number].bounds[shard][0]
            bad = []
            for row, data in enumerate(self.sources[number].shard(shard).read(), first):
                if not good[row]:
                    continue
                try:
                    image = self.spec.decode(data)
                except BadImageError as error:
                    bad.append((row, error))
                    continue
                if pixels is not None:
                    pixels[row] = image
                else:
                    sums[row] = moments(image[np.newaxis])[0]
                    digests[row] = np.frombuffer(pixel_digest(image), dtype=np.uint8)
            return bad

        for bad in _parallel(scan, jobs):
            for row, error in bad:
                self.skipped.add(error.kind, self._name(row), str(error))
                good[row] = False
        return pixels, sums, digests

    def _check_share(self) -> None:
        share, allowed = self.skipped.total / max(1, self.skipped.rows), self.config.max_bad_fraction
        if share > allowed:
            hint = " (--data.image-size brings images to one size)" if "wrong size" in self.skipped.counts else ""
            raise UserError(
                f"{self.skipped.total} of {self.skipped.rows} rows of {self.uri} cannot be used ({share:.2%}), and "
                f"data.max_bad_fraction allows {allowed:.2%}: repair them or raise it{hint}; "
                + "; ".join(self.skipped.lines())
            )


_Bad = list[tuple[int, BadImageError]]


def _parallel(scan: Callable[[tuple[int, int]], _Bad], jobs: list[tuple[int, int]]) -> Iterator[_Bad]:
    """Decoders release the interpreter's lock, so threads use every core; a few shards at a time are in memory."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(scan, jobs)


def _headers(sources: Iterable[Encoded]) -> Iterator[Image.Image]:
    """Of a few images at the beginning of some shards of each source."""
    for source in sources:
        last = len(source.bounds) - 1
        for number in np.unique(np.linspace(0, last, 4).astype(int)).tolist() if last >= 0 else []:
            for data in source.shard(number).read()[:_PROBED]:
                try:
                    yield open_image(data)
                except BadImageError:
                    continue


def _common_names(sources: Sequence[Encoded]) -> tuple[str, ...]:
    """The training source's names, or its labels as names."""
    names = sources[0].class_names
    if names is None:
        labels = np.concatenate([source.labels for source in sources])
        labels = labels[labels < len(labels)]  # a label beyond the number of rows is a mistake, not a class
        return tuple(str(class_id) for class_id in range(int(labels.max(initial=-1)) + 1))
    return names


def _renamed(source: Encoded, names: tuple[str, ...]) -> NDArray[np.int64]:
    """A source's labels as ids of the common names.

    Raises:
        UserError: it has a class that the training source has not.
    """
    if source.class_names is None or source.class_names == names:
        return source.labels
    unknown = sorted(set(source.class_names) - set(names))
    if unknown:
        raise UserError(f"{source.uri} has the class {unknown[0]!r}, which the training images have not: remove it")
    ids = np.array([names.index(name) for name in source.class_names], dtype=np.int64)
    known = (source.labels >= 0) & (source.labels < len(ids))
    return np.where(known, ids[np.where(known, source.labels, 0)], source.labels)


def _fitting_facts(source: Encoded, config: DataConfig, spec: ImageSpec) -> Facts | None:
    facts = source.facts
    return facts if facts and (facts.image_size, facts.shape) == (config.image_size, spec.shape) else None
