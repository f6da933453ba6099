"""What is left out of a stranger's image changes no pixel; what makes decoding dear is refused before it begins."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from benchmarks.strangers import chunk, file_of, png, scans, segments, zeros
from meanet.errors import UserError
from meanet.image_guard import MAX_PARTS, MAX_SCANS, lean

SHAPE = (24, 17, 3)


def pixels(body: bytes) -> np.ndarray:  # type: ignore[type-arg]
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"subsampling": 0, "optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_keeps_its_pixels_and_loses_the_rest(mode: str, options: dict[str, int]) -> None:
    sound = file_of(SHAPE, "JPEG", np.random.default_rng(1), mode, **options)
    extra = {"exif": b"Exif\0\0" + b"x" * 999, "icc_profile": b"p" * 70_000, "comment": b"c" * 99}
    laden = file_of(SHAPE, "JPEG", np.random.default_rng(1), mode, **options, **extra)
    assert len(laden) > len(sound) + 70_000
    assert lean(laden) == sound, "the same file as was written without them"
    np.testing.assert_array_equal(pixels(lean(laden)), pixels(laden))


def test_a_png_keeps_its_pixels_and_loses_the_rest() -> None:
    sound = file_of(SHAPE, "PNG", np.random.default_rng(1))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("a", "b" * 9000, zip=True)
    laden = file_of(SHAPE, "PNG", np.random.default_rng(1), pnginfo=texts, icc_profile=b"p" * 5000, dpi=(72, 72))
    assert lean(laden + b"after the end") == sound
    assert lean(sound) is sound, "nothing is copied without need"


def test_restarts_and_repeated_fill_bytes_are_of_the_standard() -> None:
    body = file_of((64, 64, 3), "JPEG", np.random.default_rng(1), restart_marker_blocks=1)
    assert body.count(b"\xff\xd3") > 0
    assert lean(body) == body
    filled = body.replace(b"\xff\xdb", b"\xff" * 9 + b"\xdb", 1)
    np.testing.assert_array_equal(pixels(lean(filled)), pixels(body))


def test_inflating_chunks_are_never_inflated() -> None:
    bomb = png((8, 8, 1), b"".join(chunk(name, b"k\0\0" + zeros(64)) for name in (b"zTXt", b"iCCP")))
    assert lean(bomb) == png((8, 8, 1))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (png((60_000, 60_000, 1), data=b""), "60000x60000 pixels and at most"),
        (png((8, 8, 1), chunk(b"tEXt", b"") * MAX_PARTS), f"more than {MAX_PARTS} chunks"),
        (png((8, 8, 1), png((9, 9, 1))[8:33]), "does not have one header"),
        (png((8, 8, 1)).replace(b"IHDR", b"zzzz"), "does not have one header"),
        (scans(SHAPE, MAX_SCANS, np.random.default_rng(1)), f"has {MAX_SCANS + 1} scans or more"),
        (segments(SHAPE, MAX_PARTS, np.random.default_rng(1)), f"more than {MAX_PARTS} segments"),
    ],
)
def test_what_is_dear_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        lean(body)


def test_many_scans_of_many_pixels_are_refused_though_each_alone_is_taken() -> None:
    """A scan passes over every pixel, so that the limit is on their product."""
    body = bytearray(scans((8, 8, 1), 20, np.random.default_rng(1)))
    assert lean(bytes(body)) == body
    frame = body.find(b"\xff\xc2")
    body[frame + 5 : frame + 9] = b"\x16\x00\x16\x00"  # 5632x5632
    with pytest.raises(UserError, match=r"scans or more of 31719424 pixels: encode it anew as baseline"):
        lean(bytes(body))


def test_a_second_frame_is_refused() -> None:
    body = file_of(SHAPE, "JPEG", np.random.default_rng(1))
    frame = body.find(b"\xff\xc0")
    size = 2 + int.from_bytes(body[frame + 2 : frame + 4])
    with pytest.raises(UserError, match="more than one frame"):
        lean(body[:frame] + body[frame : frame + size] + body[frame:])


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8" + b"\xff" * 99]
)
def test_other_bytes_are_handed_on(body: bytes) -> None:
    assert lean(body) == body
