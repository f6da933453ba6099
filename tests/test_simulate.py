"""The job that simulates a fleet: what it prints and writes, and which mistakes it names."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from untrained import Call

from benchmarks.fleet_compare import Alone, Calibration, Cost
from benchmarks.fleet_load import Answered
from jobs import simulate
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.fleet.workload import workload
from meanet.routing import Exit, Policy
from meanet.storage import write_parquet

TIMES = ("--main-ms", "3", "--extension-ms", "2", "--cloud-image-ms", "8")


@pytest.fixture
def exits(table: ExitsTable, point: Policy, tmp_path: Path) -> str:
    write_parquet(table.table, tmp_path / "exits.parquet")
    (tmp_path / "operating_point.json").write_text(json.dumps(point.to_dict()))
    return str(tmp_path / "exits.parquet")


def test_job_prints_json_and_writes_a_page(exits: str, tmp_path: Path, call: Call) -> None:
    words = ("--devices", "20", "10", "20000", "--hours", "0.1", "--scaling.max-replicas", "2")
    done = call(simulate, exits, *TIMES, *words, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [found["devices"] for found in result["outcomes"]] == [10, 20, 20000]
    assert [found["mode"] for found in result["outcomes"]] == ["exact", "exact", "aggregated"]
    assert 20 <= result["bottleneck"]["devices"] < 20000
    assert result["advice"]["outcome"]["share"]["degraded"] <= 0.01
    page = (tmp_path / "fleet.html").read_text()
    assert "The cloud keeps up with" in page
    assert page.count("<svg") == 1


def test_job_takes_measured_times_and_flags_win(exits: str, tmp_path: Path, call: Call) -> None:
    times = {"edge": {"main_s": 0.02, "extension_s": 0.0}, "cloud": {"image_s": 0.05, "call_s": 0.0}}
    (tmp_path / "times.json").write_text(json.dumps(times))
    words = ("--times", "times.json", "--main-ms", "4", "--devices", "1", "--json")
    result = json.loads(call(simulate, exits, *words).out)
    assert result["fleet"]["edge"]["main_s"] == pytest.approx(0.004)
    assert result["fleet"]["cloud"]["image_s"] == pytest.approx(0.05)
    assert result["outcomes"][0]["latency"]["p50"] == pytest.approx(0.004)
    assert result["bottleneck"] is None


BAD = [
    ((), "has no speed: give --main-ms"),
    (("--main-ms", "3", "--extension-ms", "1"), "give --cloud-image-ms"),
    ((*TIMES, "--main-ms", "-3"), "edge.main_s is -0.003"),
    ((*TIMES, "--devices", "0"), "each 1 or more"),
    ((*TIMES, "--arrivals.rate", "0"), "arrivals.rate is 0"),
    ((*TIMES, "--arrivals.hours", "1", "2"), "arrivals.hours has 2 numbers"),
    ((*TIMES, "--scaling.max-replicas", "0"), "scaling.max_replicas is 0"),
    ((*TIMES, "--limits.reserve-s", "3"), "limits.reserve_s is 3"),
    ((*TIMES, "--limits.cloud-budget-s", "nan"), "cloud_budget_s is nan"),
    ((*TIMES, "--hours", "0"), "horizon_s is 0"),
    ((*TIMES, "--split", "train"), "choose test or validation"),
    ((*TIMES, "--times", "nowhere.json"), "nowhere.json cannot be read"),
    ((*TIMES, "--operating-point", "nowhere.json"), "nowhere.json cannot be read"),
    ((*TIMES, "--link", "string"), "unknown link profile 'string'"),
    ((*TIMES, "--mode", "exact", "--devices", "1000000"), "choose the mode aggregated"),
    ((*TIMES, "--mode", "aggregated", "--scaling.interval-s", "0.5"), "take a longer one"),
]


@pytest.mark.parametrize(("words", "says"), BAD)
def test_bad_input_is_named(words: tuple[str, ...], says: str, exits: str, call: Call) -> None:
    done = call(simulate, exits, *words)
    assert done.code in (1, 2)
    assert says in done.err + done.out


@pytest.mark.parametrize(
    ("content", "says"),
    [("[]", "cannot be read"), ('{"edge": {"speed": 3}, "cloud": {}}', "edge has no speed")],
)
def test_bad_times_are_named(content: str, says: str, exits: str, tmp_path: Path, call: Call) -> None:
    (tmp_path / "times.json").write_text(content)
    done = call(simulate, exits, "--times", "times.json")
    assert done.code == 1
    assert says in done.err


def test_point_of_another_model_is_refused(exits: str, tmp_path: Path, call: Call) -> None:
    other = {**json.loads((tmp_path / "operating_point.json").read_text()), "hard_classes": [0]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = call(simulate, exits, *TIMES, "--operating-point", "other.json")
    assert done.code == 1
    assert "is of another model" in done.err


def test_what_one_client_saw_is_what_is_predicted_of_one(table: ExitsTable, point: Policy) -> None:
    """`benchmarks.fleet compare`: log-normal waits about 4 ms, and a cloud that takes 9."""
    work = workload(table.exits("test"), table.costs, point)
    rng = np.random.default_rng(0)
    cost = Cost(0.002, idle=0.2)
    core = 0.002 / (os.cpu_count() or 1) / 0.8
    kinds = [Exit(kind).label for kind in work.kinds[rng.integers(0, len(work.gone), 4000)]]
    answers = [
        Answered(
            seconds=core + 0.004 * float(np.exp(0.4 * rng.standard_normal())) + {"cloud": 0.009}.get(kind, 0.0),
            edge_s={"main": 0.001, "extension": 0.0013, "cloud": 0.001}[kind],
            cloud_s=0.009 if kind == "cloud" else 0.0,
            exit=kind,
            degraded=False,
        )
        for kind in kinds
    ]
    in_a_row = [dataclasses.replace(answer, seconds=answer.seconds - 0.002) for answer in answers]
    loud = Alone([dataclasses.replace(answer, seconds=1.0) for answer in answers], 0.5, cost, 0.7, answers)
    found = Calibration.of([loud, Alone(answers, 0.1, cost, 0.001, in_a_row)], rate=5.0)
    assert found.edge["front_s"] == pytest.approx(0.004, rel=0.05)
    assert found.edge["front_spread"] == pytest.approx(0.4, abs=0.05)
    assert found.edge["extension_s"] == pytest.approx(0.0003)
    assert found.cloud == {"image_s": pytest.approx(0.001), "network_s": pytest.approx(0.008)}
    predicted = found.predict(work, 1)
    assert predicted.latency["p50"] == pytest.approx(np.median([answer.seconds for answer in answers]), rel=0.05)
    assert predicted.share["cloud"] == pytest.approx(kinds.count("cloud") / len(kinds), abs=0.02)
    assert found.awake["front_s"] == pytest.approx(0.002, rel=0.05)
    assert found.front_s(1) == found.edge["front_s"]
    assert found.front_s(10_000_000) == found.awake["front_s"], "never faster than one client that sends all the time"
    assert found.awake["front_s"] < found.front_s(8) < found.front_s(4) < found.edge["front_s"]
    with pytest.raises(UserError, match="no answer of 1 came from the exit 'extension'"):
        Alone([answer for answer in answers if answer.exit == "main"][:1], 0.1, cost, 0.001, answers).times()
