"""Ray Train for real: two data-parallel workers, one of which is killed in mid-phase."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

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
