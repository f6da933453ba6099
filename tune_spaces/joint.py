"""Everything at once: class split, shapes and schedule."""

from meanet.config import Recipe
from meanet.study import Params, Space, set_fields
from tune_spaces import blocks, class_split, training


def joint(recipe: Recipe, num_classes: int) -> Space:
    """The parameters of `class_split`, `blocks` and `training` together."""
    return Space(
        "joint",
        {**class_split.parameters(num_classes), **blocks.parameters(recipe), **training.parameters(recipe)},
        ({**class_split.default(recipe, num_classes), **blocks.default(recipe), **training.default(recipe)},),
        apply,
    )


def apply(recipe: Recipe, params: Params) -> Recipe:
    """One after the other: they change different parts of the recipe."""
    scheduled = training.apply(recipe, _part(params, "extension."))
    shaped = blocks.apply(scheduled, _part(params, "blocks.", "model."))
    return set_fields(shaped, _part(params, "split."))


def _part(params: Params, *prefixes: str) -> Params:
    return {name: value for name, value in params.items() if name.startswith(prefixes)}
