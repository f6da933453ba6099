"""The audit: quiet without drift, and not for long with one."""

import numpy as np
import pytest

from meanet.errors import UserError
from serve_apps.audit import Audit, AuditConfig


def run(audit: Audit, rate: float, count: int, seed: int) -> int | None:
    """Audits until drift is found; None if it is not."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        audit.record(disagreed=bool(generator.random() < rate))
        if audit.drifted:
            return number
    return None


def test_no_drift_is_hardly_ever_found_where_there_is_none() -> None:
    found = [run(Audit(AuditConfig(share=0.1, expected=0.05)), 0.05, 1000, seed) for seed in range(60)]
    assert sum(one is not None for one in found) <= 3


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_planted_drift_is_found_within_the_window(rate: float) -> None:
    for seed in range(20):
        audit = Audit(AuditConfig(share=0.1, expected=0.05))
        assert run(audit, 0.05, 300, seed) is None or seed
        found = run(audit, rate, 300, seed)
        assert found is not None
        assert audit.disagreed / audit.count > 0.05


def test_that_share_of_the_answers_is_asked_about() -> None:
    assert Audit(AuditConfig(share=0.1), seed=0).draw(20_000).mean() == pytest.approx(0.1, abs=0.01)
    assert not Audit(AuditConfig()).draw(1000).any()


def test_expectation_is_the_operators_or_the_operating_points() -> None:
    assert Audit(AuditConfig(share=0.1), expected=0.2).expected == 0.2
    assert Audit(AuditConfig(share=0.1, expected=0.05), expected=0.2).expected == 0.05
    unknown = Audit(AuditConfig(share=0.1))
    for _ in range(50):
        unknown.record(disagreed=True)
    assert unknown.drifted is None, "without an expectation nothing can be said"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"share": 2}, "share is 2"),
        ({"expected": -1}, "expected is -1"),
        ({"window": 1}, "window is 1"),
        ({"significance": 0}, "significance is 0"),
    ],
)
def test_senseless_audits_are_refused(fields: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        AuditConfig(**fields)  # type: ignore[arg-type]
