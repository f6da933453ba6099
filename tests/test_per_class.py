"""Policies with a threshold a class: levels and thresholds, and the sampled search over a recorded table."""

from pathlib import Path

import numpy as np
import pytest
from test_thresholds import COSTS, exits

from meanet.config import Measure, Recipe
from meanet.evaluation import ExitsTable
from meanet.judge import reference_of
from meanet.operating_point import policy_of, sweep
from meanet.per_class import Evaluation, Levels, exact_front, starts
from meanet.replay import Replayer, replay
from meanet.routing import MEASURES, Policy
from meanet.study import (
    Params,
    gain,
    read_trial,
    read_trials,
    trial_id,
)
from tune_spaces.gates import gates


@pytest.mark.parametrize("by", MEASURES)
def test_levels_and_thresholds_are_two_names_of_one_policy(table: ExitsTable, by: Measure) -> None:
    """Any policy of one threshold, translated to levels and back, sends the same samples."""
    exits, costs = table.exits("validation"), table.costs
    levels = Levels(exits)
    points = sweep(exits, costs, (by,), (0, 3, 5)).points
    for row in range(0, len(points), max(1, len(points) // 25)):
        one = policy_of(points, row, exits.hard_classes)
        many = levels.policy(levels.params(one))
        assert (many.gate, many.measures, len(many.thresholds)) == ("per_class", (by,), 10)
        single, several = replay(exits, costs, one), replay(exits, costs, many)
        assert several.accuracy == single.accuracy
        assert several.share == single.share
        assert several.total_joules == pytest.approx(single.total_joules)


def test_a_level_is_the_share_that_stays(table: ExitsTable) -> None:
    exits = table.exits("validation")
    space = gates(10, 5, ())
    params: Params = dict.fromkeys(space.parameters, 0.5) | {"measure": "margin", "num_hard_classes": 0}
    routed = Replayer(exits, table.costs).route(Levels(exits).policy(params))
    pred = Replayer(exits, table.costs).route(Policy()).pred
    for class_id in range(10):
        own = pred == class_id
        assert (routed.exit[own] == 0).sum() == pytest.approx(own.sum() / 2, abs=0.5)
    all_sent = Levels(exits).policy(dict.fromkeys(space.parameters, 0.0) | {"measure": "margin", "num_hard_classes": 0})
    assert replay(exits, table.costs, all_sent).share["cloud"] == 1


def test_sampled_study_is_never_worse_than_where_it_starts(tmp_path: Path, table: ExitsTable, recipe: Recipe) -> None:
    exits, costs, constraint = table.exits("validation"), table.costs, recipe.operating_point
    reference = reference_of(exits, costs)
    exact = exact_front(exits, costs, constraint, reference)
    first = starts(exits, exact, 6)
    assert gates(10, 5, first).first == first
    assert 2 <= len(first) <= 6
    evaluate = Evaluation(exits, costs, recipe.energy, constraint, reference, str(tmp_path), None)
    found = [evaluate(params) for params in first]
    default = read_trial(tmp_path / trial_id(first[0]))
    assert default is not None
    assert default.operating_point is not None, "the exact search's choice keeps the constraint in this form, too"
    outcome = replay(exits, costs, exact.chosen)
    assert (default.front[0].accuracy, default.front[0].joules) == (outcome.accuracy, outcome.total_joules)
    whole = reference.hypervolume(
        np.array([p.accuracy for p in exact.front]), np.array([p.joules for p in exact.front])
    )
    assert 0 < max(one.hypervolume for one in found) <= whole
    assert gain([p for t in read_trials(tmp_path) for p in t.front], exact.front).accuracy <= 1e-12


def test_levels_of_logits_that_are_not_finite_are_never_or_a_number() -> None:
    """Classes that main predicts on rows of NaN alone, or on several of them, have a policy at every level."""
    recorded = exits(5, 60, ties=True)
    recorded.main_logits[10:30] = np.nan
    levels = Levels(recorded)
    names = gates(5, 3, ()).parameters
    for by in MEASURES:
        for level in np.linspace(0, 1, 9):
            params: Params = {**dict.fromkeys(names, float(level)), "measure": by, "num_hard_classes": 2}
            policy = levels.policy(params)
            assert all(value is None or np.isfinite(value) for value in policy.thresholds)
            assert 0 <= replay(recorded, COSTS, policy).accuracy <= 1
