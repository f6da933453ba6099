"""The edge's service without HTTP and Ray, against clouds that are well, slow, gone or lying."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
from conftest import PATIENT

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.preprocessing import encode_png
from meanet.routing import Exit, Policy
from meanet.runtime import Cascade, CloudRuntime
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.edge import EdgeService, OverloadedError
from serve_apps.http import Answer
from serve_apps.micro_batch import Pass
from serve_apps.served import Served
from serve_apps.settings import Settings

ALL_TO_CLOUD = -1.0


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test[:100]]]


def honest(model: TrainedModel) -> Callable[[CloudRequest], Awaitable[CloudAnswer]]:
    runtime = CloudRuntime(model)

    async def ask(request: CloudRequest) -> CloudAnswer:
        reading = runtime.run(request.pixels(model.preprocessing))
        return CloudAnswer(reading.pred.tolist(), reading.confidence.tolist())

    return ask


def answers(
    model: TrainedModel,
    ask: Callable[[CloudRequest], Awaitable[CloudAnswer]],
    bodies: Sequence[bytes],
    policy: Policy,
    settings: Settings = PATIENT,
) -> list[Answer]:
    async def run() -> list[Answer]:
        return await EdgeService(Served.of(model, 3), ask, settings).answer(bodies, policy)

    return asyncio.run(run())


def test_answers_equal_the_cascade_in_one_process(model: TrainedModel, splits: Splits, bodies: list[bytes]) -> None:
    expected = Cascade(model).classify(splits.table.images[splits.test[:100]])
    got = answers(model, honest(model), bodies, model.policy)
    assert [answer.class_id for answer in got] == expected.pred.tolist()
    assert [answer.exit for answer in got] == [Exit(value).label for value in expected.exit]
    assert {answer.exit for answer in got} == {"main", "extension", "cloud"}
    assert not any(answer.degraded for answer in got)
    assert {answer.model_version for answer in got} == {3}
    np.testing.assert_allclose([answer.confidence for answer in got], expected.confidence, rtol=1e-5)


def test_joules_are_those_of_the_blocks_that_ran(model: TrainedModel, bodies: list[bytes]) -> None:
    costs = model.costs
    for answer, body in zip(answers(model, honest(model), bodies, model.policy), bodies, strict=True):
        extended = costs.main_joules + costs.extension_joules
        assert answer.joules.edge_compute == pytest.approx(
            extended if answer.exit == "extension" else costs.main_joules
        )
        sent = costs.link.joules_per_byte * len(body) if answer.exit == "cloud" else 0.0
        assert answer.joules.upload == pytest.approx(sent)


@pytest.mark.parametrize("quality", [20, 80])
def test_a_payload_of_jpeg_goes_up_recompressed_and_is_priced(
    model: TrainedModel, bodies: list[bytes], quality: int
) -> None:
    ask, asked = honest(model), list[CloudRequest]()

    async def noted(request: CloudRequest) -> CloudAnswer:
        asked.append(request)
        return await ask(request)

    energy = dataclasses.asdict(dataclasses.replace(model.energy, payload=f"jpeg{quality}"))
    recompressing = model.with_operating_point({**(model.operating_point or {}), "energy": energy})
    got = answers(recompressing, noted, bodies[:20], model.policy.with_request(threshold=ALL_TO_CLOUD))
    sizes = [size for request in asked for size in request.sizes]
    sent = [body for request in asked for body in request.bodies or ()]
    assert [answer.exit for answer in got] == ["cloud"] * 20
    assert {body[:3] for body in sent} == {b"\xff\xd8\xff"}
    assert sizes == [len(body) for body in sent]
    prices = [recompressing.costs.link.joules_per_byte * size for size in sizes]
    assert [answer.joules.upload for answer in got] == pytest.approx(prices)


def test_the_way_to_the_cloud_is_measured_beside_the_models(model: TrainedModel, bodies: list[bytes]) -> None:
    """A call of 120 ms, of which the cloud says that 50 were its own."""

    async def ask(request: CloudRequest) -> CloudAnswer:
        await asyncio.sleep(0.12)
        return CloudAnswer([0] * len(request.sizes), [1.0] * len(request.sizes), "there", 0.05)

    got = answers(model, ask, bodies[:2], model.policy.with_request(threshold=ALL_TO_CLOUD))
    rate = 1e6 * model.costs.link.upload_mbps / 8
    for answer in got:
        assert 69 < answer.ms.upload <= answer.ms.cloud - 50
        assert answer.ms.upload_modelled == pytest.approx(1000 * sum(map(len, bodies[:2])) / rate)
    alone = answers(model, broken, bodies[:2], model.policy.with_request(threshold=ALL_TO_CLOUD))
    assert {(answer.ms.upload, answer.ms.upload_modelled) for answer in alone} == {(0.0, 0.0)}


def test_edge_only_never_calls_the_cloud(model: TrainedModel, bodies: list[bytes]) -> None:
    async def forbidden(request: CloudRequest) -> CloudAnswer:
        raise AssertionError(f"{len(request.sizes)} images left the edge")

    got = answers(model, forbidden, bodies, model.policy.with_request(edge_only=True, threshold=ALL_TO_CLOUD))
    assert {answer.exit for answer in got} == {"main", "extension"}
    assert not any(answer.degraded for answer in got)
    assert all(answer.policy.edge_only for answer in got)


async def slow(request: CloudRequest) -> CloudAnswer:
    await asyncio.sleep(5)
    return CloudAnswer([0] * len(request.sizes), [1.0] * len(request.sizes))


async def broken(request: CloudRequest) -> CloudAnswer:
    raise ConnectionError(f"no cloud for {len(request.sizes)}")


async def short_answer(request: CloudRequest) -> CloudAnswer:
    return CloudAnswer([0], [1.0])


async def nan_answer(request: CloudRequest) -> CloudAnswer:
    return CloudAnswer([0] * len(request.sizes), [float("nan")] * len(request.sizes))


async def unknown_class(request: CloudRequest) -> CloudAnswer:
    return CloudAnswer([10] * len(request.sizes), [1.0] * len(request.sizes))


@pytest.mark.parametrize(
    ("cloud", "reason"),
    [
        (slow, "timed out"),
        (broken, "ConnectionError"),
        (short_answer, "ValueError"),
        (nan_answer, "ValueError"),
        (unknown_class, "ValueError"),
    ],
)
def test_the_edges_best_answer_stands_when_the_cloud_fails(
    model: TrainedModel,
    bodies: list[bytes],
    cloud: Callable[[CloudRequest], Awaitable[CloudAnswer]],
    reason: str,
) -> None:
    edge = answers(model, honest(model), bodies, model.policy.with_request(edge_only=True))
    hasty = dataclasses.replace(PATIENT, cloud_budget_s=0.5)
    got = answers(model, cloud, bodies, model.policy.with_request(threshold=ALL_TO_CLOUD), hasty)
    assert [(a.class_id, a.exit) for a in got] == [(a.class_id, a.exit) for a in edge]
    assert all(answer.degraded and answer.reason and reason in answer.reason for answer in got)


async def late(model: TrainedModel, seconds: float, request: CloudRequest) -> CloudAnswer:
    await asyncio.sleep(seconds)
    return await honest(model)(request)


def test_each_request_keeps_its_own_deadline(model: TrainedModel, bodies: list[bytes]) -> None:
    """Two requests in one micro-batch: the hasty one gets the edge's answer, the patient one the cloud's."""
    policy = model.policy.with_request(threshold=ALL_TO_CLOUD)

    async def run() -> tuple[list[Answer], list[Answer], float]:
        service = EdgeService(Served.of(model, 1), lambda request: late(model, 2.0, request), PATIENT)
        await service.answer(bodies[:1], policy.with_request(edge_only=True))
        started = time.monotonic()

        async def hasty() -> tuple[list[Answer], float]:
            return await service.answer(bodies[:4], policy, 0.5), time.monotonic() - started

        (one, seconds), two = await asyncio.gather(hasty(), service.answer(bodies[4:8], policy))
        return one, two, seconds

    one, two, seconds = asyncio.run(run())
    assert all(answer.degraded and answer.reason == "cloud timed out" for answer in one)
    assert seconds < 1.9
    assert all(answer.exit == "cloud" and not answer.degraded for answer in two)


async def until(what: Callable[[], bool]) -> None:
    """A busy machine takes its time."""
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_breaker_opens_lets_nobody_wait_and_closes_by_itself(model: TrainedModel, bodies: list[bytes]) -> None:
    policy = model.policy.with_request(threshold=ALL_TO_CLOUD)
    down, asked = [True], [0]

    async def cloud(request: CloudRequest) -> CloudAnswer:
        asked[0] += 1
        if down[0]:
            await asyncio.sleep(10)
        return await honest(model)(request)

    async def run() -> None:
        settings = dataclasses.replace(PATIENT, cloud_budget_s=0.5, breaker_failures=2, breaker_open_s=2.0)
        service = EdgeService(Served.of(model, 1), cloud, settings)
        for _ in range(2):
            (answer,) = await service.answer(bodies[:1], policy)
            assert answer.reason == "cloud timed out"
        assert service.breaker.state == "open"
        started, before = time.monotonic(), asked[0]
        got = await service.answer(bodies[:50], policy)
        assert {answer.reason for answer in got} == {"cloud circuit open"}
        assert all(answer.joules.upload == 0 for answer in got), "nothing was sent"
        assert time.monotonic() - started < 2.0
        assert asked[0] == before
        await until(lambda: service.breaker.state == "half_open")
        got = await service.answer(bodies[:50], policy)  # carries a probe, which hangs, beside the answers
        assert {answer.reason for answer in got} == {"cloud circuit open"}
        await until(lambda: asked[0] == before + 1)  # it may take a thread
        await until(lambda: service.breaker.state == "open")  # the probe failed
        down[0] = False
        await until(lambda: service.breaker.state == "half_open")
        await service.answer(bodies[:1], policy)
        await until(lambda: service.breaker.state == "closed")
        assert not (await service.answer(bodies[:1], policy))[0].degraded

    asyncio.run(run())


def test_overload_is_refused_at_once_and_what_is_accepted_keeps_its_deadline(
    model: TrainedModel, bodies: list[bytes]
) -> None:
    policy = model.policy.with_request(edge_only=True)

    async def run() -> None:
        service = EdgeService(Served.of(model, 1), honest(model), Settings(deadline_s=10.0, max_queued=40))
        await service.answer(bodies[:1], policy)
        started = time.monotonic()
        results = await asyncio.gather(
            *(service.answer(bodies[:10], policy) for _ in range(40)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, OverloadedError)]
        accepted = [result for result in results if isinstance(result, list)]
        assert len(refused) + len(accepted) == 40
        assert refused
        assert accepted
        assert all(error.retry_after_s > 0 for error in refused)
        assert time.monotonic() - started < service.settings.deadline_s
        assert len(await service.answer(bodies, policy)) == len(bodies), "an idle server takes a batch beyond the limit"
        with pytest.raises(UserError, match="deadline of -1 s"):
            await service.answer(bodies[:1], policy, -1)

    asyncio.run(run())


def test_clients_in_haste_do_not_open_the_breaker(model: TrainedModel, bodies: list[bytes]) -> None:
    policy = model.policy.with_request(threshold=ALL_TO_CLOUD)

    async def run() -> None:
        settings = dataclasses.replace(PATIENT, breaker_failures=2, reserve_s=0.0)
        service = EdgeService(Served.of(model, 1), lambda request: late(model, 1.5, request), settings)
        await service.answer(bodies[:1], policy.with_request(edge_only=True))
        for _ in range(4):
            (answer,) = await service.answer(bodies[:1], policy, 0.5)
            assert answer.reason == "cloud timed out"
        assert service.breaker.state == "closed"
        assert (await service.answer(bodies[:1], policy))[0].exit == "cloud"

    asyncio.run(run())


def test_cancelled_call_is_a_failure_and_a_cancelled_probe_is_over(model: TrainedModel, bodies: list[bytes]) -> None:
    """Ray Serve cancels a request's calls when its client hangs up."""
    policy, cancels, asked = model.policy.with_request(threshold=ALL_TO_CLOUD), [True], [0]

    async def cloud(request: CloudRequest) -> CloudAnswer:
        asked[0] += 1
        if cancels[0]:
            raise asyncio.CancelledError
        return await honest(model)(request)

    async def run() -> None:
        service = EdgeService(
            Served.of(model, 1), cloud, dataclasses.replace(PATIENT, breaker_failures=1, breaker_open_s=1.0)
        )
        (answer,) = await asyncio.wait_for(service.answer(bodies[:1], policy), 10)
        assert answer.reason == "cloud failed: ConnectionError"
        await until(lambda: service.breaker.state == "half_open")
        await service.answer(bodies[:1], policy)  # beside it, a probe that is cancelled
        await until(lambda: asked[0] == 2)
        await until(lambda: service.breaker.state == "open")
        cancels[0] = False
        await until(lambda: service.breaker.state == "half_open")
        await service.answer(bodies[:1], policy)
        await until(lambda: service.breaker.state == "closed")

    asyncio.run(run())


