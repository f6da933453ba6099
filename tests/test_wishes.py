"""A policy in the operating point's place: within what the model was trained for, or refused with a word."""

from typing import Any

import pytest

from meanet.artifact import TrainedModel
from meanet.errors import UserError
from serve_apps.wishes import PolicyWish


def test_what_is_left_out_stays(model: TrainedModel) -> None:
    point = model.policy
    assert PolicyWish(1).applied_to(model) == point
    moved = PolicyWish(1, thresholds=(0.25,)).applied_to(model)
    assert (moved.thresholds, moved.gate, moved.hard_classes) == ((0.25,), point.gate, point.hard_classes)
    assert PolicyWish(1, num_hard_classes=3).applied_to(model).hard_classes == model.hard_classes[:3]
    assert PolicyWish(1, edge_only=True).applied_to(model).uses_cloud is False
    other = PolicyWish(1, gate="main_entropy", thresholds=(None,)).applied_to(model)
    assert (other.gate, other.measures, other.uses_cloud) == ("main_entropy", ("main_entropy",), False)
    many = PolicyWish(1, gate="per_class", thresholds=(0.5,) * 10).applied_to(model)
    assert many.measures == ("main_entropy",)


def test_it_survives_being_stored() -> None:
    wish = PolicyWish(3, gate="margin", thresholds=(0.5, None), num_hard_classes=2, edge_only=True)
    assert PolicyWish.of(wish.to_dict()) == wish
    assert PolicyWish.of(PolicyWish(3).to_dict()) == PolicyWish(3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"gate": "per_class"}, "give its thresholds"),
        ({"gate": "two_gate", "thresholds": (0.1,)}, "two thresholds"),
        ({"gate": "per_class", "thresholds": (0.1,)}, "for 10 classes"),
        ({"thresholds": ()}, "one threshold"),
        ({"thresholds": (float("inf"),)}, "not a finite number"),
        ({"num_hard_classes": 99}, "num_hard_classes is 99"),
        ({"num_hard_classes": -1}, "num_hard_classes is -1"),
    ],
)
def test_what_does_not_fit_is_refused(model: TrainedModel, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PolicyWish(1, **fields).applied_to(model)
