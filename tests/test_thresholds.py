"""The exact search against replaying every point through the exit rule, one by one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meanet.config import EnergyConfig
from meanet.energy import CostModel, Macs, cost_model
from meanet.errors import UserError
from meanet.operating_point import policy_of
from meanet.routing import GATES, Policy, complexity, read_main
from meanet.thresholds import Exits, Points, choose, pareto_front, replay, sweep, sweep_gate

COSTS: CostModel = cost_model(EnergyConfig(), Macs(main=10**6, adaptive=10**5, extension=10**7, cloud=10**9))


def exits(seed: int, count: int, num_classes: int = 5, num_hard: int = 3, *, ties: bool = False) -> Exits:
    """Random logits that know something of the labels, a cloud that knows more; rows of NaN and tied rows at will."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    hard = tuple(int(c) for c in generator.permutation(num_classes)[:num_hard])
    main = generator.normal(size=(count, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    extension = generator.normal(size=(count, num_hard)) + 3 * (labels[:, None] == np.array(hard))
    if ties and count > 4:
        main[1:3] = main[0]
        main[3 : 3 + seed % 3] = np.nan
    guess = generator.integers(0, num_classes, count)
    cloud = np.where(generator.random(count) < 0.9, labels, guess)
    sent = generator.integers(50, 500, count)
    return Exits(labels, main.astype(np.float32), extension.astype(np.float32), cloud, sent, hard)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(GATES), st.integers(1, 3), st.booleans())
def test_every_point_is_what_its_policy_replays(seed: int, count: int, gate: str, size: int, ties: bool) -> None:
    recorded = exits(seed, count, ties=ties)
    points = sweep_gate(recorded, COSTS, gate, size)  # type: ignore[arg-type]
    score = complexity(read_main(recorded.main_logits, Policy()), gate)  # type: ignore[arg-type]
    assert len(points) == len(np.unique(score)) + 1
    everything = (recorded.cloud_pred == recorded.labels).mean()
    for row in range(len(points)):
        policy = policy_of(points, row, recorded.hard_classes)
        if policy.threshold is None and np.isinf(score).any():
            continue  # null keeps even what is not finite on the edge; the sweep's last point says the same below
        outcome = replay(recorded, COSTS, policy)
        assert outcome.accuracy == pytest.approx(points.accuracy[row])
        assert outcome.total_joules == pytest.approx(points.joules[row])
        assert outcome.share["cloud"] == pytest.approx(points.cloud_share[row])
        assert everything - outcome.accuracy == pytest.approx(points.loss_vs_cloud[row])


def test_last_point_never_uses_the_cloud_even_for_rows_that_are_not_finite() -> None:
    recorded = exits(1, 30, ties=True)
    points = sweep_gate(recorded, COSTS, "main_entropy", 2)
    policy = policy_of(points, len(points) - 1, recorded.hard_classes)
    assert policy.threshold is None
    assert replay(recorded, COSTS, policy).share["cloud"] == 0 == points.cloud_share[-1]
    assert replay(recorded, COSTS, policy).accuracy == pytest.approx(points.accuracy[-1])


@pytest.mark.parametrize("gate", GATES)
def test_thresholds_lie_midway_between_neighbours(gate: str) -> None:
    recorded = exits(3, 50)
    score = np.unique(complexity(read_main(recorded.main_logits, Policy()), gate))  # type: ignore[arg-type]
    thresholds = sweep_gate(recorded, COSTS, gate, 1).threshold  # type: ignore[arg-type]
    np.testing.assert_allclose(thresholds[1:-1], (score[1:] + score[:-1]) / 2)
    assert thresholds[0] < score[0]
    assert np.isinf(thresholds[-1])


def test_loss_deviation_is_the_standard_error_of_paired_differences() -> None:
    recorded = exits(5, 200)
    points = sweep_gate(recorded, COSTS, "margin", 3)
    row = len(points) // 2
    policy = policy_of(points, row, recorded.hard_classes)
    from meanet.routing import route

    right = route(recorded.main_logits, recorded.extension_logits, recorded.cloud_pred, policy).pred == recorded.labels
    difference = (recorded.cloud_pred == recorded.labels).astype(float) - right
    assert points.loss_deviation[row] == pytest.approx(difference.std() / np.sqrt(200))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_front_is_what_nothing_beats(seed: int) -> None:
    points = sweep(exits(seed, 25), COSTS, GATES)
    front = pareto_front(points)
    for row in range(len(points)):
        as_good = (front.accuracy >= points.accuracy[row]) & (front.joules <= points.joules[row])
        assert as_good.any(), "every point is matched or beaten by the front"
    assert (np.diff(front.joules) > 0).all()
    assert (np.diff(front.accuracy) > 0).all()


def test_choice_is_the_cheapest_that_keeps_the_constraint() -> None:
    points = sweep(exits(7, 300), COSTS, GATES)
    for loss in (0.0, 0.02, 0.05):
        chosen = choose(points, loss)
        allowed = points.take(points.loss_vs_cloud <= loss + 1e-12)
        assert chosen.loss_vs_cloud[0] <= loss + 1e-12
        assert chosen.joules[0] == allowed.joules.min()
    sure = [choose(points, 0.05, confidence).joules[0] for confidence in (0.5, 0.8, 0.95, 0.999)]
    assert sure == sorted(sure)
    assert sure[0] < sure[-1]
    hopeless = choose(points, 0.0, 0.999999)
    assert hopeless.loss_vs_cloud[0] <= 0


def test_bigger_loss_or_other_costs_change_the_choice() -> None:
    points = sweep(exits(7, 300), COSTS, GATES)
    assert choose(points, 0.5).joules[0] < choose(points, 0.0).joules[0]


def test_split_sizes_and_empty_tables_are_checked() -> None:
    recorded = exits(0, 10)
    with pytest.raises(UserError, match=r"split sizes \[4\]: choose from 0..3"):
        sweep(recorded, COSTS, GATES, [1, 4])
    empty = dataclasses.replace(
        recorded,
        labels=recorded.labels[:0],
        main_logits=recorded.main_logits[:0],
        extension_logits=recorded.extension_logits[:0],
        cloud_pred=recorded.cloud_pred[:0],
        upload_bytes=recorded.upload_bytes[:0],
    )
    with pytest.raises(UserError, match="no samples"):
        sweep(empty, COSTS, GATES)


def test_points_keep_their_order_when_joined() -> None:
    points = sweep(exits(0, 10), COSTS, GATES, [1])
    assert len(Points.join([points, points])) == 2 * len(points)
