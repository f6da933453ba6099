"""Budget and audit on a real service and model, without Ray: the threshold moves, drift is found, answers say so."""

import asyncio
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import PATIENT

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.routing import complexity
from meanet.runtime import CloudRuntime, EdgeRuntime, Images
from serve_apps import events
from serve_apps.audit import AuditConfig
from serve_apps.budget import Budget
from serve_apps.cloud_calls import AskCloud, CloudAnswer, CloudRequest
from serve_apps.edge import EdgeService
from serve_apps.http import Answer
from serve_apps.keeping import Keeping, why_no_budget
from serve_apps.served import Served
from serve_apps.settings import Settings


def honest(model: TrainedModel) -> AskCloud:
    runtime = CloudRuntime(model)

    async def ask(request: CloudRequest) -> CloudAnswer:
        reading = runtime.run(request.pixels(model.preprocessing))
        return CloudAnswer(reading.pred.tolist(), reading.confidence.tolist(), "cloud-node")

    return ask


def contrary(model: TrainedModel) -> AskCloud:
    """A cloud that answers the next class: a drift as plain as can be."""
    ask = honest(model)

    async def otherwise(request: CloudRequest) -> CloudAnswer:
        answer = await ask(request)
        return dataclasses.replace(answer, class_ids=[(class_id + 1) % 10 for class_id in answer.class_ids])

    return otherwise


async def lost(request: CloudRequest) -> CloudAnswer:
    raise ConnectionError(f"no cloud for {len(request.sizes)}")


@pytest.fixture(scope="module")
def images(splits: Splits) -> Images:
    return splits.table.images[splits.test]


@pytest.fixture(scope="module")
def by_complexity(model: TrainedModel, images: Images) -> Images:
    """The test images, easiest first."""
    _, pending = EdgeRuntime(model).run(images, model.policy)
    return images[np.argsort(complexity(pending.main, model.policy.measures[0]))]


def drifting(by_complexity: Images, count: int, seed: int) -> Images:
    """(count, H, W, C) from the easier to the harder half of the images, with some noise so that no two are alike."""
    generator = np.random.default_rng(seed)
    half = len(by_complexity) // 2
    first = (np.linspace(0, 1, count) * half).astype(int)
    chosen = by_complexity[first + generator.integers(0, len(by_complexity) - half, count)].astype(int)
    return np.clip(chosen + generator.integers(-3, 4, chosen.shape), 0, 255).astype(np.uint8)


async def ask_all(service: EdgeService, images: Images, batch: int) -> list[Answer]:
    found: list[Answer] = []
    for start in range(0, len(images), batch):
        found += await service.answer_pixels(images[start : start + batch])
    return found


def keep(model: TrainedModel, ask: AskCloud, settings: Settings) -> tuple[EdgeService, Keeping]:
    service = EdgeService(Served.of(model, 1), ask)
    keeping = Keeping(service)
    keeping.apply(Served.of(model, 1), settings)
    return service, keeping


def worst(answers: Sequence[Answer], target: float, length: int = 2000) -> float:
    """How far the share of answers for which the cloud was wanted is from the target, over any stretch."""
    sums = np.concatenate(([0], np.cumsum([answer.exit == "cloud" or answer.degraded for answer in answers])))
    return float(np.abs((sums[length:] - sums[:-length]) / length - target).max())


@pytest.mark.parametrize("batch", [1, 64])
def test_budget_holds_the_share_from_easy_to_hard(model: TrainedModel, by_complexity: Images, batch: int) -> None:
    async def run() -> tuple[list[Answer], dict[str, Any]]:
        settings = dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.15))
        service, keeping = keep(model, honest(model), settings)
        return await ask_all(service, drifting(by_complexity, 4000, 0), batch), keeping.report()["budget"]

    answers, report = asyncio.run(run())
    assert worst(answers, 0.15) <= 0.02
    thresholds = [answer.policy.thresholds[0] for answer in answers]
    assert len(set(thresholds)) > 20, "the answer names the threshold that was really applied"
    assert len({answer.policy.id for answer in answers}) == len(set(thresholds))
    assert report["requests"] == 2000
    assert abs(report["cloud_share"] - 0.15) <= 0.02
    assert report["moves"] > 20


def test_budget_keeps_the_bounds_of_thresholds(model: TrainedModel, by_complexity: Images) -> None:
    async def run() -> tuple[list[Answer], dict[str, Any]]:
        settings = dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.9), lowest_threshold=0.5)
        service, keeping = keep(model, honest(model), settings)
        return await ask_all(service, drifting(by_complexity, 400, 1), 16), keeping.report()["budget"]

    answers, report = asyncio.run(run())
    assert {answer.policy.thresholds[0] for answer in answers} == {0.5}, "0.9 of them would want a lower one"
    assert (report["held"], report["at_a_bound"]) == (False, True)


