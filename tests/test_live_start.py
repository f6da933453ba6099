"""A starting edge opens the way to the cloud before it takes requests, and starts without one."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from meanet.artifact import TrainedModel
from serve_apps import live
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.director import Orders
from serve_apps.live import LiveEdge
from serve_apps.rollout import Beat
from serve_apps.served import Served
from serve_apps.settings import Settings
from serve_apps.writes import Writes


class Links(live.Links):
    """To a control that wants version 7."""

    def ask(self) -> Callable[[Beat], Awaitable[Orders]]:
        async def ask(beat: Beat) -> Orders:
            await asyncio.sleep(0.01)
            return Orders(1, 7, (7,), None, Settings())

        return ask


@pytest.fixture
def started(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Awaitable[LiveEdge]]:
    """An edge that has started beside such a cloud."""
    monkeypatch.setattr(live, "_here", lambda: ("replica", "node"))
    monkeypatch.setattr(live.Loader, "edge", lambda self, version, held: Served.of(model, version))

    async def start(ask_cloud: Any) -> LiveEdge:
        control: Any = None
        edge = LiveEdge(Links("sqlite://", 7, "auto", control), ask_cloud, Writes())
        await edge.start()
        return edge

    return start


def test_cloud_is_asked_once_before_any_client_asks(started: Any, model: TrainedModel) -> None:
    asked: list[CloudRequest] = []

    async def ask_cloud(request: CloudRequest) -> CloudAnswer:
        await asyncio.sleep(0.1)
        asked.append(request)
        return CloudAnswer([0], [1.0])

    asyncio.run(started(ask_cloud))
    (request,) = asked
    taken = model.preprocessing
    assert (request.version, request.bodies) == (7, None)
    np.testing.assert_array_equal(request.pixels(taken), np.zeros((1, taken.height, taken.width, taken.channels)))


def test_edge_starts_where_the_cloud_fails(started: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def ask_cloud(_: CloudRequest) -> CloudAnswer:
        raise ConnectionError("away")

    async def all_of_it() -> None:
        edge = await started(ask_cloud)
        assert (edge.service.served.version, edge.service.breaker.state) == (7, "closed")

    asyncio.run(all_of_it())
    gc.collect()  # asyncio complains of an exception that nobody took when its task goes
    assert not [record for record in caplog.records if record.name == "asyncio"], "no error that nobody took"


def test_edge_starts_before_the_cloud_and_meets_it_later(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MEETING_S", 0.2)

    async def all_of_it() -> None:
        up, met = asyncio.Event(), asyncio.Event()

        async def ask_cloud(_: CloudRequest) -> CloudAnswer:
            await up.wait()
            met.set()
            return CloudAnswer([0], [1.0])

        await started(ask_cloud)
        assert not met.is_set()
        up.set()
        await asyncio.wait_for(met.wait(), 5)

    asyncio.run(all_of_it())


def test_cloud_that_hangs_is_given_up(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MEETING_S", 0.1)
    monkeypatch.setattr(live, "_MEET_LATER_S", 0.2)

    async def all_of_it() -> None:
        given_up = asyncio.Event()

        async def ask_cloud(_: CloudRequest) -> CloudAnswer:
            try:
                await asyncio.Event().wait()
            finally:
                given_up.set()
            return CloudAnswer([0], [1.0])

        await started(ask_cloud)
        await asyncio.wait_for(given_up.wait(), 5)

    asyncio.run(all_of_it())
