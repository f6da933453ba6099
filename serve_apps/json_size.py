"""How much structure the JSON of a request may have: looked at before it is read, for that holds up the whole replica.

64 MiB of empty lists take seconds, under the interpreter's lock, and gigabytes; as much text takes a tenth of a second.
"""

import json
from typing import Any

MAX_NUMBERS = 2**20
"""Of a tensor in JSON, such as 341 images of 32x32 in colour; a binary tensor may have more."""
_MOST = {b",": MAX_NUMBERS, b"[": 2**18, b":": 2**16, b"{": 2**14}
"""Nested pixels have the most lists: 2048 images of 8x8, each number in one of its own, 149,505. Base64 has no mark."""
_FRACTIONS = 2**14
"""Pixels are whole numbers, and these cost ten times as much."""
_DIGITS = 40
"""Python's time for a whole number is the square of its digits."""


class CrowdedError(ValueError):
    """The JSON has more of something than any request; the message says of what."""


def loads(body: bytes) -> Any:
    """What a body's JSON holds.

    Raises:
        CrowdedError: too much.
        ValueError: it is no JSON; as `json.loads`.
        RecursionError: it is too deep; likewise.
    """
    for mark, limit in _MOST.items():
        count = body.count(mark)
        if count > limit:
            raise _crowded(f"{count} times {mark.decode()!r}", limit)
    return json.loads(body, parse_int=_whole, parse_float=_Fractions())


def _crowded(what: str, limit: int) -> CrowdedError:
    return CrowdedError(
        f"the body's JSON has {what} and the limit is {limit}: send fewer images at a time, as files or as a binary "
        "tensor"
    )


def _whole(text: str) -> int:
    if len(text) > _DIGITS:  # a sign counts
        raise CrowdedError(f"the body's JSON has a whole number of {len(text)} digits: give {_DIGITS} at most")
    return int(text)


class _Fractions:
    """Reads the numbers of one body that are not whole."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, text: str) -> float:
        self._count += 1
        if self._count > _FRACTIONS:
            raise _crowded(f"{self._count} numbers with a fraction or an exponent", _FRACTIONS)
        return float(text)
