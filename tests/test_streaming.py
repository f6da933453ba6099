"""A set that does not fit: through Ray Data in bounded memory, and a network trained on it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from pictures import image_folder

from meanet.evaluation import ExitsTable

pytestmark = pytest.mark.cluster
STORE = 80 * 2**20


def test_three_times_the_object_store_passes_without_spilling(tmp_path: Path) -> None:
    """Every image once a pass, mixed while training and in order while evaluating, the same for the same seeds."""
    folder = image_folder(tmp_path / "photos", 5, 336, 224, kind="JPEG")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "stream_through.py"), str(folder), "224", str(STORE)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({name: value for name, value in found.items() if name not in ("rows", "parts")})
    assert found["decoded_bytes"] >= 3 * STORE
    assert found["spilled_bytes"] == 0
    assert found["peak_bytes"] < STORE
    assert len(found["rows"]) == len(set(found["rows"])) == found["steps"] * 32
    assert found["steps"] == 5 * 336 // 32
    assert found["evaluated_in_order"]
    assert found["mixed"]
    assert found["repeatable"]
    one, other = (set(part) for part in found["parts"])
    assert len(one) == len(other) == 4 * 32, "each of two workers has its own part, however few the shards"
    assert not one & other
    assert set(found["losses"]) == {"main", "extension", "cloud"}, "a network trains on it"
    assert all(np.isfinite(loss) for loss in found["losses"].values())


def test_imagenet_network_trains_by_streaming(tmp_path: Path) -> None:
    """MobileNetV2 B at 224x224, a few steps a phase, and its exits."""
    folder = image_folder(tmp_path / "photos", 5, 20, 224, kind="JPEG")
    flags = ["--data.source", f"folder:{folder}", "--data.test-source", "None", "--data.feed", "streaming"]
    flags += ["--data.validation-fraction", "0.1", "--data.test-fraction", "0.1"]
    for phase, size in (("main", 8), ("extension", 8), ("cloud", 2)):
        flags += [f"--{phase}.epochs=1", f"--{phase}.max-steps=2", f"--{phase}.batch-size={size}"]
    for job in ("train", "evaluate"):
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{job}", "imagenet_mobilenetv2_b", *(flags if job == "train" else [])],
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    table = ExitsTable.read(tmp_path / "outputs" / "imagenet_mobilenetv2_b" / "exits.parquet")
    assert table.exits("test").num_samples == 10
    assert table.macs.main / 1e6 == pytest.approx(300.8 - 1280 * 995 / 1e6, rel=0.01), "five classes, not a thousand"
    assert len(table.hard_classes) == 2
