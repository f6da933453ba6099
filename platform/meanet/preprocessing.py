"""From bytes to what a network takes. Stored with the weights, so that training and serving cannot differ.

Shape letters: N images, H height, W width, C channels.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meanet import image_guard
from meanet.config import Payload, jpeg_quality
from meanet.errors import UserError
from meanet.images import MODES, ImageSpec

if TYPE_CHECKING:  # a device has no data sets, nor what reads them
    from meanet.data import Splits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What torchvision's weights were trained with."""


@dataclass(frozen=True)
class Preprocessing:
    """The image that a model takes, and how its pixels are scaled."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    channels: int
    """1 = grey, 3 = RGB."""
    mean: tuple[float, ...]
    """By channel, of pixels in 0..1."""
    std: tuple[float, ...]
    """By channel, of pixels in 0..1."""

    resize: bool = False
    """Whether images of another size are brought to this one, as `meanet.images.ImageSpec` does it."""

    @staticmethod
    def of(splits: "Splits", *, resize: bool = False, imagenet: bool = False) -> "Preprocessing":
        """The preprocessing that training images call for: their size, and their channel statistics or ImageNet's."""
        height, width, channels = splits.table.image_shape
        mean, std = splits.table.channel_statistics(splits.train)
        if imagenet and channels == 3:
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        return Preprocessing(height, width, channels, mean, tuple(max(value, 1e-6) for value in std), resize)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, H, W, C) bytes -> (N, C, H, W) floats of mean 0 and deviation 1."""
        scale = 1 / (255 * np.asarray(self.std, dtype=np.float32))
        shift = np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)
        normal = images.astype(np.float32) * scale - shift
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """PNG or JPEG bytes -> (H, W, C). Its parts are looked at before one is decoded (`meanet.image_guard`).

        Raises:
            UserError: not a whole PNG or JPEG, too dear to decode, or not of this model's size and channels.
        """
        if not data:
            raise UserError("the image is empty: send the bytes of a PNG or JPEG file")
        try:
            with Image.open(io.BytesIO(image_guard.lean(data)), formats=("PNG", "JPEG")) as image:
                self._check(image)
                return self._spec.fit(image)
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds: each means that the bytes are no image
            kind = type(error).__name__
            raise UserError(f"the {len(data)} bytes are no readable PNG or JPEG image: {kind}") from error

    @property
    def _spec(self) -> ImageSpec:
        return ImageSpec(self.height, self.width, self.channels, self.resize)

    def _check(self, image: Image.Image) -> None:
        if not self.resize and image.size != (self.width, self.height):
            raise UserError(
                f"the image is {image.size[0]}x{image.size[1]} pixels and this model takes {self.width}x{self.height}: "
                "resize it before sending"
            )
        if image.mode != MODES.get(self.channels):
            raise UserError(
                f"the image has mode {image.mode} and this model takes {self.channels} channel(s), 8 bits each "
                f"(mode {MODES.get(self.channels)}): convert it before sending"
            )


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """(H, W, C) -> the PNG bytes that a device would send."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W, C) -> JPEG bytes, by Pillow's defaults but for the quality, 1 to 100 (colour at half resolution)."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def transmit(images: NDArray[np.uint8], payload: Payload) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """What arrives of (N, H, W, C) images: the pixels that the cloud sees, and the (N,) bytes that were sent.

    Raises:
        UserError: there is no such payload.
    """
    quality = jpeg_quality(payload)
    if quality is None:
        sizes = [len(encode_png(image)) if payload == "png" else image.nbytes for image in images]
        return images, np.array(sizes, dtype=np.int64)
    sent = [encode_jpeg(image, quality) for image in images]
    arrived = np.empty_like(images)
    for row, data in enumerate(sent):
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            arrived[row] = np.asarray(image, dtype=np.uint8).reshape(images.shape[1:])
    return arrived, np.array([len(data) for data in sent], dtype=np.int64)