def test_too_many_calls_under_way_are_not_added_to(model: TrainedModel, bodies: list[bytes]) -> None:
    policy = model.policy.with_request(threshold=ALL_TO_CLOUD)

    async def run() -> None:
        under_way, may_answer = asyncio.Event(), asyncio.Event()

        async def cloud(request: CloudRequest) -> CloudAnswer:
            under_way.set()
            await may_answer.wait()
            return await honest(model)(request)

        service = EdgeService(Served.of(model, 1), cloud, dataclasses.replace(PATIENT, max_cloud_calls=1))
        first = asyncio.ensure_future(service.answer(bodies[:1], policy))
        await asyncio.wait_for(under_way.wait(), 10)
        (second,) = await service.answer(bodies[:1], policy)
        assert second.degraded
        assert second.reason == "cloud busy: 1 calls under way"
        may_answer.set()
        assert (await first)[0].exit == "cloud"

    asyncio.run(run())


def test_bad_image_is_named_and_the_service_lives_on(model: TrainedModel, bodies: list[bytes]) -> None:
    async def run() -> list[Answer]:
        service = EdgeService(Served.of(model, 1), honest(model), PATIENT)
        with pytest.raises(UserError, match=r"image 1 of the batch.*no readable PNG or JPEG"):
            await service.answer([bodies[0], b"no image"], model.policy)
        return await service.answer(bodies[:1], model.policy)

    assert len(asyncio.run(run())) == 1


