"""The one form that every source ends in. Shape letters: N samples, H height, W width, C channels."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meanet.images import Pixels, Skipped, moments, pixel_digest

Rows = NDArray[np.int64]
_CHUNK = 1024


class Images(ABC):
    """Labels at hand, pixels in memory or not."""

    labels: NDArray[np.int64]
    """(N,), 0..num_classes-1."""
    class_names: tuple[str, ...]
    """By class id."""
    source: str
    """The URI that it came from."""
    test_rows: Rows | None
    """Where the source says itself which images are for the test; None = set a share aside."""
    skipped: Skipped
    """What could not be used and is not among the rows."""

    @property
    def num_classes(self) -> int:
        """Number of classes, C in the method's words."""
        return len(self.class_names)

    @property
    def num_bytes(self) -> int:
        """Of all pixels, decoded."""
        return len(self.labels) * int(np.prod(self.image_shape))

    @property
    def evaluation_batch(self) -> int:
        """How many images a network evaluates at once: fewer of large ones."""
        height, width, _ = self.image_shape
        return min(512, max(16, 2**17 // (height * width)))

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""

    @abstractmethod
    def batches(self, rows: Rows, size: int) -> Iterator[Pixels]:
        """The images of `rows` in that order, up to `size` at a time: (B, H, W, C)."""

    @abstractmethod
    def moments(self) -> NDArray[np.int64]:
        """(N, 2, C) sum and sum of squares of each channel's bytes."""

    @abstractmethod
    def pixel_digests(self) -> NDArray[np.uint8]:
        """(N, 32) SHA-256 of each image's pixels."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape, pixels, labels and class names, 64 hex digits; the same however the pixels are kept."""
        return self.digest_of(np.arange(len(self.labels)))

    def digest_of(self, rows: Rows) -> str:
        """Of these rows alone."""
        hasher = hashlib.sha256(repr((len(rows), *self.image_shape, self.class_names)).encode())
        hasher.update(self.pixel_digests()[rows].tobytes())
        hasher.update(self.labels[rows].tobytes())
        return hasher.hexdigest()

    def channel_statistics(self, rows: Rows | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the pixels of `rows` (all if None), in 0..1."""
        of_rows = self.moments() if rows is None else self.moments()[rows]
        height, width, _ = self.image_shape
        mean, square = of_rows.sum(axis=0) / (len(of_rows) * height * width)
        return tuple((mean / 255).tolist()), tuple((np.sqrt(np.maximum(square - mean**2, 0)) / 255).tolist())


@dataclass(frozen=True)
class ImageTable(Images):
    """Images and labels in memory."""

    images: Pixels
    """(N, H, W, C), 0..255."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    source: str
    test_rows: Rows | None = None
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def batches(self, rows: Rows, size: int) -> Iterator[Pixels]:
        """The images of `rows` in that order, up to `size` at a time: (B, H, W, C)."""
        for start in range(0, len(rows), size):
            yield self.images[rows[start : start + size]]

    def moments(self) -> NDArray[np.int64]:
        """(N, 2, C) sum and sum of squares of each channel's bytes."""
        parts = [moments(self.images[start : start + _CHUNK]) for start in range(0, len(self.images), _CHUNK)]
        return np.concatenate(parts)

    def pixel_digests(self) -> NDArray[np.uint8]:
        """(N, 32) SHA-256 of each image's pixels."""
        joined = b"".join(pixel_digest(image) for image in self.images)
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)

    def take(self, index: Rows) -> "ImageTable":
        """The rows of `index`, in that order."""
        return ImageTable(self.images[index], self.labels[index], self.class_names, self.source)
