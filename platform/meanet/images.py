"""Encoded images -> pixels of one shape; what cannot be used is named by its kind."""

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode by number of channels."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
"""What may be trained on."""
_NAMED = 1000
"""Of each kind of unusable row, so many are remembered by name."""
_SHOWN = 5
"""And so many said in a line."""


class BadImageError(Exception):
    """An image that cannot be used; `kind` is one of a few words, the message says more."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # both: it travels between processes
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class ImageSpec:
    """The one shape that every image of a set is brought to."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    channels: int
    """1 = grey, 3 = RGB."""
    resize: bool = False
    """Scale the shorter side to 8/7 of the shape's and cut out the centre; else images must have the shape."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.height, self.width, self.channels

    def decode(self, data: bytes | None) -> Pixels:
        """Encoded bytes -> (H, W, C).

        Raises:
            BadImageError: they cannot be used.
        """
        return self.fit(open_image(data))

    def decode_crop(self, data: bytes | None, min_area: float, generator: np.random.Generator) -> Pixels:
        """As `decode`, of a random part: `min_area` to 1 of the area, aspect 3:4 to 4:3 (arXiv 1409.4842).

        Raises:
            BadImageError: they cannot be used.
        """
        image = open_image(data)
        self._check_mode(image)
        box = random_box(image.width, image.height, min_area, generator)
        return self._pixels(_load(image).resize((self.width, self.height), Image.Resampling.BILINEAR, box=box))

    def fit(self, image: Image.Image) -> Pixels:
        """An opened image -> (H, W, C).

        Raises:
            BadImageError: it cannot be used.
        """
        self._check_mode(image)
        if image.size == (self.width, self.height):
            return self._pixels(_load(image))
        if not self.resize:
            raise BadImageError("wrong size", f"{image.width}x{image.height} pixels, not {self.width}x{self.height}")
        scale = min(image.width / self.width, image.height / self.height) * 7 / 8
        left, top = (image.width - self.width * scale) / 2, (image.height - self.height * scale) / 2
        box = (left, top, left + self.width * scale, top + self.height * scale)
        return self._pixels(_load(image).resize((self.width, self.height), Image.Resampling.BILINEAR, box=box))

    def _check_mode(self, image: Image.Image) -> None:
        if image.mode != MODES[self.channels]:
            raise BadImageError("wrong mode", f"mode {image.mode}, not {MODES[self.channels]}")

    def _pixels(self, image: Image.Image) -> Pixels:
        return np.asarray(image, dtype=np.uint8).reshape(self.shape)


def open_image(data: bytes | None) -> Image.Image:
    """Read an image's header.

    Raises:
        BadImageError: there is none.
    """
    if not data:
        raise BadImageError("empty", "no bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise BadImageError("undecodable", f"{len(data)} bytes that are no image of a known format") from error
        except Exception as error:  # Pillow's parsers raise many kinds
            raise BadImageError("undecodable", f"{type(error).__name__}: {error}") from error


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as above
        kind = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadImageError(kind, str(error) or type(error).__name__) from error
    return image


def random_box(
    width: int, height: int, min_area: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part; the whole where ten draws do not fit, as torchvision does."""
    for _ in range(10):
        area = width * height * generator.uniform(min_area, 1)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide, high = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = generator.integers(0, width - wide + 1), generator.integers(0, height - high + 1)
            return float(left), float(top), float(left + wide), float(top + high)
    return 0.0, 0.0, float(width), float(height)


def moments(images: Pixels) -> NDArray[np.int64]:
    """(N, 2, C) of (N, H, W, C): each channel's sum of bytes, and of their squares; exact, so they add up anyhow."""
    squares = images.astype(np.uint16) ** 2
    return np.stack([images.sum((1, 2), dtype=np.int64), squares.sum((1, 2), dtype=np.int64)], axis=1)


def pixel_digest(image: Pixels) -> bytes:
    """SHA-256 of one image's pixels, 32 bytes."""
    return hashlib.sha256(image.tobytes()).digest()


@dataclass
class Skipped:
    """Rows of a source that cannot be used: how many of each kind, and which."""

    rows: int = 0
    """Of the source, usable or not."""
    counts: Counter[str] = field(default_factory=Counter)
    """By kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By kind: the names of the first thousand, with what is wrong."""

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.counts.values())

    def add(self, kind: str, name: str, detail: str) -> None:
        """Count one row."""
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _NAMED:
            shown.append(f"{name} ({detail})" if detail else name)

    def lines(self) -> list[str]:
        """One line a kind, for a person."""
        return [
            f"{self.counts[kind]} {kind}: {_listing(self.examples[kind][:_SHOWN], self.counts[kind])}"
            for kind in self.counts
        ]

    @staticmethod
    def of(*parts: "Skipped") -> "Skipped":
        """The parts together."""
        whole = Skipped(sum(part.rows for part in parts))
        for part in parts:
            whole.counts.update(part.counts)
            for kind, shown in part.examples.items():
                whole.examples[kind] = (whole.examples.get(kind, []) + shown)[:_NAMED]
        return whole


def _listing(examples: Iterable[str], total: int) -> str:
    shown = list(examples)
    rest = total - len(shown)
    return ", ".join(shown) + (f", and {rest} more" if rest else "")
