"""Outages of the cloud under load, in this process and over HTTP: nobody waits long, all is answered and said."""

import asyncio
import time
from pathlib import Path

import pytest

from benchmarks import load, outages
from benchmarks.unreliable import running
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png
from meanet.runtime import CloudRuntime
from meanet.tracking import Tracker
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.edge import EdgeService
from serve_apps.http import Answer
from serve_apps.served import Served
from serve_apps.settings import Settings

BUDGET_S, OPEN_S = 0.5, 0.5
PHASE_S = 2.0
TIMES = ("p99", "beyond the deadline", "answered beyond the deadline")
"""Bounds that a busy machine breaks: the benchmark's alone."""


class Cloud:
    """Honest, until told otherwise."""

    def __init__(self, model: TrainedModel) -> None:
        self._runtime, self._preprocessing, self.fault = CloudRuntime(model), model.preprocessing, "none"

    async def ask(self, request: CloudRequest) -> CloudAnswer:
        if self.fault == "killed":
            raise ConnectionError("the replica died")
        if self.fault == "hung":
            await asyncio.Event().wait()
        if self.fault == "slow":
            await asyncio.sleep(2)
        reading = self._runtime.run(request.pixels(self._preprocessing))
        confidences = reading.confidence.tolist()
        return CloudAnswer(reading.pred.tolist(), [float("nan") if self.fault == "nan" else one for one in confidences])


@pytest.mark.parametrize("fault", outages.FAULTS)
def test_an_outage_under_load_costs_nobody_an_answer(fault: str, model: TrainedModel, splits: Splits) -> None:
    bodies = [encode_png(image) for image in splits.table.images[splits.test[:40]]]
    settings = Settings(deadline_s=5.0, cloud_budget_s=BUDGET_S, breaker_open_s=OPEN_S, breaker_failures=2)

    async def clients(service: EdgeService, seconds: float) -> list[tuple[int, float, Answer]]:
        stop, got = time.monotonic() + seconds, list[tuple[int, float, Answer]]()

        async def client(first: int) -> None:
            number = first
            while time.monotonic() < stop:
                begun = time.monotonic()
                (answer,) = await service.answer([bodies[number]], model.policy)
                got.append((number, time.monotonic() - begun, answer))
                number = (number + 4) % len(bodies)

        await asyncio.gather(*(client(first) for first in range(4)))
        return got

    async def run() -> None:
        cloud = Cloud(model)
        service = EdgeService(Served.of(model, 1), cloud.ask, settings)
        healthy = await service.answer(bodies, model.policy)
        alone = await service.answer(bodies, model.policy.with_request(edge_only=True))
        assert {answer.exit for answer in healthy} == {"main", "extension", "cloud"}
        cloud.fault = fault
        during = await clients(service, PHASE_S)
        assert len(during) > 4 * 4 * PHASE_S / BUDGET_S, "clients do not wait for the cloud each time"
        waited = [seconds for _, seconds, _ in during if seconds > BUDGET_S]
        assert len(waited) < len(during) / 10
        for number, seconds, answer in during:
            assert seconds < settings.deadline_s
            wanted = healthy[number].exit == "cloud"
            assert answer.degraded is wanted
            right = alone[number] if wanted else healthy[number]
            assert (answer.class_id, answer.exit) == (right.class_id, right.exit)
        cloud.fault = "none"
        await clients(service, OPEN_S + BUDGET_S + 0.5)  # the next requests carry the probe
        assert not any(answer.degraded for _, _, answer in await clients(service, 0.3))

    asyncio.run(run())


@pytest.mark.cluster
@pytest.mark.served
def test_outages_and_overload_over_http(model: TrainedModel, tmp_path: Path) -> None:
    """Each fault for some seconds, as the benchmark has them for a minute; its bounds on time are the benchmark's."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Tracker(uri)
    tracker.promote(tracker.register(model, tracker.start_run("r", {}, {})))

    async def measure() -> None:
        questions = await outages.ask_healthy(server.url, 60)
        for fault in outages.FAULTS:
            found = await outages.outage(server, fault, questions, 2)
            broken = [bound for bound in found.bounds() if not bound.kept and not bound.name.startswith(TIMES)]
            assert broken == [], fault
            assert found.degraded > 0
        over = await outages.overload(server, questions, 3, 16)
        broken = [bound for bound in over.bounds() if not bound.kept and not bound.name.startswith(TIMES)]
        assert broken == []
        assert over.with_status(200)
        assert over.with_status(503), load.count_by(over.samples, lambda sample: sample.reply.status)

    with running(tmp_path, uri) as server:
        asyncio.run(measure())
