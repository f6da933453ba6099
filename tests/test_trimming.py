"""Memory of large bodies goes back to the system once they are over."""

import asyncio
import ctypes
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT

from serve_apps import trimming
from serve_apps.trimming import LARGE, Trimmer


def test_large_bodies_are_followed_by_one_trim_and_small_ones_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimming, "_AFTER_S", 0.05)
    trims: list[int] = []

    async def run() -> None:
        trimmer = Trimmer(lambda pad: trims.append(pad) or 1)
        trimmer.body_ended(LARGE - 1)
        await asyncio.sleep(0.2)
        assert trims == []
        for _ in range(10):
            trimmer.body_ended(LARGE)
        while not trims:  # which a thread does, on a busy machine later
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert trims == [0]
        trimmer.body_ended(2 * LARGE)
        while len(trims) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 20))


_FRAGMENTED = """
import asyncio, sys
from serve_apps import trimming
from benchmarks.memory import resident_of
import os
trimming._AFTER_S = 0.01
async def main():
    pieces = [bytes(60_000) for _ in range(2000)]  # 115 MB
    kept = [pieces[n] for n in range(0, 2000, 50)]
    pieces.clear()
    before = resident_of(os.getpid())
    trimming.Trimmer().body_ended(trimming.LARGE)
    await asyncio.sleep(0.5)
    print((before - resident_of(os.getpid())) // 2**20, len(kept))
asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not GNU's")
def test_what_lies_between_what_is_held_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FRAGMENTED], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert kept == 40
    assert given_back > 80
