"""A training whose checkpoints lie in a bucket and whose metrics go to a server: both go away in the middle of it."""

from pathlib import Path

import pytest

from benchmarks import storage_outage
from benchmarks.storage_outage import EPOCHS, PHASES

pytestmark = pytest.mark.cluster


def test_training_outlives_both_and_loses_nothing(tmp_path: Path) -> None:
    """S3 for 20 s, MLflow for 60."""
    outcome = storage_outage.measure(tmp_path, 20, 60)
    assert outcome.returncode == 0, outcome.said
    assert outcome.away["S3"] >= 20
    assert outcome.away["MLflow"] >= 60
    assert outcome.starts == 1, f"it went on, and did not begin again: {outcome.said}"
    assert "MLflow: points are kept in points.jsonl and follow" in outcome.said
    assert outcome.steps == {phase: list(range(1, EPOCHS + 1)) for phase in PHASES}
    assert outcome.statuses == dict.fromkeys(PHASES, "FINISHED")
    assert outcome.artifacts, "they went through the server into the bucket"
    assert outcome.history == [(phase, epoch) for phase in PHASES for epoch in range(1, EPOCHS + 1)]
    assert outcome.right
    assert (tmp_path / "run" / "model" / "model.json").exists()
