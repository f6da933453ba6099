"""The exact search against replaying every point through the exit rule, one by one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meanet.calibration import fit_temperatures, temperature
from meanet.config import EnergyConfig, Measure, OperatingPointConfig
from meanet.edges import Recorded
from meanet.energy import CostModel, Macs, cost_model
from meanet.errors import UserError
from meanet.fronts import choose, hypervolume, pareto_front, pareto_set
from meanet.operating_point import policy_of, sweep
from meanet.replay import Exits, Outcome, replay
from meanet.routing import MEASURES, Policy, complexity, read_main, route
from meanet.thresholds import Points, every_point, sweep_gate
from meanet.two_gate import sweep_two_gates

COSTS: CostModel = cost_model(EnergyConfig(), Macs(main=10**6, adaptive=10**5, extension=10**7, cloud=10**9))
DEAR: CostModel = cost_model(EnergyConfig(), Macs(main=10**6, adaptive=10**5, extension=10**11, cloud=10**9))
"""An extension block that costs more than some uploads."""
HALF_A_POINT = OperatingPointConfig()
ANY = OperatingPointConfig(max_accuracy_loss_vs_cloud=None, confidence=0.5)


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
        extension[seed % count, seed % num_hard] = np.inf
        main[count - 1], extension[count - 2] = main[count - 1] * 90, extension[count - 2] * 400  # confidences of 1
    guess = generator.integers(0, num_classes, count)
    cloud = np.where(generator.random(count) < 0.9, labels, guess)
    sent = generator.integers(50, 500, count)
    return Exits(labels, main.astype(np.float32), extension.astype(np.float32), cloud, sent, hard)


def assert_replays(recorded: Exits, costs: CostModel, points: Points, temperatures: dict[str, float]) -> None:
    """Every point is what its policy yields, sample by sample through the exit rule."""
    everything = (recorded.cloud_pred == recorded.labels).mean()
    for row in range(len(points)):
        policy = policy_of(points, row, recorded.hard_classes, temperatures)
        found = replay(recorded, costs, policy)
        assert found.accuracy == pytest.approx(points.accuracy[row])
        assert found.total_joules == pytest.approx(points.joules[row])
        assert found.seconds == pytest.approx(points.seconds[row])
        assert found.share["cloud"] == pytest.approx(points.cloud_share[row])
        assert everything - found.accuracy == pytest.approx(points.loss_vs_cloud[row])


def all_points(recorded: Exits, costs: CostModel = COSTS) -> Points:
    """Every threshold of every measure at every split size."""
    read = Recorded(recorded, costs)
    sizes = range(len(recorded.hard_classes) + 1)
    return Points.join([every_point(read, measure, size) for measure in MEASURES for size in sizes])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(MEASURES), st.integers(0, 3), st.booleans())
def test_every_point_is_what_its_policy_replays(seed: int, count: int, measure: Measure, size: int, ties: bool) -> None:
    recorded = exits(seed, count, ties=ties)
    temperatures = {"main": 1.0 + seed % 3, "extension": 1.0 + seed % 2}
    points = every_point(Recorded(recorded, COSTS, temperatures), measure, size)
    if measure != "accepted_entropy":
        score = complexity(read_main(recorded.main_logits, Policy(temperatures=temperatures)), measure)
        assert len(points) == 2 + (np.diff(np.sort(score[np.isfinite(score)])) > 1e-12).sum() + np.isinf(score).any()
    assert points.threshold[-1] == np.inf
    assert points.cloud_share[-1] == 0
    assert_replays(recorded, COSTS, points, temperatures)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.booleans(), st.booleans(), st.sampled_from([0.0, 1.6]))
def test_what_the_sweep_keeps_holds_the_front_and_every_choice(
    seed: int, count: int, ties: bool, dear: bool, z: float
) -> None:
    """Against all points: the same accuracy-joules front, the same four-dimensional one, and as good a choice."""
    recorded, costs = exits(seed, count, ties=ties), DEAR if dear else COSTS
    read, everything = Recorded(recorded, costs), all_points(recorded, costs)
    swept = [sweep_gate(read, measure, range(4), z) for measure in MEASURES]
    kept = Points.join([points for _, points in swept])
    assert sum(compared for compared, _ in swept) == len(everything)
    fronts = [sweep_gate(read, measure, range(4), front_only=True)[1] for measure in MEASURES]
    np.testing.assert_allclose(pareto_front(Points.join(fronts)).joules, pareto_front(everything).joules)
    for front in (pareto_front, pareto_set):
        ours, theirs = front(kept), front(everything)
        np.testing.assert_allclose(ours.joules, theirs.joules)
        np.testing.assert_allclose(ours.accuracy, theirs.accuracy)
    for bound in (0.0, 0.1, 0.3):
        confidence = 0.5 if z == 0 else 0.945
        constraint = OperatingPointConfig(max_accuracy_loss_vs_cloud=bound, confidence=confidence)
        try:
            best = choose(everything, constraint).joules[0]
        except UserError:
            continue
        assert choose(kept, constraint).joules[0] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_unbeaten_is_dropped_where_logits_are_not_finite_and_uploads_cheap(seed: int) -> None:
    recorded = exits(3 * seed + 2, 12, ties=True)
    read = Recorded(recorded, DEAR)
    for measure in MEASURES:
        everything = Points.join([every_point(read, measure, size) for size in range(4)])
        kept = sweep_gate(read, measure, range(4))[1]
        np.testing.assert_allclose(pareto_set(kept).joules, pareto_set(everything).joules)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.booleans())
def test_two_gates_by_merging_are_the_best_of_all_pairs(seed: int, count: int, ties: bool) -> None:
    recorded = exits(seed, count, ties=ties)
    read = Recorded(recorded, COSTS)
    covered, found = sweep_two_gates(read, [2])
    assert found is not None
    assert_replays(recorded, COSTS, found, {"main": 1.0, "extension": 1.0})
    single = [every_point(read, measure, 2) for measure in MEASURES]
    best: list[tuple[float, float]] = []
    tried = 0
    for first, easy in zip(MEASURES, single, strict=True):
        for second, hard in zip(MEASURES, single, strict=True):
            for one in easy.threshold:
                for other in hard.threshold:
                    limits = tuple(None if np.isinf(value) else float(value) for value in (one, other))
                    policy = Policy("two_gate", limits, recorded.hard_classes[:2], measures=(first, second))
                    outcome = replay(recorded, COSTS, policy)
                    best.append((outcome.total_joules, outcome.accuracy))
                    tried += 1
            if tried > 600:
                break
    for joules, accuracy in best:
        matched = (found.joules <= joules * (1 + 1e-9)) & (found.accuracy >= accuracy - 1e-9)
        assert matched.any(), "every pair is matched or beaten by the merged front"
    assert covered > 0


def test_two_gates_need_hard_classes_in_use() -> None:
    recorded = exits(3, 20)
    assert sweep_two_gates(Recorded(recorded, COSTS), [0]) == (0, None)
    with pytest.raises(UserError, match="two_gate needs hard classes"):
        sweep(recorded, COSTS, ["two_gate"], [0])


def test_last_point_never_uses_the_cloud_even_for_rows_that_are_not_finite() -> None:
    recorded = exits(1, 30, ties=True)
    points = every_point(Recorded(recorded, COSTS), "main_entropy", 2)
    policy = policy_of(points, len(points) - 1, recorded.hard_classes)
    assert policy.threshold is None
    assert replay(recorded, COSTS, policy).share["cloud"] == 0 == points.cloud_share[-1]


@pytest.mark.parametrize("measure", [measure for measure in MEASURES if measure != "accepted_entropy"])
def test_thresholds_lie_midway_between_neighbours(measure: Measure) -> None:
    recorded = exits(3, 50)
    score = np.unique(complexity(read_main(recorded.main_logits, Policy()), measure))
    thresholds = every_point(Recorded(recorded, COSTS), measure, 1).threshold
    np.testing.assert_allclose(thresholds[1:-1], (score[1:] + score[:-1]) / 2)
    assert thresholds[0] < score[0]
    assert np.isinf(thresholds[-1])


def test_loss_deviation_is_the_standard_error_of_paired_differences() -> None:
    recorded = exits(5, 200)
    points = every_point(Recorded(recorded, COSTS), "margin", 3)
    row = len(points) // 2
    policy = policy_of(points, row, recorded.hard_classes)
    right = route(recorded.main_logits, recorded.extension_logits, recorded.cloud_pred, policy).pred == recorded.labels
    difference = (recorded.cloud_pred == recorded.labels).astype(float) - right
    assert points.loss_deviation[row] == pytest.approx(difference.std() / np.sqrt(200))
    assert points.accuracy_deviation[row] == pytest.approx(right.std() / np.sqrt(200))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_front_is_what_nothing_beats(seed: int) -> None:
    points = all_points(exits(seed, 25))
    front = pareto_front(points)
    for row in range(len(points)):
        as_good = (front.accuracy >= points.accuracy[row]) & (front.joules <= points.joules[row])
        assert as_good.any(), "every point is matched or beaten by the front"
    assert (np.diff(front.joules) > 0).all()
    assert (np.diff(front.accuracy) > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 900))
def test_pareto_set_is_what_nothing_beats_in_four_ways(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 6, size=(4, count)).astype(float)
    points = all_points(exits(0, 10))
    points = points.take(generator.integers(0, len(points), count))
    names = ("accuracy", "joules", "cloud_share", "seconds")
    points = dataclasses.replace(points, **dict(zip(names, values, strict=True)))
    costs = np.stack((-values[0], *values[1:]), axis=1)
    as_good = (costs[None] <= costs[:, None]).all(axis=2)
    better = as_good & (costs[None] < costs[:, None]).any(axis=2)
    expected = np.unique(costs[~better.any(axis=1)], axis=0)
    found = pareto_set(points)
    ours = np.stack((-found.accuracy, found.joules, found.cloud_share, found.seconds), axis=1)
    np.testing.assert_array_equal(np.unique(ours, axis=0), expected)
    assert len(ours) == len(expected), "equals are kept once"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_hypervolume_is_the_share_of_the_area_that_is_dominated(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    accuracy, joules = generator.random(count), generator.random(count) * 3
    cells_a, cells_j = (np.arange(200) + 0.5) / 200 * 0.6 + 0.4, (np.arange(200) + 0.5) / 200 * 2.0
    covered = np.zeros((200, 200), dtype=bool)
    for one, cost in zip(accuracy, joules, strict=True):
        covered |= (cells_a[:, None] <= one) & (cells_j[None] >= cost)
    assert hypervolume(accuracy, joules, 0.4, 2.0) == pytest.approx(covered.mean(), abs=0.02)


def test_choice_is_the_cheapest_that_keeps_the_constraint() -> None:
    points = all_points(exits(7, 300))
    for loss in (0.0, 0.02, 0.05):
        chosen = choose(points, OperatingPointConfig(max_accuracy_loss_vs_cloud=loss, confidence=0.5))
        allowed = points.take(points.loss_vs_cloud <= loss + 1e-12)
        assert chosen.loss_vs_cloud[0] <= loss + 1e-12
        assert chosen.joules[0] == allowed.joules.min()
    sure = [
        choose(points, OperatingPointConfig(max_accuracy_loss_vs_cloud=0.05, confidence=confidence)).joules[0]
        for confidence in (0.5, 0.8, 0.95, 0.999)
    ]
    assert sure == sorted(sure)
    assert sure[0] < sure[-1]
    hopeless = choose(points, OperatingPointConfig(max_accuracy_loss_vs_cloud=0.0, confidence=0.999999))
    assert hopeless.loss_vs_cloud[0] <= 0


@pytest.mark.parametrize(
    ("name", "field"), [("max_energy", "joules"), ("max_cloud_share", "cloud_share"), ("max_latency", "seconds")]
)
def test_bounds_on_costs_choose_the_most_accurate_within_them(name: str, field: str) -> None:
    points = all_points(exits(7, 300))
    values = getattr(points, field)
    bound = float(np.quantile(values, 0.3))
    chosen = choose(points, dataclasses.replace(ANY, **{name: bound}))
    within = values <= bound + 1e-12
    assert getattr(chosen, field)[0] <= bound + 1e-12
    assert chosen.accuracy[0] == points.accuracy[within].max()


def test_least_accuracy_is_bounded_too() -> None:
    points = all_points(exits(7, 300))
    chosen = choose(points, dataclasses.replace(ANY, min_accuracy=0.8, confidence=0.9))
    z = 1.2815515655446004
    allowed = points.accuracy - z * points.accuracy_deviation >= 0.8
    assert chosen.joules[0] == points.joules[allowed].min()


def test_impossible_constraint_says_how_close_one_can_come() -> None:
    points = all_points(exits(7, 300))
    with pytest.raises(UserError, match=r"min-accuracy 0.999.*accuracy can reach 0\.9\d+"):
        choose(points, dataclasses.replace(ANY, min_accuracy=0.999))
    both = dataclasses.replace(ANY, min_accuracy=0.85, max_cloud_share=0.01)
    with pytest.raises(UserError, match=r"accuracy can reach 0.*cloud share can come down to 0.*others kept") as caught:
        choose(points, both)
    words = str(caught.value)
    reach = float(words.split("accuracy can reach ")[1].split(";", maxsplit=1)[0])
    share = float(words.split("come down to ")[1].split(" with", maxsplit=1)[0])
    assert reach == pytest.approx(points.accuracy[points.cloud_share <= 0.01 + 1e-12].max(), abs=1e-4)
    assert share == pytest.approx(points.cloud_share[points.accuracy >= 0.85].min(), abs=1e-4)


def test_split_sizes_gates_and_empty_tables_are_checked() -> None:
    recorded = exits(0, 10)
    with pytest.raises(UserError, match=r"split sizes \[4\]: choose from 0..3"):
        sweep(recorded, COSTS, MEASURES, [1, 4])
    with pytest.raises(UserError, match=r"per_class.*jobs\.tune gates"):
        sweep(recorded, COSTS, ["per_class"])
    empty = dataclasses.replace(
        recorded,
        labels=recorded.labels[:0],
        main_logits=recorded.main_logits[:0],
        extension_logits=recorded.extension_logits[:0],
        cloud_pred=recorded.cloud_pred[:0],
        upload_bytes=recorded.upload_bytes[:0],
    )
    with pytest.raises(UserError, match="no samples"):
        sweep(empty, COSTS, MEASURES)


def test_scaling_is_searched_beside_raw_logits_and_its_policies_replay() -> None:
    recorded = exits(9, 400)
    swept = sweep(recorded, COSTS, [*MEASURES, "two_gate"], scaled=True, confidence=0.95)
    assert swept.temperatures == fit_temperatures(recorded)
    assert 0 < swept.points.scaled.mean() < 1
    some = np.random.default_rng(0).permutation(len(swept.points))[:150]
    assert_replays(recorded, COSTS, swept.points.take(some), swept.temperatures)


def chosen_over_links(constraint: OperatingPointConfig) -> list[tuple[Points, Outcome]]:
    """The choice over a wire, WiFi and LTE: an upload costs a third of the extension block, ten and thirty times it."""
    macs = Macs(main=69_130_000, adaptive=12_500_000, extension=21_760_000, cloud=556_000_000)
    recorded = exits(21, 3000, num_classes=8, num_hard=5)
    recorded = dataclasses.replace(recorded, upload_bytes=recorded.upload_bytes * 8)
    found = []
    for link in ("wired", "wifi", "lte"):
        costs = cost_model(EnergyConfig(link=link), macs)
        swept = sweep(recorded, costs, [*MEASURES, "two_gate"], confidence=constraint.confidence)
        chosen = choose(swept.points, constraint)
        found.append((chosen, replay(recorded, costs, policy_of(chosen, 0, recorded.hard_classes))))
    return found


def test_dearer_links_send_fewer_bytes_and_choose_other_points() -> None:
    found = chosen_over_links(OperatingPointConfig(max_accuracy_loss_vs_cloud=0.02))
    sent = [outcome.bytes_uploaded for _, outcome in found]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] > sent[2]
    first, last = (policy_of(found[place][0], 0, (0, 1, 2, 3, 4)) for place in (0, 2))
    assert first != last


def test_the_same_joules_buy_less_accuracy_over_a_dearer_link() -> None:
    found = chosen_over_links(dataclasses.replace(ANY, max_energy=1.2e-3))
    assert all(outcome.total_joules <= 1.2e-3 for _, outcome in found)
    shares = [outcome.share["cloud"] for _, outcome in found]
    accuracy = [outcome.accuracy for _, outcome in found]
    assert shares[0] > shares[1] > shares[2]
    assert accuracy[0] > accuracy[1] > accuracy[2]


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_temperature_is_found(true: float) -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(20000, 6)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > generator.random((len(p), 1))).argmax(axis=1)
    logits[0] = np.nan
    assert temperature(logits * true, labels) == pytest.approx(true, rel=0.05)
    assert temperature(logits[:1], labels[:1]) == 1.0
