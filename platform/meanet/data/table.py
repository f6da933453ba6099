"""The one form that every source ends in. Shape letters: N samples, H height, W width, C channels."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageTable:
    """Images and labels in memory."""

    images: NDArray[np.uint8]
    """(N, H, W, C), 0..255."""
    labels: NDArray[np.int64]
    """(N,), 0..num_classes-1."""
    class_names: tuple[str, ...]
    """By class id."""
    source: str
    """The URI that it came from."""

    @property
    def num_classes(self) -> int:
        """Number of classes, C in the method's words."""
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape, pixels, labels and class names, 64 hex digits."""
        hasher = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        hasher.update(np.ascontiguousarray(self.images).tobytes())
        hasher.update(np.ascontiguousarray(self.labels).tobytes())
        return hasher.hexdigest()

    def take(self, index: NDArray[np.int64]) -> "ImageTable":
        """The rows of `index`, in that order."""
        return ImageTable(self.images[index], self.labels[index], self.class_names, self.source)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, in 0..1."""
        scaled = self.images.reshape(-1, self.images.shape[-1]).astype(np.float64) / 255
        return tuple(scaled.mean(axis=0).tolist()), tuple(scaled.std(axis=0).tolist())
