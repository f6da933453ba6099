"""The edge's service without HTTP and Ray, against clouds that are well, slow, gone or lying."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.preprocessing import encode_png
from meanet.routing import Exit, Policy
from meanet.runtime import Cascade, CloudRuntime, Images
from serve_apps.batching import Batcher
from serve_apps.edge import CloudAnswer, EdgeService
from serve_apps.http import Answer

ALL_TO_CLOUD = -1.0


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test[:100]]]


def honest(model: TrainedModel) -> Callable[[Images], Awaitable[CloudAnswer]]:
    runtime = CloudRuntime(model)

    async def ask(images: Images) -> CloudAnswer:
        reading = runtime.run(images)
        return CloudAnswer(reading.pred.tolist(), reading.confidence.tolist())

    return ask


def answers(
    model: TrainedModel, ask: Callable[[Images], Awaitable[CloudAnswer]], bodies: Sequence[bytes], policy: Policy
) -> list[Answer]:
    async def run() -> list[Answer]:
        return await EdgeService(model, 3, ask, cloud_timeout_s=0.3).answer(bodies, policy)

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


def test_edge_only_never_calls_the_cloud(model: TrainedModel, bodies: list[bytes]) -> None:
    async def forbidden(images: Images) -> CloudAnswer:
        raise AssertionError(f"{len(images)} images left the edge")

    got = answers(model, forbidden, bodies, model.policy.with_request(edge_only=True, threshold=ALL_TO_CLOUD))
    assert {answer.exit for answer in got} == {"main", "extension"}
    assert not any(answer.degraded for answer in got)
    assert all(answer.policy.edge_only for answer in got)


async def slow(images: Images) -> CloudAnswer:
    await asyncio.sleep(5)
    return CloudAnswer([0] * len(images), [1.0] * len(images))


async def broken(images: Images) -> CloudAnswer:
    raise ConnectionError(f"no cloud for {len(images)}")


async def short_answer(images: Images) -> CloudAnswer:
    return CloudAnswer([0], [1.0])


async def nan_answer(images: Images) -> CloudAnswer:
    return CloudAnswer([0] * len(images), [float("nan")] * len(images))


async def unknown_class(images: Images) -> CloudAnswer:
    return CloudAnswer([10] * len(images), [1.0] * len(images))


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
    cloud: Callable[[Images], Awaitable[CloudAnswer]],
    reason: str,
) -> None:
    edge = answers(model, honest(model), bodies, model.policy.with_request(edge_only=True))
    got = answers(model, cloud, bodies, model.policy.with_request(threshold=ALL_TO_CLOUD))
    assert [(a.class_id, a.exit) for a in got] == [(a.class_id, a.exit) for a in edge]
    assert all(answer.degraded and answer.reason and reason in answer.reason for answer in got)


def test_bad_image_is_named_and_the_service_lives_on(model: TrainedModel, bodies: list[bytes]) -> None:
    async def run() -> list[Answer]:
        service = EdgeService(model, 1, honest(model))
        with pytest.raises(UserError, match=r"image 1 of the batch.*no readable PNG or JPEG"):
            await service.answer([bodies[0], b"no image"], model.policy)
        return await service.answer(bodies[:1], model.policy)

    assert len(asyncio.run(run())) == 1


def test_requests_with_different_policies_share_a_batch(model: TrainedModel, bodies: list[bytes]) -> None:
    async def run() -> tuple[list[Answer], list[Answer]]:
        service = EdgeService(model, 1, honest(model))
        private = model.policy.with_request(edge_only=True)
        complex_ = model.policy.with_request(threshold=ALL_TO_CLOUD)
        one, two = await asyncio.gather(service.answer(bodies, private), service.answer(bodies, complex_))
        return one, two

    one, two = asyncio.run(run())
    assert all(answer.exit != "cloud" for answer in one)
    assert all(answer.exit == "cloud" for answer in two)


def test_batcher_goes_at_once_and_gathers_what_arrives_meanwhile() -> None:
    sizes: list[int] = []

    async def run() -> None:
        async def work(items: Sequence[int]) -> None:
            sizes.append(len(items))
            await asyncio.sleep(0.01)

        batcher: Batcher[int] = Batcher(work, max_size=4)
        batcher.put([0])
        await asyncio.sleep(0)
        batcher.put(list(range(9)))
        while sum(sizes) < 10:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert sizes == [1, 4, 4, 1]
