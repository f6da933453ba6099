"""The exit rule exists once: batched = one sample at a time = a plain restatement of the paper's three steps."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meanet.errors import UserError
from meanet.routing import GATES, MEASURES, Exit, Policy, complexity, first_exit, read, read_main, route

Logits = NDArray[np.float64]
VALUES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 5.0, 50.0, math.nan, math.inf, -math.inf]),
    st.floats(-8, 8, allow_subnormal=False).map(lambda x: round(x, 3)),
)


@dataclass(frozen=True)
class Case:
    main: Logits
    extension: Logits
    cloud: NDArray[np.int64]
    policy: Policy


def logits(draw: st.DrawFn, rows: int, columns: int) -> Logits:
    row = st.lists(VALUES, min_size=columns, max_size=columns)
    return np.array(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=np.float64).reshape(rows, columns)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any table: one class, all classes hard, none hard, fewer in use than trained, any gate, cloud or not."""
    num_classes, rows = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    trained = draw(st.permutations(range(num_classes)))[: draw(st.integers(1, num_classes))]
    in_use = tuple(trained[: draw(st.integers(0, len(trained)))])
    gate = draw(st.sampled_from(GATES))
    count = {"two_gate": 2, "per_class": num_classes}.get(gate, 1)
    threshold = st.one_of(st.none(), st.floats(-0.5, 2.0).map(lambda x: round(x, 2)))
    measures = draw(st.lists(st.sampled_from(MEASURES), min_size=2, max_size=2))
    policy = Policy(
        gate=gate,
        thresholds=tuple(draw(st.lists(threshold, min_size=count, max_size=count))),
        measures={"two_gate": tuple(measures), "per_class": (measures[0],)}.get(gate, ()),
        hard_classes=in_use,
        temperatures={"main": draw(st.sampled_from([1.0, 0.5, 3.0])), "extension": draw(st.sampled_from([1.0, 2.0]))},
        edge_only=draw(st.booleans()),
    )
    main = logits(draw, rows, num_classes)
    extension = logits(draw, rows, len(trained))
    if draw(st.booleans()) and len(trained) == num_classes:  # ties of the two confidences
        extension = main[:, list(trained)].copy()
    cloud = np.array(draw(st.lists(st.integers(0, num_classes - 1), min_size=rows, max_size=rows)), dtype=np.int64)
    return Case(main, extension, cloud, policy)


def softmax(row: list[float], temperature: float) -> list[float] | None:
    """None where a logit is not finite."""
    scaled = [value / temperature for value in row]
    if not all(map(math.isfinite, scaled)):
        return None
    top = max(scaled)
    exponents = [math.exp(value - top) for value in scaled]
    return [value / sum(exponents) for value in exponents]


def uncertainty(measure: str, p: list[float] | None) -> float:
    """The complexity of a softmax."""
    if p is None:
        return math.inf
    if measure in ("main_entropy", "accepted_entropy"):
        return -sum(value * math.log(value) for value in p if value > 0)
    first, *rest = sorted(p, reverse=True)
    return 1 - first if measure == "max_softmax" else 1 - (first - (rest[0] if rest else 0.0))


def gate_of(best: int, policy: Policy) -> tuple[str, float | None]:
    """Which measure and which threshold a sample meets, by the class that main predicts."""
    if policy.gate == "two_gate":
        place = int(best in policy.hard_classes)
        return policy.measures[place], policy.thresholds[place]
    return policy.measures[0], policy.thresholds[best if policy.gate == "per_class" else 0]


