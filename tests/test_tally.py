"""What a replica counts, what the board makes of many, and what Prometheus reads of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from serve_apps.board import Board, ReplicaState, Report
from serve_apps.exposition import exposition
from serve_apps.http import Answer, AppliedPolicy, ExitName, Joules, Milliseconds, ServedBy
from serve_apps.status import status
from serve_apps.tally import Counts, Histogram, Tally, kind_of

NAMED = {
    "meanet_answers",
    "meanet_entropy_nats",
    "meanet_degraded",
    "meanet_joules",
    "meanet_upload_bytes",
    "meanet_latency_seconds",
    "meanet_breaker_state",
    "meanet_refused",
    "meanet_model_info",
    "meanet_threshold",
    "meanet_cloud_calls",
    "meanet_upload_seconds",
}


def answer(exit_: ExitName = "main", *, entropy: float | None = 0.2, cloud_ms: float = 0.0, why: str = "") -> Answer:
    return Answer(
        class_id=7,
        class_name="7",
        exit=exit_,
        confidence=0.9,
        entropy=entropy,
        degraded=bool(why),
        reason=why or None,
        joules=Joules(edge_compute=2e-7, upload=1e-3 if cloud_ms else 0.0, source="modelled:x"),
        ms=Milliseconds(edge=2.0, cloud=cloud_ms, upload=0.0, upload_modelled=0.0),
        model_version=3,
        policy=AppliedPolicy(id="abc", gate="margin", thresholds=[0.1], edge_only=False),
        served_by=ServedBy(edge="here", cloud=None),
    )


def busy() -> Tally:
    """Three images at main, one at the cloud, one that the cloud failed; a call each, and a refusal."""
    tally = Tally()
    for _ in range(3):
        tally.answered(answer(), 0, 0.004)
    tally.answered(answer("cloud", entropy=None, cloud_ms=30.0), 100, 0.035)
    tally.answered(answer("extension", entropy=1.5, cloud_ms=500.0, why="cloud failed: ValueError"), 120, 0.6)
    tally.cloud_call(1, 100, 0.03, "ok")
    tally.cloud_call(1, 120, 0.5, "failed")
    tally.uploaded(0.025, 0.02)
    tally.uploaded(0.015, 0.01)
    tally.refused("overloaded")
    tally.passed(5, 0.002)
    return tally


def state(breaker: str = "closed", threshold: float | None = 0.1, **gauges: float) -> ReplicaState:
    return ReplicaState(breaker, 3, {"id": "abc", "gate": "margin", "thresholds": [threshold]}, gauges)


def test_a_tally_counts_what_was_answered() -> None:
    counts = busy().so_far()
    assert counts.answers == {"main": 3, "extension": 1, "cloud": 1}
    assert {kind: n for kind, n in counts.degraded.items() if n} == {"failed": 1}
    assert counts.joules == pytest.approx({"edge_compute": 1e-6, "upload": 2e-3})
    assert counts.upload_bytes == 220
    assert counts.upload_seconds == pytest.approx({"measured": 0.04, "modelled": 0.03})
    assert counts.refused == {"overloaded": 1}
    assert counts.cloud_calls == {"ok": 1, "timed out": 0, "failed": 1}
    assert (counts.whole.count, counts.edge.count, counts.cloud.count) == (5, 5, 2)
    assert counts.whole.total == pytest.approx(3 * 0.004 + 0.035 + 0.6)
    assert counts.entropy.count == 5
    assert counts.entropy.counts[-1] == 1, "logits that are not finite are of infinite entropy"
    assert counts.entropy.total == pytest.approx(3 * 0.2 + 1.5)


def test_what_was_counted_so_far_stays_as_it_is() -> None:
    tally = busy()
    before = tally.so_far()
    tally.answered(answer(), 0, 0.001)
    assert before.images == 5
    assert tally.so_far().plus(before, -1).answers == {"main": 1, "extension": 0, "cloud": 0}


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("cloud circuit open", "circuit open"),
        ("cloud busy: 8 calls under way", "busy"),
        ("cloud failed: ValueError", "failed"),
        ("cloud timed out", "timed out"),
        ("no time for the cloud", "no time"),
        ("something new", "other"),
    ],
)
def test_kinds_of_reasons_are_few(reason: str, kind: str) -> None:
    assert kind_of(reason) == kind


def test_quantiles_lie_in_their_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0), [0, 10, 10, 0], 50.0)
    assert histogram.quantile(0.5) == pytest.approx(2.0)
    assert histogram.quantile(0.25) == pytest.approx(1.5)
    assert histogram.quantile(0.99) == pytest.approx(3.96)
    assert Histogram((1.0,), [0, 3]).quantile(0.5) == 1.0, "no more is known than that it is above"
    assert Histogram((1.0,)).quantile(0.5) is None


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_board_adds_up_and_never_goes_back() -> None:
    clock = Clock()
    board, one, two = Board(clock), busy(), busy()
    board.report(Report("one", one.so_far(), state()))
    board.report(Report("two", two.so_far(), state("open")))
    assert board.view().totals.images == 10
    assert {name: seen.breaker for name, seen in board.view().states.items()} == {"one": "closed", "two": "open"}
    clock.now += 10
    two.answered(answer(), 0, 0.001)
    two.passed(1, 0.001)
    board.report(Report("two", two.so_far(), state()))
    assert set(board.view().states) == {"two"}, "one has been silent"
    assert board.view().totals.images == 11, "and what it has counted stays"
    clock.now += 3600
    board.report(Report("two", two.so_far(), state()))
    board.report(Report("three", busy().so_far(), state()))
    assert board.view().totals.images == 16
    board.report(Report("two", busy().so_far(), state()))  # overtaken on its way by a later one
    assert board.view().totals.images == 16


def test_the_last_minute_is_of_what_came_within_it() -> None:
    clock = Clock()
    board, tally = Board(clock), busy()
    board.report(Report("one", tally.so_far(), state()))  # of before: the board may be newer than the replica
    for _ in range(200):
        clock.now += 0.5
        tally.answered(answer("extension"), 0, 0.003)
        tally.passed(1, 0.002)
        board.report(Report("one", tally.so_far(), state()))
    view = board.view()
    assert view.totals.images == 205
    assert view.window.answers["main"] == 0
    assert 118 <= view.window.images <= 124
    seconds = sum(step.seconds for step in view.steps)
    assert view.window.images / seconds == pytest.approx(2.0, rel=0.05)
    shown = status(view, "all replicas")
    assert shown["window"]["share"] == {"main": 0.0, "extension": 1.0, "cloud": 0.0}
    assert 2.0 <= shown["window"]["latency_ms"]["total"]["p50"] <= 3.0
    assert shown["since_start"]["images"] == 205
    assert json.loads(json.dumps(shown)) == shown
    clock.now += 120  # nobody reports
    assert board.view().states == {}
    assert status(board.view(), "all replicas")["window"]["images"] == 0


def exposed(*states: ReplicaState, accept: str = "") -> str:
    board = Board()
    for number, one in enumerate(states):
        board.report(Report(str(number), busy().so_far(), one))
    return exposition(board.view(), accept)[0].decode()


def test_prometheus_reads_every_metric_that_is_named() -> None:
    text = exposed(state(audits=20, audit_drifted=0), state("open", None, audits=30, audit_drifted=1))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) >= NAMED
    samples: dict[tuple[str, tuple[str, ...]], float] = {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["meanet_answers_total", ("main",)] == 6
    assert samples["meanet_degraded_total", ("failed",)] == 2
    assert samples["meanet_joules_total", ("upload",)] == pytest.approx(4e-3)
    assert samples["meanet_upload_bytes_total", ()] == 440
    assert samples["meanet_breaker_state", ("open",)] == 1
    assert samples["meanet_breaker_state", ("half_open",)] == 0
    assert samples["meanet_model_info", ("margin", "abc", "3")] == 2
    assert samples["meanet_audits", ()] == 50
    assert samples["meanet_audit_drifted", ()] == 1, "replicas that see a drift"
    assert samples["meanet_entropy_nats_bucket", ("+Inf",)] == samples["meanet_entropy_nats_count", ()] == 10
    assert samples["meanet_latency_seconds_bucket", ("0.004", "total")] == 6, "bounds are inclusive"
    assert samples["meanet_latency_seconds_count", ("cloud",)] == 4
    assert families["meanet_entropy_nats"].type == "histogram"


def test_openmetrics_is_spoken_where_it_is_asked_for() -> None:
    text = exposed(state(), accept="application/openmetrics-text; version=1.0.0")
    assert {family.name for family in read_openmetrics(text)} >= NAMED


def test_a_threshold_a_class_is_not_a_series_a_class() -> None:
    policy = {"id": "abc", "gate": "per_class", "thresholds": [0.1] * 1000}
    assert "meanet_threshold{" not in exposed(ReplicaState("closed", 3, policy))
    assert 'meanet_threshold{gate="margin",index="0",version="3"} +Inf' in exposed(state(threshold=None))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine (apt-get install prometheus)")
def test_prometheus_own_tool_has_nothing_against_it() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposed(state()), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def dashboard() -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((ROOT / "serve_apps" / "grafana.json").read_text())
    return plain


def test_the_dashboard_is_what_grafana_imports() -> None:
    board = dashboard()
    assert board["title"] == "MEANet"
    assert board["uid"] == "meanet"
    assert board["schemaVersion"] >= 39
    assert [one["name"] for one in board["templating"]["list"]] == ["source"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) >= 10
    places = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places, f"{panel['title']} lies over another"
        places |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) >= 1


def test_the_dashboard_asks_only_for_metrics_that_are_there_and_for_all_of_them() -> None:
    text = exposed(state())
    there = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked: set[str] = set()
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"meanet_\w+", target["expr"]))
    assert asked <= there
    for name in NAMED:
        assert any(one.startswith(name) for one in asked), name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine (apt-get install prometheus)")
def test_prometheus_understands_the_dashboards_queries(tmp_path: Path) -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"dashboard:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries)
    ]
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout


def test_counts_of_replicas_with_reasons_of_their_own_add_up() -> None:
    mine, theirs = Counts(), Counts()
    theirs.refused["draining"] = 2
    assert mine.plus(theirs).refused == {"overloaded": 0, "draining": 2}
