"""What a served edge lets be seen: metrics, status, the front, reasons, log lines, traces."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from watched_app import WatchedApp, served

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.evaluation import ExitsTable
from meanet.preprocessing import encode_png
from meanet.replay import replay
from meanet.routing import Exit, Policy
from meanet.runtime import Cascade
from serve_apps import events, traces
from serve_apps.board import Board, Report, View
from serve_apps.explain import explain
from serve_apps.served import Served
from serve_apps.traces import Tracing
from serve_apps.watched import request_id_of


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test[:120]]]


@pytest.fixture
def app(model: TrainedModel) -> WatchedApp:
    return WatchedApp(model)


@pytest.fixture
def client(app: WatchedApp) -> Iterator[httpx.Client]:
    with served(app.app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def lines(app: WatchedApp) -> list[dict[str, Any]]:
    return [json.loads(line) for line in app.log.getvalue().splitlines()]


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[" ".join((sample.name, *sample.labels.values()))] = sample.value
    return found


def test_metrics_and_status_are_those_of_the_answers(client: httpx.Client, bodies: list[bytes]) -> None:
    answers = [client.post("/v1/classify", content=body).json() for body in bodies]
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found, status = samples(response.text), client.get("/v1/status").json()
    for exit_ in ("main", "extension", "cloud"):
        number = sum(answer["exit"] == exit_ for answer in answers)
        assert number
        assert found[f"meanet_answers_total {exit_}"] == number
        assert status["since_start"]["share"][exit_] == pytest.approx(number / len(bodies))
    joules = {part: sum(answer["joules"][part] for answer in answers) for part in ("edge_compute", "upload")}
    assert {part: found[f"meanet_joules_total {part}"] for part in joules} == pytest.approx(joules)
    sent = sum(len(b) for b, answer in zip(bodies, answers, strict=True) if answer["exit"] == "cloud")
    assert found["meanet_upload_bytes_total"] == sent
    assert found["meanet_entropy_nats_sum"] == pytest.approx(sum(answer["entropy"] for answer in answers))
    assert found["meanet_latency_seconds_count total"] == len(bodies)
    assert status["scope"] == "all replicas"
    assert status["breaker"] == {"closed": 1, "half_open": 0, "open": 0}
    assert status["served"][0]["version"] == 3
    assert status["served"][0]["policy"]["id"] == answers[0]["policy"]["id"]
    assert (
        0 < status["since_start"]["latency_ms"]["total"]["p50"] <= status["since_start"]["latency_ms"]["total"]["p99"]
    )


def test_a_lost_cloud_is_seen(client: httpx.Client, app: WatchedApp, bodies: list[bytes]) -> None:
    app.cloud.well = False
    answers = [client.post("/v1/classify?threshold=-1", content=body).json() for body in bodies[:20]]
    assert all(answer["degraded"] for answer in answers)
    found, status = samples(client.get("/metrics").text), client.get("/v1/status").json()
    assert found["meanet_degraded_total failed"] == found["meanet_cloud_calls_total failed"] == 3
    assert found["meanet_degraded_total circuit open"] == 17
    assert found["meanet_breaker_state open"] == 1
    assert status["breaker"]["open"] == 1
    assert status["since_start"]["degraded"] == {"failed": 3, "circuit open": 17}
    said = [line for line in lines(app) if line["event"] == "degraded"]
    assert 1 <= len(said) <= 20
    assert said[0]["reason"] == "cloud failed: ConnectionError"
    assert said[0]["request_id"]


def test_request_ids_are_handed_back_made_or_replaced(client: httpx.Client) -> None:
    given = client.get("/v1/front", headers={"X-Request-Id": "order-17/a"}).headers["x-request-id"]
    made = client.get("/v1/front").headers["x-request-id"]
    unfit = client.get("/v1/front", headers={"X-Request-Id": 'x" {"event": "forged"}'}).headers["x-request-id"]
    assert given == "order-17/a"
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert re.fullmatch("[0-9a-f]{32}", unfit)
    assert made != unfit
    assert request_id_of([(b"x-request-id", b"a" * 129)])[1] is False


def test_refusals_and_failures_leave_a_line_with_the_requests_id(client: httpx.Client, app: WatchedApp) -> None:
    assert client.post("/v1/classify", content=b"no image", headers={"X-Request-Id": "one"}).status_code == 422
    assert client.get("/broken", headers={"X-Request-Id": "two"}).status_code == 500
    refused, failed = lines(app)[:2]
    expected = {"level": "warning", "event": "refused", "request_id": "one", "replica": "replica-1", "status": 422}
    assert refused.items() >= expected.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", refused["time"])
    assert (failed["event"], failed["request_id"], failed["error"]) == ("failed", "two", "RuntimeError: a bug")


def test_floods_of_lines_are_thinned_and_counted() -> None:
    log, now = io.StringIO(), [0.0]
    events.set_up("r", log)
    writer = events.Events(clock=lambda: now[0])
    for _ in range(1000):
        writer.limited(logging.WARNING, "refused", status=503)
    now[0] = 1.5
    writer.limited(logging.WARNING, "refused", status=503)
    first, second = map(json.loads, log.getvalue().splitlines())
    assert "left_out" not in first
    assert second["left_out"] == 999


def test_access_lines_are_written_where_they_are_asked_for(model: TrainedModel, bodies: list[bytes]) -> None:
    for access in (False, True):
        app = WatchedApp(model, access=access)
        with served(app.app) as url:
            httpx.post(f"{url}/v1/classify", content=bodies[0]).raise_for_status()
        found = [line for line in lines(app) if line["event"] == "access"]
        assert len(found) == access
    assert found[0].items() >= {"method": "POST", "path": "/v1/classify", "status": 200}.items()


def test_a_change_of_policy_leaves_a_line(client: httpx.Client, app: WatchedApp, model: TrainedModel) -> None:
    app.service.serve(Served.of(model, 4).with_policy(Policy(thresholds=(0.25,), hard_classes=model.hard_classes)))
    for _ in range(100):
        if changes := [line for line in lines(app) if line["event"] == "policy changed"]:
            break
        client.get("/v1/status")
        asyncio.run(asyncio.sleep(0.05))
    assert changes[0]["before"]["version"] == 3
    assert changes[0]["now"]["version"] == 4
    assert changes[0]["now"]["thresholds"] == [0.25]
    assert client.get("/v1/status").json()["served"][0]["policy"]["thresholds"] == [0.25]
    assert client.get("/v1/front").json()["along"] == [], "they are another gate's"


def test_a_threshold_that_a_budget_moves_is_no_flood_of_names(client: httpx.Client, app: WatchedApp) -> None:
    app.moving = True
    served, seen = app.service.served, set()
    for step in range(8):
        app.service.serve(served.with_policy(served.policy.with_request(threshold=0.1 + step / 100)))
        text = client.get("/metrics").text
        seen |= {name for name in samples(text) if "threshold" in name or "info" in name}
        asyncio.run(asyncio.sleep(0.1))
    assert len(seen) == 2
    assert samples(text)[f"meanet_threshold {served.policy.gate} 0 3"] == pytest.approx(0.17)
    assert not [line for line in lines(app) if line["event"] == "policy changed"]


class Lost:
    """A board that hangs."""

    async def report(self, report: Report) -> None:
        await asyncio.sleep(60)

    async def view(self, report: Report) -> View:
        raise ConnectionError(report.replica)


def test_without_the_board_a_replica_speaks_for_itself_and_says_so(model: TrainedModel, bodies: list[bytes]) -> None:
    app = WatchedApp(model, link=Lost())
    with served(app.app) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/classify", content=bodies[0]).raise_for_status()
        assert client.get("/metrics").status_code == 503, "one replica's counts would look like a reset"
        status = client.get("/v1/status").json()
    assert status["scope"] == "this replica"
    assert status["since_start"]["images"] == 1
    assert any(line["event"] == "board lost" for line in lines(app))


class Shared:
    """A board with another replica on it."""

    def __init__(self, other: Report) -> None:
        self._board = Board()
        self._board.report(other)

    async def report(self, report: Report) -> None:
        self._board.report(report)

    async def view(self, report: Report) -> View:
        self._board.report(report)
        return self._board.view()


def test_one_replica_answers_for_all(model: TrainedModel, bodies: list[bytes]) -> None:
    other = WatchedApp(model)
    other.tally.counts.answers["main"] = 1000
    with served(other.app) as url:
        httpx.get(url).raise_for_status()
        report = other.sight.report()
    app = WatchedApp(model, link=Shared(Report("other", report.counts, report.state)))
    with served(app.app) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/classify?edge_only=true", content=bodies[0]).raise_for_status()
        assert sum(v for k, v in samples(client.get("/metrics").text).items() if "answers_total" in k) == 1001
        assert client.get("/v1/status").json()["replicas"] == 2


def test_the_front_holds_the_point_in_force_and_figures_that_replay(
    client: httpx.Client, model: TrainedModel, table: ExitsTable
) -> None:
    front = client.get("/v1/front").json()
    assert model.operating_point is not None
    assert front["policy"]["id"] == model.operating_point["id"]
    assert 2 <= len(front["along"]) <= 37
    assert 2 <= len(front["front"]) <= 24
    shares = [point["cloud_share"] for point in front["along"]]
    assert shares == sorted(shares)
    assert model.operating_point["thresholds"] in [point["thresholds"] for point in front["along"]]
    for point in front["along"][::6]:
        policy = Policy.from_dict(model.operating_point | {"thresholds": point["thresholds"]})
        outcome = replay(table.exits("validation"), table.costs, policy)
        assert (point["accuracy"], point["cloud_share"]) == pytest.approx((outcome.accuracy, outcome.share["cloud"]))
        assert point["joules"] == pytest.approx(outcome.total_joules)


@pytest.mark.parametrize("gate", ["main_entropy", "accepted_entropy", "margin", "max_softmax", "two_gate", "per_class"])
def test_reasons_are_those_of_the_rule(model: TrainedModel, splits: Splits, gate: Any) -> None:
    thresholds = {"two_gate": (0.3, 0.2), "per_class": (0.3,) * 10}.get(gate, (0.3,))
    policy = Policy(gate=gate, thresholds=thresholds, hard_classes=model.hard_classes)
    images, ours = splits.table.images[splits.test[:80]], Served.of(model, 1)
    wanted = Cascade(model).classify(images, policy)
    seen = set()
    for image, exit_ in zip(images, wanted.exit, strict=True):
        why = explain(ours, image, policy)
        assert why.exit == Exit(exit_).label
        assert why.hard == (model.class_names.index(why.main_class) in model.hard_classes)
        if why.complexity is not None and why.threshold is not None:
            assert (why.complexity > why.threshold) == (why.exit == "cloud")
        words = " ".join(why.steps)
        assert ("above the threshold" in words) == (why.exit == "cloud")
        assert ("the extension block ran" in words) == (why.exit == "extension")
        assert ("easy class" in words) == (why.exit == "main")
        seen.add(why.exit)
    assert seen == {"main", "extension", "cloud"}
    alone = explain(ours, images[0], policy.with_request(edge_only=True))
    assert "Nothing of this request may leave the edge." in alone.steps


def test_explain_answers_and_says_why(client: httpx.Client, bodies: list[bytes]) -> None:
    everything = client.post("/v1/explain?threshold=-1", content=bodies[0]).json()
    assert everything["answer"]["exit"] == everything["why"]["exit"] == "cloud"
    assert everything["why"]["threshold"] == -1.0
    assert client.post("/v1/explain", content=b"no image").status_code == 422


def test_traces_hold_the_requests_way_below_the_clients_own(model: TrainedModel, bodies: list[bytes]) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "edge", at_once=True)
    app = WatchedApp(model, tracing=tracing, access=True)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "seven"}
    with served(app.app) as url:
        httpx.post(f"{url}/v1/classify?threshold=-1", content=bodies[0], headers=headers).raise_for_status()
        httpx.post(f"{url}/v1/classify?edge_only=true", content=bodies[0]).raise_for_status()
    spans = exporter.get_finished_spans()
    mine = {span.name: span for span in spans if f"{span.context.trace_id:032x}" == trace}
    assert set(mine) == {"POST /v1/classify", "edge pass", "cloud call"}
    request = mine["POST /v1/classify"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == parent
    assert request.attributes is not None
    assert request.attributes["meanet.request_id"] == "seven"
    assert request.attributes["http.response.status_code"] == 200
    assert app.cloud.traceparents == [f"00-{trace}-{request.context.span_id:016x}-01"]
    for name in ("edge pass", "cloud call"):
        span = mine[name]
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
    assert [span.name for span in spans if span not in mine.values()] == ["edge pass", "POST /v1/classify"]
    assert next(line for line in lines(app) if line["event"] == "access")["trace_id"] == trace
    tracing.close()


def test_the_clouds_pass_is_below_the_request_that_sent_it() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "cloud", at_once=True)
    with tracing.cloud_pass("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), traces.cloud_pass(None):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    tracing.close()


def test_traces_are_off_unless_asked_for_and_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    logger = events.set_up("r", log)
    assert traces.tracing_of({}, "edge", logger) is None
    assert log.getvalue() == ""

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(traces.importlib, "import_module", missing)
    assert traces.tracing_of({traces.ENDPOINT: "http://127.0.0.1:4318"}, "edge", logger) is None
    line = json.loads(log.getvalue())
    assert line["event"] == "no traces: the OTLP exporter is not installed"
    assert line["remedy"] == "pip install opentelemetry-exporter-otlp-proto-http"