def by_hand(main_row: list[float], extension_row: list[float], cloud: int, policy: Policy) -> tuple[Exit, int, bool]:
    """Exit, class, and whether the case is clear of rounding."""
    p = softmax(main_row, policy.temperatures["main"])
    best = 0 if p is None else p.index(max(p))
    hard = best in policy.hard_classes
    measure, threshold = gate_of(best, policy)
    bound = math.inf if policy.edge_only or threshold is None else threshold
    waits = hard and measure == "accepted_entropy" and p is not None
    clear = True
    if not waits:
        score = uncertainty(measure, p)
        clear = math.isinf(bound) or abs(score - bound) > 1e-9
        if score > bound:
            return Exit.CLOUD, cloud, clear
    if not hard:
        return Exit.MAIN, best, clear
    q = softmax(extension_row[: len(policy.hard_classes)], policy.temperatures["extension"])
    main_confidence = 0.0 if p is None else max(p)
    extension_confidence = 0.0 if q is None else max(q)
    extension_best = policy.hard_classes[0 if q is None else q.index(max(q))]
    difference = main_confidence - extension_confidence
    settled = difference == 0 or abs(difference) > 1e-9
    clear = clear and (settled or (best == extension_best and not waits))
    if waits:
        score = uncertainty(measure, p if difference > 0 else q)
        clear = clear and (math.isinf(bound) or abs(score - bound) > 1e-9)
        if score > bound:
            return Exit.CLOUD, cloud, clear
    return Exit.EXTENSION, best if difference > 0 else extension_best, clear


@settings(max_examples=600, deadline=None)
@given(cases())
def test_batched_equals_one_sample_equals_the_paper(case: Case) -> None:
    batched = route(case.main, case.extension, case.cloud, case.policy)
    for row in range(len(case.main)):
        one = slice(row, row + 1)
        alone = route(case.main[one], case.extension[one], case.cloud[one], case.policy)
        assert (alone.exit[0], alone.pred[0]) == (batched.exit[row], batched.pred[row])
        assert alone.extended[0] == batched.extended[row]
        assert batched.extended[row] or batched.exit[row] != Exit.EXTENSION
        main_row, extension_row = case.main[row].tolist(), case.extension[row].tolist()
        exit_, pred, clear = by_hand(main_row, extension_row, int(case.cloud[row]), case.policy)
        if clear:
            assert (batched.exit[row], batched.pred[row]) == (exit_, pred)


def test_exit_is_extension_though_mains_answer_was_kept() -> None:
    policy = Policy(hard_classes=(0, 1))
    routed = route(np.array([[9.0, 0.0, 0.0]]), np.array([[0.0, 0.1]]), np.array([2]), policy)
    assert (routed.exit[0], routed.pred[0]) == (Exit.EXTENSION, 0)


def test_tie_of_confidences_stays_with_the_extension() -> None:
    policy = Policy(hard_classes=(1, 0))
    routed = route(np.array([[2.0, 0.0]]), np.array([[2.0, 0.0]]), np.array([0]), policy)
    assert (routed.exit[0], routed.pred[0]) == (Exit.EXTENSION, 1)


@pytest.mark.parametrize("gate", MEASURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_complex_whatever_the_threshold(gate: Any, bad: float) -> None:
    policy = Policy(gate=gate, thresholds=(1e300,), hard_classes=(0,))
    main = read_main(np.array([[bad, 1.0], [0.0, 1.0]]), policy)
    assert complexity(main, gate)[0] == math.inf
    assert first_exit(main, policy).tolist() == [Exit.CLOUD, Exit.MAIN]
    assert first_exit(main, policy.with_request(edge_only=True)).tolist() == [Exit.EXTENSION, Exit.MAIN]


def test_readings_are_those_of_the_softmax() -> None:
    reading = read(np.log(np.array([[0.7, 0.2, 0.1]])))
    assert reading.confidence[0] == pytest.approx(0.7)
    assert reading.margin[0] == pytest.approx(0.5)
    assert reading.entropy[0] == pytest.approx(-(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)))
    assert read(np.zeros((1, 100))).entropy[0] == pytest.approx(math.log(100))
    assert read(np.array([[1000.0, -1000.0]])).entropy[0] == 0.0