def test_requests_with_different_policies_share_a_batch(model: TrainedModel, bodies: list[bytes]) -> None:
    async def run() -> tuple[list[Answer], list[Answer]]:
        service = EdgeService(Served.of(model, 1), honest(model), PATIENT)
        private = model.policy.with_request(edge_only=True)
        complex_ = model.policy.with_request(threshold=ALL_TO_CLOUD)
        one, two = await asyncio.gather(service.answer(bodies, private), service.answer(bodies, complex_))
        return one, two

    one, two = asyncio.run(run())
    assert all(answer.exit != "cloud" for answer in one)
    assert all(answer.exit == "cloud" for answer in two)


def test_a_hundred_requests_at_once_are_answered_in_their_order_by_one_cloud_call_a_micro_batch(
    model: TrainedModel, splits: Splits, bodies: list[bytes]
) -> None:
    expected = Cascade(model).classify(splits.table.images[splits.test[:100]])
    calls: list[int] = []
    passes: list[Pass] = []

    async def ask(request: CloudRequest) -> CloudAnswer:
        calls.append(len(request.sizes))
        return await honest(model)(request)

    async def run() -> list[list[Answer]]:
        service = EdgeService(Served.of(model, 1), ask, dataclasses.replace(PATIENT, max_cloud_calls=100))
        service.watchers.append(passes.append)
        return await asyncio.gather(*(service.answer([body]) for body in bodies))

    got = asyncio.run(run())
    assert [answer.class_id for (answer,) in got] == expected.pred.tolist()
    assert [answer.exit for (answer,) in got] == [Exit(value).label for value in expected.exit]
    assert sum(len(one.tasks) for one in passes) == 100
    assert calls == [len(one.pending.rows) for one in passes if len(one.pending.rows)]


def test_nothing_is_computed_for_a_request_that_nobody_waits_for(model: TrainedModel, bodies: list[bytes]) -> None:
    passes: list[Pass] = []

    async def run() -> None:
        service = EdgeService(Served.of(model, 1), honest(model), PATIENT)
        service.watchers.append(passes.append)
        first = asyncio.ensure_future(service.answer(bodies * 3))  # keeps the thread busy
        await asyncio.sleep(0)
        gone = [asyncio.ensure_future(service.answer([body])) for body in bodies]
        await asyncio.sleep(0)
        for request in gone:
            request.cancel()
        await first
        await service.answer(bodies[:1])

    asyncio.run(run())
    assert sum(len(one.tasks) for one in passes) == 301
