"""How long a queue takes, learned from micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.pace import Pace


def test_nothing_is_known_at_first() -> None:
    assert Pace().wait(500, 64) == 0.0


def test_fixed_and_each_are_found() -> None:
    pace = Pace()
    for images in (1, 2, 1, 8, 3, 1):
        pace.record(images, 0.004 + 0.001 * images)
    assert pace.coefficients() == pytest.approx((0.004, 0.001))
    assert pace.wait(128, 64) == pytest.approx(2 * 0.004 + 0.128), "not 128 times what a batch of one costs"
    assert pace.wait(0, 64) == 0.0


def test_batches_of_one_size_cost_the_same_again() -> None:
    pace = Pace()
    for _ in range(20):
        pace.record(16, 0.02)
    assert pace.wait(64, 64) == pytest.approx(0.02)


def test_it_follows_a_machine_that_becomes_slow() -> None:
    pace = Pace()
    generator = np.random.default_rng(0)
    for factor in (1, 5):
        for images in generator.integers(1, 65, 60).tolist():
            pace.record(images, factor * (0.002 + 0.001 * images) * generator.uniform(0.9, 1.1))
    assert pace.wait(64, 64) == pytest.approx(5 * 0.066, rel=0.2)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 10)), min_size=1, max_size=30), st.integers(0, 2048))
def test_waits_are_sound(batches: list[tuple[int, float]], queued: int) -> None:
    pace = Pace()
    for images, seconds in batches:
        pace.record(images, seconds)
    fixed, each = pace.coefficients()
    assert fixed >= -1e-12
    assert each >= 0
    slowest = max(seconds for _, seconds in batches)
    assert -1e-9 <= pace.wait(queued, 64) <= queued * slowest + 1e-9
