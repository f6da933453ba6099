"""Clients for `benchmarks.fleet`: paced or in a closed loop, over one event loop and kept connections."""

import asyncio
import io
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from meanet.errors import UserError

_HEADERS = {"content-type": "image/png"}
_BATCHES = (1, 2, 4, 8, 16)
_ROUNDS = 9


@dataclass(frozen=True)
class Answered:
    """One answer."""

    seconds: float
    """Since the request was to be sent."""
    edge_s: float
    """Of the edge's blocks, as the server has it."""
    cloud_s: float
    """Of the cloud's call, as the server has it; 0 where there was none."""
    exit: str
    degraded: bool


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, due: float) -> Answered:
    async with session.post(f"{url}/v1/classify", data=body, headers=_HEADERS) as response:
        text = await response.text()
    if response.status != 200:
        raise UserError(f"{url} answered {response.status} to a test image: {text[:200]}")
    answer: dict[str, Any] = json.loads(text)
    seconds, ms = time.perf_counter() - due, answer["ms"]
    return Answered(seconds, ms["edge"] / 1000, ms["cloud"] / 1000, answer["exit"], answer["degraded"])


async def closed_loop(session: aiohttp.ClientSession, url: str, bodies: list[bytes], count: int) -> list[Answered]:
    """One client that sends as soon as it has its answer."""
    walk = itertools.islice(itertools.cycle(bodies), count)
    return [await _ask(session, url, body, time.perf_counter()) for body in walk]


@dataclass(frozen=True)
class Pace:
    """How clients send that do not wait for their last answer."""

    clients: int
    rate: float
    """Requests a second of each, at random (Poisson)."""
    seconds: float
    seed: int


async def paced(
    session: aiohttp.ClientSession, url: str, walks: Sequence[Iterator[bytes]], pace: Pace
) -> list[Answered]:
    """All answers to clients that each keep this pace, and go on in a walk of their own."""
    start = time.perf_counter() + 0.1
    streams = np.random.SeedSequence(pace.seed).spawn(pace.clients)
    found = await asyncio.gather(
        *(_client(session, url, walk, _times(start, pace, stream)) for walk, stream in zip(walks, streams, strict=True))
    )
    return [answer for answers in found for answer in answers]


def _times(start: float, pace: Pace, stream: np.random.SeedSequence) -> list[float]:
    generator = np.random.default_rng(stream)
    count = generator.poisson(pace.rate * pace.seconds)
    times: list[float] = (start + np.sort(generator.random(count)) * pace.seconds).tolist()
    return times


def walk(bodies: list[bytes], seed: Sequence[int]) -> Iterator[bytes]:
    """All images in one random order after the other, without end."""
    generator = np.random.default_rng(seed)
    while True:
        for place in generator.permutation(len(bodies)):
            yield bodies[place]


async def _client(
    session: aiohttp.ClientSession, url: str, walk: Iterator[bytes], times: list[float]
) -> list[Answered]:
    asked = []
    for due in times:
        body = next(walk)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asked.append(asyncio.ensure_future(_ask(session, url, body, due)))
    return list(await asyncio.gather(*asked))


async def cloud_batches(session: aiohttp.ClientSession, url: str, bodies: list[bytes]) -> float:
    """Seconds of the cloud for one more image in a call: the slope over batches of images that all go there."""
    if not bodies:
        raise UserError("the operating point that is served sends nothing to the cloud: serve one that does")
    sizes, seconds = [], []
    for size in _BATCHES:
        chosen = list(itertools.islice(itertools.cycle(bodies), size))
        spent = [await _batch(session, url, chosen) for _ in range(_ROUNDS)]
        sizes.append(size)
        seconds.append(float(np.median(spent)))
    slope = float(np.polyfit(sizes, seconds, 1)[0])
    return max(slope, 1e-5)


async def _batch(session: aiohttp.ClientSession, url: str, bodies: list[bytes]) -> float:
    form = aiohttp.FormData()
    for number, body in enumerate(bodies):
        form.add_field("image", io.BytesIO(body), filename=f"{number}.png", content_type="image/png")
    async with session.post(f"{url}/v1/classify/batch", data=form) as response:
        text = await response.text()
    if response.status != 200:
        raise UserError(f"{url} answered {response.status} to a batch: {text[:200]}")
    answer: dict[str, Any] = json.loads(text)
    return max(float(one["ms"]["cloud"]) for one in answer["answers"]) / 1000
