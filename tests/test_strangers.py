"""Thousands of hostile bodies, seeded: each is answered or refused, at bounded cost, and right answers stay right."""

import asyncio
import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Server

from benchmarks import load, strangers
from benchmarks.memory import Memory, resident_of, tree
from meanet.data import Splits
from meanet.errors import UserError
from meanet.preprocessing import Preprocessing, encode_png

MEGABYTE = 2**20


@pytest.fixture
def as_served() -> Iterator[None]:
    """A decoder's warning about a stranger's bytes is no error outside of tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@pytest.mark.usefixtures("as_served")
@pytest.mark.parametrize(
    ("shape", "resize", "bound"),
    [((8, 8, 1), False, 64 * MEGABYTE), ((32, 32, 3), False, 64 * MEGABYTE), ((32, 32, 3), True, 400 * MEGABYTE)],
)
def test_every_image_is_decoded_or_refused(shape: strangers.Shape, resize: bool, bound: int) -> None:
    """The bound where images are resized: 32 M pixels, three bytes each, and what Pillow takes to scale them."""
    preprocessing = Preprocessing(*shape, mean=(0.5,) * shape[2], std=(0.25,) * shape[2], resize=resize)
    generator, outcomes = np.random.default_rng(7), Counter[tuple[str, bool]]()
    memory = Memory()
    for _ in range(2000):
        kind, body = strangers.image(shape, generator)
        try:
            pixels = preprocessing.decode(body)
        except UserError:
            outcomes[kind, False] += 1
        else:
            assert (pixels.shape, pixels.dtype) == (shape, np.uint8)
            outcomes[kind, True] += 1
    assert memory.peak() < bound
    refused = {kind for kind, taken in outcomes if not taken}
    taken = {kind for kind, taken in outcomes if taken}
    assert refused | taken == set(strangers.IMAGES), "every kind came"
    assert {"thousands of scans", "thousands of chunks", "PNG of billions of pixels", "noise"} <= refused
    assert {"inflating profile or text", "inflating pixels", "malformed application data"} <= taken


def test_no_file_or_address_is_opened_for_a_stranger() -> None:
    preprocessing, generator = Preprocessing(8, 8, 1, (0.5,), (0.25,), resize=True), np.random.default_rng(3)
    opened, watching = list[str](), [False]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching[0] and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            opened.append(f"{event} {arguments}")

    sys.addaudithook(watch)
    bodies = [body for maker in strangers.IMAGES.values() for body in (maker((8, 8, 1), generator) for _ in range(30))]
    for watching[0] in (False, True):  # the first time, Pillow imports its decoders
        for body in bodies:
            with contextlib.suppress(UserError):
                preprocessing.decode(body)
    assert opened == []
    Path(__file__).read_bytes()
    watching[0] = False
    assert len(opened) == 1, "the watch works"


def test_generator_is_seeded() -> None:
    first, again, other = (list(strangers.requests((8, 8, 1), seed, 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def replicas(pid: int) -> list[int]:
    """Serve's replicas among a process's descendants."""
    return [one for one in tree(pid) if b"ServeReplica" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.cluster
def test_hostile_requests_are_refused_and_right_answers_stay_right(
    served: Server, client: httpx.Client, splits: Splits
) -> None:
    bodies = [encode_png(image) for image in splits.table.images[splits.test[:30]]]

    def ask() -> list[tuple[int, str]]:
        got = [client.post("/v1/classify", content=body).json() for body in bodies]
        return [(answer["class_id"], answer["exit"]) for answer in got]

    before, at_work = ask(), replicas(served.pid)
    assert len(at_work) == 3, "edge, cloud, control"
    hostile = list(strangers.requests((8, 8, 1), 5, 400))
    statuses = asyncio.run(bombard(served.url, hostile))
    unexpected = [
        (one, status)
        for one, status in zip(hostile, statuses, strict=True)
        if not (200 <= status < 500 or (status == load.CLOSED and one.kind in ("headers", "query, path or method")))
    ]
    assert unexpected == []
    assert {200, 400, 404, 405, 415, 422} <= set(statuses)
    assert ask() == before
    assert replicas(served.pid) == at_work, "no process was lost"
    assert all(resident_of(pid) < 1500 * MEGABYTE for pid in at_work)


async def bombard(url: str, hostile: list[strangers.Hostile]) -> list[int]:
    async with load.connections(url, 4) as connections:

        async def some(first: int) -> list[tuple[int, int]]:
            found = []
            for number in range(first, len(hostile), len(connections)):
                one = hostile[number]
                request = load.encode(one.method, one.path, one.body, one.headers)
                found.append((number, (await connections[first].ask(request, 30)).status))
            return found

        parts = await asyncio.gather(*(some(first) for first in range(len(connections))))
    return [status for _, status in sorted(pair for part in parts for pair in part)]
