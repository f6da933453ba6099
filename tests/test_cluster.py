"""Ray Train for real: two data-parallel workers, one of which is killed in mid-phase."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ENVIRONMENT

from meanet.loop import PHASES, State

pytestmark = pytest.mark.cluster
EPOCHS = 8


def line_after(process: "subprocess.Popen[str]", pattern: str, seen: list[str]) -> re.Match[str]:
    """Read the job's progress until a line matches."""
    assert process.stderr is not None
    for line in process.stderr:
        seen.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(seen))


class Trained(NamedTuple):
    """What a way of training has left, and said."""

    state: State
    events: list[dict[str, Any]]

    def span(self, phase: str) -> tuple[float, float]:
        """When its first and its last epoch ended, s."""
        times = [event["at"] for event in self.events if event.get("phase") == phase]
        return min(times), max(times)

    @property
    def started(self) -> list[list[str]]:
        """Phases of the groups, in the order in which they started."""
        return [event["phases"] for event in self.events if event["event"] == "start"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    """Side by side, and in a row."""
    folder = tmp_path_factory.mktemp("side-by-side")
    words = [sys.executable, str(Path(__file__).with_name("side_by_side.py")), str(folder)]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("parallel", "row")]
    one, other = (Trained(State(**each["state"]), each["events"]) for each in found)
    return one, other


def test_phases_that_do_not_wait_for_each_other_are_trained_at_the_same_time(trained: tuple[Trained, Trained]) -> None:
    side_by_side, in_a_row = trained
    assert sorted(side_by_side.started) == [["cloud"]] * 2 + [["main", "extension"]] * 2
    assert in_a_row.started == [list(PHASES)] * 2
    main, extension, cloud = (side_by_side.span(phase) for phase in PHASES)
    assert max(cloud[0], main[0]) < min(cloud[1], extension[1]), "they overlap"
    main, extension, cloud = (in_a_row.span(phase) for phase in PHASES)
    assert main[1] < extension[0] <= extension[1] < cloud[0]


def test_the_run_is_the_same_side_by_side_and_in_a_row(trained: tuple[Trained, Trained]) -> None:
    one, other = (each.state for each in trained)
    assert one.weights.keys() == other.weights.keys() == {*PHASES}
    for phase in PHASES:
        for name, tensor in one.weights[phase].items():
            assert torch.allclose(tensor.float(), other.weights[phase][name].float(), atol=1e-4), (phase, name)
    assert one.hard_classes == other.hard_classes
    order = [(phase, epoch + 1) for phase in PHASES for epoch in range(6)]
    for each in trained:
        assert [(row["phase"], row["epoch"]) for row in each.state.history] == order
        seen = [(event["phase"], event["epoch"]) for event in each.events if event["event"] == "epoch"]
        assert sorted(seen) == sorted(order), "what is finished is not trained again"


def test_killed_worker_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    flags = [f"--{phase}.epochs={EPOCHS}" for phase in ("main", "extension", "cloud")]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jobs.train",
            "digits",
            "--workers",
            "2",
            "--output",
            str(tmp_path / "run"),
            "--json",
            *flags,
        ],
        env=ENVIRONMENT | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: list[str] = []
    try:
        worker = int(line_after(process, r"2 worker\(s\) started on 1 node\(s\), pid (\d+), 0 of", seen)[1])
        line_after(process, rf"extension epoch +3/{EPOCHS}", seen)
        os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
        again = rf"resumed from the last checkpoint on 1 node\(s\), pid (\d+), (\d+) of {3 * EPOCHS}"
        resumed = line_after(process, again, seen)
        stdout, rest = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, "".join(seen) + rest
    assert int(resumed[1]) != worker
    done_before = int(resumed[2])
    assert done_before >= EPOCHS + 2, "the finished main phase and the first epochs are not trained again"
    assert re.search(rf"cloud +epoch +{EPOCHS}/{EPOCHS}", rest)
    first_after = re.search(r"(\w+) +epoch +(\d+)/", rest)
    assert first_after is not None
    assert (first_after[1], int(first_after[2])) == ("extension", done_before - EPOCHS + 1)
    assert json.loads(stdout)["hard_classes"]
    assert time.monotonic() - killed < 120
