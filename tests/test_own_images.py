"""A user's own folder, by flags alone: trained, searched, served, and every answer over HTTP as the table has it."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from conftest import ENVIRONMENT
from pictures import image_folder
from server import MARK, left_running

pytestmark = [pytest.mark.cluster, pytest.mark.served]
CLASSES = ("acorn", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo")


def test_own_folder_of_seven_classes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "trees", 7, 30, 64, name_of=lambda class_id: CLASSES[class_id])
    (folder / "elm" / "broken.png").write_bytes(b"\x89PNG and no more")
    flags = ["--data.source", f"folder:{folder}", "--split.num-hard-classes", "3", "--data.flip"]
    flags += [f"--{phase}.epochs={epochs}" for phase, epochs in (("main", 6), ("extension", 4), ("cloud", 8))]
    flags += [f"--{phase}.batch-size=16" for phase in ("main", "extension", "cloud")]
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-m", "jobs.demo", "digits", "--output", "outputs/trees", "--json", *flags],
        env=ENVIRONMENT | {MARK: mark},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped 1 undecodable: elm/broken.png" in done.stderr
    report = json.loads(done.stdout)
    assert len(report["hard_classes"]) == 3
    assert report["http"]["images"] == report["samples"] == 7 * 8
    assert report["http"]["mismatches"] == 0
    assert report["policies"]["cloud_only"]["accuracy"] > 0.5
    assert left_running(mark) == []