def test_moves_of_the_budget_and_a_drift_are_lines_of_the_log(model: TrainedModel, by_complexity: Images) -> None:
    written = io.StringIO()
    events.set_up("edge-1", written)

    async def run() -> None:
        settings = dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.15), audit=AuditConfig(share=0.5))
        service, _ = keep(model, contrary(model), settings)
        await ask_all(service, drifting(by_complexity, 1000, 3), 16)

    try:
        asyncio.run(run())
    finally:
        events.set_up("after")
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    budget = next(line for line in lines if line["event"] == "budget")
    assert budget["threshold"] != budget["threshold_before"]
    assert (budget["moves"] >= 1, budget["at_a_bound"], budget["level"]) == (True, False, "info")
    drift = next(line for line in lines if line["event"] == "drift")
    assert drift["disagreed"] / drift["count"] > drift["expected"]


def test_budget_counts_what_was_wanted_where_the_cloud_is_lost(model: TrainedModel, by_complexity: Images) -> None:
    async def run() -> list[Answer]:
        settings = dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.15), breaker_open_s=3000.0)
        return await ask_all(keep(model, lost, settings)[0], drifting(by_complexity, 3000, 1), 16)

    answers = asyncio.run(run())
    assert not any(answer.exit == "cloud" for answer in answers)
    assert worst(answers, 0.15) <= 0.02


def test_requests_that_keep_to_the_edge_are_none_of_the_budgets(model: TrainedModel, images: Images) -> None:
    async def run() -> dict[str, Any]:
        service, keeping = keep(model, honest(model), dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.15)))
        await service.answer_pixels(images[:64], model.policy.with_request(edge_only=True))
        report: dict[str, Any] = keeping.report()["budget"]
        return report

    assert asyncio.run(run())["requests"] == 0


def test_gates_that_have_no_one_threshold_are_refused_with_a_reason(model: TrainedModel) -> None:
    assert why_no_budget(model.policy) is None
    two = dataclasses.replace(model.policy, gate="two_gate", thresholds=(0.1, 0.2), measures=())
    assert "gate two_gate" in str(why_no_budget(two))
    assert "edge_only" in str(why_no_budget(dataclasses.replace(model.policy, edge_only=True)))

    async def run() -> tuple[Served, dict[str, Any]]:
        service, keeping = keep(model, honest(model), dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.15)))
        keeping.apply(Served.of(model, 1).with_policy(two), service.settings)
        return service.served, keeping.report()["budget"]

    served, report = asyncio.run(run())
    assert served.policy == two
    assert report["held"] is False


def audited(model: TrainedModel, ask: AskCloud, images: Images, config: AuditConfig, **own: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        service, keeping = keep(model, ask, dataclasses.replace(PATIENT, audit=config))
        for start in range(0, len(images), 16):
            await service.answer_pixels(images[start : start + 16], model.policy.with_request(**own))
            await asyncio.gather(*keeping._audits)
        report: dict[str, Any] = keeping.report()["audit"]
        return report

    return asyncio.run(run())


def test_audit_finds_a_planted_drift_and_none_where_there_is_none(model: TrainedModel, images: Images) -> None:
    quiet = audited(model, honest(model), images, AuditConfig(share=0.5))
    assert model.operating_point is not None
    assert quiet["expected"] == model.operating_point["expected"]["disagreement"]
    assert quiet["count"] > 50
    assert quiet["drifted"] is False
    drifted = audited(model, contrary(model), images, AuditConfig(share=0.5))
    assert (drifted["drifted"], drifted["disagreed"] / drifted["count"] > 0.9) == (True, True)


def test_images_that_no_longer_look_like_the_training_set_are_a_drift(model: TrainedModel, images: Images) -> None:
    turned = np.rot90(images, axes=(1, 2))
    assert audited(model, honest(model), turned, AuditConfig(share=1.0))["drifted"] is True


def test_private_requests_are_never_audited_nor_any_while_the_circuit_is_open(
    model: TrainedModel, images: Images
) -> None:
    asked = 0

    async def count(request: CloudRequest) -> CloudAnswer:
        nonlocal asked
        asked += 1
        return await lost(request)

    assert audited(model, count, images[:64], AuditConfig(share=1.0), edge_only=True)["count"] == 0
    assert asked == 0

    async def broken() -> int:
        settings = dataclasses.replace(PATIENT, audit=AuditConfig(share=1.0), breaker_open_s=3000.0)
        service, keeping = keep(model, count, settings)
        while service.breaker.allows():
            await service.answer_pixels(images[:16], model.policy.with_request(threshold=-1.0))
        before = asked
        await service.answer_pixels(images[:64])
        await asyncio.gather(*keeping._audits)
        return asked - before

    assert asyncio.run(broken()) == 0


def test_what_was_learnt_is_kept_where_it_still_holds(model: TrainedModel, by_complexity: Images) -> None:
    async def run() -> None:
        settings = dataclasses.replace(PATIENT, budget=Budget(cloud_share=0.15))
        service, keeping = keep(model, honest(model), settings)
        await ask_all(service, drifting(by_complexity, 600, 2), 16)
        moved = service.served.policy.thresholds
        assert moved != model.policy.thresholds
        keeping.apply(Served.of(model, 1), dataclasses.replace(settings, deadline_s=30.0))
        assert service.served.policy.thresholds == moved, "another setting starts nothing anew"
        keeping.apply(Served.of(model, 2), settings)
        assert service.served.policy == model.policy, "another version starts from its own operating point"
        keeping.apply(Served.of(model, 2), PATIENT)
        assert service.served.policy == model.policy

    asyncio.run(run())
