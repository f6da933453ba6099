"""The edge's service at its limits: tight deadlines, requests whose time is over in the queue, blocks that fail."""

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from conftest import PATIENT
from fastapi import HTTPException, Response
from test_edge import ALL_TO_CLOUD, bodies, honest, late
from test_payloads import with_payload

from meanet.artifact import TrainedModel
from meanet.deadlines import cloud_patience, longest_wait
from serve_apps import edge
from serve_apps.cloud_calls import CloudAnswer, CloudRequest, upload_sizes
from serve_apps.director import Outcome
from serve_apps.edge import EdgeService, OverloadedError
from serve_apps.live_api import _after
from serve_apps.micro_batch import Pass
from serve_apps.observer import Observer
from serve_apps.served import Served
from serve_apps.settings import Settings

__all__ = ["bodies"]


@pytest.mark.parametrize(
    "tight", [{"deadline_s": 0.9, "cloud_budget_s": 1.5}, {"deadline_s": 1.0, "cloud_budget_s": 3.0}]
)
def test_breaker_opens_where_the_deadline_leaves_less_than_the_budget(
    model: TrainedModel, bodies: list[bytes], tight: dict[str, float]
) -> None:
    policy = model.policy.with_request(threshold=ALL_TO_CLOUD)

    async def run() -> None:
        settings = Settings(**tight, breaker_failures=2)  # type: ignore[arg-type]
        service = EdgeService(Served.of(model, 1), lambda request: late(model, 5.0, request), settings)
        await service.answer(bodies[:1], policy.with_request(edge_only=True))
        reasons = [(await service.answer(bodies[:1], policy))[0].reason for _ in range(3)]
        assert reasons == ["cloud timed out", "cloud timed out", "cloud circuit open"]

    asyncio.run(run())


def test_patience_is_the_budget_unless_the_deadline_leaves_less() -> None:
    assert cloud_patience(0.5, 2.0, 0.05) == 0.5
    assert cloud_patience(3.0, 2.0, 0.05) == pytest.approx(0.95)
    assert cloud_patience(0.5, 0.08, 0.05) == 0.0
    assert (longest_wait(2.0), longest_wait(0.3)) == (0.5, 0.15)


class _Refusals(Observer):
    count = 0

    def refused(self, reason: str) -> None:
        self.count += 1


def test_a_batch_whose_time_is_over_in_the_queue_is_one_refusal(
    model: TrainedModel, bodies: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, pixels_of = 0.02, edge.pixels_of

    def slowly(task: Any) -> Any:
        time.sleep(slow)
        return pixels_of(task)

    monkeypatch.setattr(edge, "pixels_of", slowly)

    async def run() -> None:
        seen = _Refusals()
        service = EdgeService(Served.of(model, 1), honest(model), Settings(), seen)
        with pytest.raises(OverloadedError, match="was over while it waited"):
            await service.answer(bodies[:80], model.policy.with_request(edge_only=True), 0.3)
        assert (seen.count, service.turned_away) == (1, 1)

    asyncio.run(run())


def test_requests_hear_of_blocks_that_fail_in_place_of_the_cloud(
    model: TrainedModel, bodies: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Pass, rows: object) -> None:
        raise MemoryError("no room for the extension block")

    async def lost(request: CloudRequest) -> CloudAnswer:
        raise ConnectionError("the cloud is away")

    monkeypatch.setattr(Pass, "finish_alone", fail)

    async def run() -> None:
        service = EdgeService(Served.of(model, 1), lost, PATIENT)
        with pytest.raises(MemoryError, match="no room"):
            await asyncio.wait_for(service.answer(bodies[:1], model.policy.with_request(threshold=ALL_TO_CLOUD)), 10)

    asyncio.run(run())


@pytest.mark.parametrize("payload", ["png", "raw", "jpeg80"])
def test_what_is_priced_is_what_would_be_sent(model: TrainedModel, bodies: list[bytes], payload: str) -> None:
    sized: list[Any] = []
    sent: list[int] = []
    served = Served.of(with_payload(model, payload), 1)

    async def cloud(request: CloudRequest) -> CloudAnswer:
        sent.extend(request.sizes)
        return await honest(model)(request)

    async def run() -> None:
        service = EdgeService(served, cloud, PATIENT)
        service.watchers.append(lambda batch: sized.append(upload_sizes(batch)))
        await service.answer(bodies[:20], model.policy.with_request(threshold=ALL_TO_CLOUD))

    asyncio.run(run())
    if payload.startswith("jpeg"):
        assert np.concatenate(sized).mean() == pytest.approx(np.mean(sent), rel=0.2)
    else:
        assert np.concatenate(sized).tolist() == sent


def test_a_change_that_needs_what_is_away_may_be_asked_for_again() -> None:
    for outcome, status in (
        (Outcome(False, "the MLflow store does not answer any more", away=True), 503),
        (Outcome(False, "no version 9", nonsense=True), 422),
        (Outcome(False, "version 3 is refused: it cannot be read"), 409),
    ):
        with pytest.raises(HTTPException) as refused:
            _after((outcome, {}), Response())
        assert (refused.value.status_code, refused.value.detail) == (status, outcome.refused)
        assert ("Retry-After" in (refused.value.headers or {})) == (status == 503)