def test_edge_only_of_policy_or_request_wins() -> None:
    policy = Policy(thresholds=(-1.0,), hard_classes=(0,), edge_only=True)
    assert policy.with_request(edge_only=False, threshold=-1.0).edge_only
    assert not policy.uses_cloud
    assert Policy(thresholds=(0.5,)).with_request(threshold=0.1).thresholds == (0.1,)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"gate": "astrology"}, "'astrology'.*main_entropy"),
        ({"thresholds": (1.0, 2.0)}, "one threshold, not 2"),
        ({"gate": "two_gate", "thresholds": (1.0,)}, "two_gate takes two thresholds, not 1"),
        ({"gate": "per_class", "thresholds": ()}, "a threshold a class, not 0"),
        ({"gate": "two_gate", "thresholds": (1.0, None), "measures": ("margin",)}, "'margin'.*takes 2 of main_entropy"),
        ({"gate": "per_class", "measures": ("luck",)}, "'luck'.*takes 1 of"),
        ({"gate": "margin", "measures": ("main_entropy",)}, "gate margin is its own measure"),
        ({"thresholds": (math.nan,)}, "threshold nan"),
        ({"hard_classes": (1, 1)}, r"\(1, 1\)"),
        ({"hard_classes": (-1,)}, r"\(-1,\)"),
        ({"temperatures": {"main": 0.0, "extension": 1.0}}, "temperatures.*0.0"),
        ({"temperatures": {"main": 1.0}}, "temperatures"),
    ],
)
def test_senseless_policies_are_refused(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        Policy(**fields)


def test_what_only_the_number_of_classes_tells_is_checked_when_it_is_known() -> None:
    arrays = np.zeros((1, 3)), np.zeros((1, 1)), np.zeros(1, dtype=np.int64)
    with pytest.raises(UserError, match="2 thresholds for 3 classes"):
        route(*arrays, Policy(gate="per_class", thresholds=(1.0, None)))
    with pytest.raises(UserError, match=r"hard_classes \[7\] are none of the 3"):
        route(*arrays, Policy(hard_classes=(7,)))


def test_request_cannot_set_one_of_many_thresholds() -> None:
    policy = Policy(gate="two_gate", thresholds=(0.5, 0.7))
    with pytest.raises(UserError, match=r"threshold 0\.1: the policy in force, gate two_gate, has 2"):
        policy.with_request(threshold=0.1)
    assert policy.with_request(edge_only=True).edge_only


def test_accepted_entropy_pays_for_the_extension_before_it_sends() -> None:
    main, extension = np.array([[2.0, 0.0, 0.0]]), np.array([[0.1, 0.0]])
    early = Policy(gate="main_entropy", thresholds=(0.1,), hard_classes=(0, 1))
    late = Policy(gate="accepted_entropy", thresholds=(0.1,), hard_classes=(0, 1))
    for policy, extended in ((early, False), (late, True)):
        routed = route(main, extension, np.array([2]), policy)
        assert (routed.exit[0], routed.pred[0], routed.extended[0]) == (Exit.CLOUD, 2, extended)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(gate="two_gate", thresholds=(0.25, None), hard_classes=(1,), measures=("margin", "accepted_entropy")),
        Policy(gate="per_class", thresholds=(0.25, None, 1.0), measures=("max_softmax",)),
    ],
)
def test_policies_of_many_thresholds_round_trip(policy: Policy) -> None:
    assert Policy.from_dict(policy.to_dict()) == policy


def test_policy_round_trip_and_damage() -> None:
    policy = Policy(
        gate="margin", thresholds=(0.25,), hard_classes=(3, 1), temperatures={"main": 2.0, "extension": 1.5}
    )
    assert Policy.from_dict(policy.to_dict()) == policy
    with pytest.raises(UserError, match="thresholds"):
        Policy.from_dict({key: value for key, value in policy.to_dict().items() if key != "thresholds"})
    with pytest.raises(UserError, match="cannot be read"):
        Policy.from_dict(policy.to_dict() | {"hard_classes": None})
    with pytest.raises(UserError, match="operating point cannot be read: ValueError"):
        Policy.from_dict(policy.to_dict() | {"thresholds": ["high"]})
