"""Settings that may change while a server runs: partial updates, and words for what makes no sense."""

from typing import Any

import pytest

from meanet.errors import UserError
from serve_apps.budget import Budget
from serve_apps.settings import Settings


def test_update_changes_what_it_names_and_nothing_else() -> None:
    before = Settings(deadline_s=3.0)
    after = before.updated({"breaker_failures": 7, "budget": {"cloud_share": 0.15}, "audit": {"share": 0.1}})
    assert (after.deadline_s, after.breaker_failures, after.budget) == (3.0, 7, Budget(cloud_share=0.15))
    again = after.updated({"audit": {"expected": 0.02}, "budget": None})
    assert (again.audit.share, again.audit.expected, again.budget) == (0.1, 0.02, None)
    assert before.updated({}) == before
    assert before.updated(after.to_dict()) == after, "what is shown can be put"
    assert before.updated({"deadline_s": 5}).deadline_s == 5, "whole numbers are numbers"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"deadline": 1}, "deadline: "),
        ({"deadline_s": "1"}, "deadline_s: Input should be a valid number"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"deadline_s": True}, "deadline_s"),
        ({"reserve_s": 2.5}, "reserve_s is 2.5"),
        ({"breaker_failures": 1.5}, "breaker_failures"),
        ({"lowest_threshold": 2.0, "highest_threshold": 1.0}, "thresholds from 2.0 to 1.0"),
        ({"budget": {"cloud_share": 2}}, "budget: budget cloud_share is 2"),
        ({"budget": {"share": 0.1}}, "budget.share"),
        ({"budget": {"cloud_share": 0.1, "highest": 0.3}, "lowest_threshold": 0.5}, "budget bounds 0.5..0.3"),
        ({"audit": {"share": -1}}, "audit: audit share is -1"),
        ({"audit": 3}, "audit"),
        ({"deadline_s": {1, 2}}, "no JSON"),
    ],
)
def test_senseless_updates_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        Settings().updated(changes)
    assert says in str(error.value)


def test_thresholds_keep_their_bounds() -> None:
    Settings().check_thresholds([-1e9, None, 1e9])
    bounded = Settings(lowest_threshold=0.1, highest_threshold=0.9)
    bounded.check_thresholds([0.1, None, 0.9])
    for outside in (0.05, 0.95):
        with pytest.raises(UserError, match=r"from 0.1 to 0.9"):
            bounded.check_thresholds([0.5, outside])


def test_a_budget_keeps_the_bounds_of_thresholds_too() -> None:
    assert Settings(lowest_threshold=0.1).held is None
    wide = Settings(budget=Budget(cloud_share=0.1), lowest_threshold=0.1, highest_threshold=0.9)
    assert wide.held == Budget(cloud_share=0.1, lowest=0.1, highest=0.9)
    narrow = Settings(budget=Budget(cloud_share=0.1, lowest=0.2, highest=0.8), lowest_threshold=0.1)
    assert narrow.held == narrow.budget
    free = Settings(budget=Budget(cloud_share=0.1))
    assert free.held == free.budget


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"cloud_budget_s": -1.0}, "cloud_budget_s is -1"),
        ({"breaker_failures": 0}, "breaker_failures is 0"),
        ({"max_queued": 0}, "max_queued is 0"),
        ({"reserve_s": 9}, "reserve_s is 9"),
    ],
)
def test_senseless_settings_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Settings(**values)
