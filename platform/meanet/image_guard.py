"""A look at a stranger's PNG or JPEG before anything is decoded: it may cost what its pixels cost, and no more.

What changes no pixel (profiles, texts, thumbnails, later frames) is left out, so that nobody inflates or parses it.
What makes decoding dear is bounded: pixels, chunks or segments, and a JPEG's scans, each of which passes over every
pixel.
Other bytes are handed on as they are: the decoder refuses them.

Sources: https://www.w3.org/TR/png-3 (chunks), ITU-T T.81 (markers).
"""

import re
from dataclasses import dataclass, field

from meanet.errors import UserError

MAX_PIXELS = 32 * 2**20
"""Decoded, a colour image takes three times as many bytes."""
MAX_PARTS = 8192
"""Chunks of a PNG, segments of a JPEG: an encoder that writes 8 KB at a time stays below it up to 64 MB."""
MAX_SCANS = 100
"""Of a JPEG; encoders write one, or about ten if it is progressive."""
MAX_SCANNED = 12 * MAX_PIXELS
"""Pixels times scans."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""The end of a scan's data, in which 0xff is followed by zero or a restart marker."""
_FILL = re.compile(rb"\xff+")
"""Before a marker's code; may be repeated."""
_ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a segment."""
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _COMMENT = 0xD9, 0xDA, 0xFE
_UNUSED = {*range(0xE1, 0xF0), _COMMENT} - {0xEE}
"""Application segments and comments; 0xe0 (JFIF) and 0xee (Adobe) say how colours are stored."""


def lean(data: bytes) -> bytes:
    """The image without what changes no pixel.

    Raises:
        UserError: to decode it would cost too much, or its parts contradict each other.
    """
    if data.startswith(_PNG):
        return _lean_png(data)
    if data.startswith(_JPEG):
        return _Jpeg(data).lean()
    return data


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"the image has {width}x{height} pixels and at most {MAX_PIXELS} are taken: scale it down")


def _check_parts(number: int, kind: str) -> None:
    if number > MAX_PARTS:
        raise UserError(f"the image has more than {MAX_PARTS} {kind}: encode it anew")


def _lean_png(data: bytes) -> bytes:
    kept, start, place, number = [], 0, len(_PNG), 0
    while place + 8 <= len(data):
        number += 1
        _check_parts(number, "chunks")
        name, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4])
        if (name == b"IHDR") != (number == 1):
            raise UserError("the PNG does not have one header, at its beginning: encode it anew")
        if number == 1:
            _check_pixels(int.from_bytes(data[place + 8 : place + 12]), int.from_bytes(data[place + 12 : place + 16]))
        if name[0] & 0x20 and name.isalpha():  # lower case: ancillary
            kept.append(data[start:place])
            start = end
        place = end
        if name == b"IEND":
            break
    return b"".join([*kept, data[start:place]]) if kept else data


@dataclass
class _Jpeg:
    """A walk over a JPEG's segments."""

    data: bytes = field(repr=False)
    scans: int = 0
    pixels: int = 0
    """Of the frame; 0 before its header."""

    def lean(self) -> bytes:
        """As above."""
        kept, start, place, number = [], 0, len(_JPEG), 0
        while (found := self._segment(place)) is not None:
            marker, begin, end = found
            number += 1
            _check_parts(number, "segments")
            if marker in _UNUSED:
                kept.append(self.data[start:place])
                start = end
            elif marker in _FRAMES:
                self._frame(begin)
            elif marker == _SOS:
                end = self._scan(end)
            place = end
            if marker == _EOI:
                break
        return b"".join([*kept, self.data[start:]]) if kept else self.data

    def _segment(self, place: int) -> tuple[int, int, int] | None:
        """Marker, begin of the content and end of the segment at a place; None where there is none."""
        data = self.data
        if place + 2 > len(data) or data[place] != 0xFF:
            return None
        if data[place + 1] == 0xFF and (fill := _FILL.match(data, place)):
            place = fill.end() - 1
            if place + 2 > len(data):
                return None
        marker, begin = data[place + 1], place + 2
        if marker in _ALONE or marker == _EOI:
            return marker, begin, begin
        return marker, begin + 2, begin + max(2, int.from_bytes(data[begin : begin + 2]))

    def _frame(self, begin: int) -> None:
        if self.pixels:
            raise UserError("the JPEG has more than one frame: encode it anew")
        height, width = (int.from_bytes(self.data[begin + at : begin + at + 2]) for at in (1, 3))
        _check_pixels(width, height)
        self.pixels = max(1, width * height)

    def _scan(self, place: int) -> int:
        """Count a scan; where its data ends."""
        self.scans += 1
        if self.scans > MAX_SCANS or self.scans * self.pixels > MAX_SCANNED:
            raise UserError(
                f"the JPEG has {self.scans} scans or more of {self.pixels} pixels: encode it anew as baseline"
            )
        found = _MARKER.search(self.data, place)
        return found.start() if found else len(self.data)
