"""How many classes are hard, and which: the main block and the cloud are shared by all trials."""

from typing import get_args

from meanet.config import Recipe, SplitMethod
from meanet.study import Choice, Domain, IntRange, Params, Space


def class_split(recipe: Recipe, num_classes: int) -> Space:
    """Size H and choice of the hard classes; the default is the recipe's."""
    return Space("class_split", parameters(num_classes), (default(recipe, num_classes),))


def parameters(num_classes: int) -> dict[str, Domain]:
    """Size and method."""
    return {
        "split.num_hard_classes": IntRange(1, num_classes - 1),
        "split.method": Choice(get_args(SplitMethod)),
    }


def default(recipe: Recipe, num_classes: int) -> Params:
    """The recipe's own split."""
    return {"split.num_hard_classes": recipe.split.size(num_classes), "split.method": recipe.split.method}
