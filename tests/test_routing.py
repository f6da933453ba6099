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
from meanet.routing import GATES, Exit, Policy, complexity, first_exit, read, read_main, route

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
    policy = Policy(
        gate=draw(st.sampled_from(GATES)),
        thresholds=(draw(st.one_of(st.none(), st.floats(-0.5, 2.0).map(lambda x: round(x, 2)))),),
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


def certainty(gate: str, p: list[float]) -> float:
    """The gate's complexity of a softmax."""
    if gate == "main_entropy":
        return -sum(value * math.log(value) for value in p if value > 0)
    first, *rest = sorted(p, reverse=True)
    return 1 - first if gate == "max_softmax" else 1 - (first - (rest[0] if rest else 0.0))


def by_hand(main_row: list[float], extension_row: list[float], cloud: int, policy: Policy) -> tuple[Exit, int, bool]:
    """Exit, class, and whether the case is clear of rounding."""
    p = softmax(main_row, policy.temperatures["main"])
    score = math.inf if p is None else certainty(policy.gate, p)
    clear = True
    if not policy.edge_only and policy.threshold is not None:
        clear = abs(score - policy.threshold) > 1e-9
        if score > policy.threshold:
            return Exit.CLOUD, cloud, clear
    best = 0 if p is None else p.index(max(p))
    if best not in policy.hard_classes:
        return Exit.MAIN, best, clear
    q = softmax(extension_row[: len(policy.hard_classes)], policy.temperatures["extension"])
    main_confidence = 0.0 if p is None else max(p)
    extension_confidence = 0.0 if q is None else max(q)
    extension_best = policy.hard_classes[0 if q is None else q.index(max(q))]
    difference = main_confidence - extension_confidence
    clear = clear and (difference == 0 or abs(difference) > 1e-9 or best == extension_best)
    return Exit.EXTENSION, best if difference > 0 else extension_best, clear


@settings(max_examples=600, deadline=None)
@given(cases())
def test_batched_equals_one_sample_equals_the_paper(case: Case) -> None:
    batched = route(case.main, case.extension, case.cloud, case.policy)
    for row in range(len(case.main)):
        one = slice(row, row + 1)
        alone = route(case.main[one], case.extension[one], case.cloud[one], case.policy)
        assert (alone.exit[0], alone.pred[0]) == (batched.exit[row], batched.pred[row])
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


@pytest.mark.parametrize("gate", GATES)
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
