"""The schedule of the extension phase: main block and cloud stay as they are and are shared by all trials."""

import dataclasses

from meanet.config import PhaseConfig, Recipe
from meanet.study import Choice, Domain, FloatRange, IntRange, Params, Space, set_fields


def training(recipe: Recipe, num_classes: int) -> Space:
    """Rate, epochs, kind of schedule, label smoothing and weight decay of extension and adaptive blocks."""
    del num_classes
    return Space("training", parameters(recipe), (default(recipe),), apply)


def parameters(recipe: Recipe) -> dict[str, Domain]:
    """Around the recipe's own values."""
    phase = recipe.extension
    return {
        "extension.learning_rate": FloatRange(phase.learning_rate / 20, phase.learning_rate * 4, log=True),
        "extension.epochs": IntRange(max(1, phase.epochs // 2), 2 * phase.epochs),
        "extension.schedule": Choice(("one_cycle", "steps")),
        "extension.label_smoothing": FloatRange(0.0, max(0.3, phase.label_smoothing)),
        "extension.weight_decay": FloatRange(0.0, max(5e-3, 4 * phase.weight_decay)),
    }


def default(recipe: Recipe) -> Params:
    """The recipe's own schedule."""
    phase = recipe.extension
    return {name: getattr(phase, name.removeprefix("extension.")) for name in parameters(recipe)}


def apply(recipe: Recipe, params: Params) -> Recipe:
    """The recipe under another schedule; the milestones of one in steps keep their share of the epochs."""
    changed = set_fields(recipe, params)
    extension = dataclasses.replace(changed.extension, milestones=_milestones(recipe.extension, changed.extension))
    return dataclasses.replace(changed, extension=extension)


def _milestones(own: PhaseConfig, asked: PhaseConfig) -> tuple[int, ...]:
    """The authors' 60, 120 and 160 of 180 where the recipe has none."""
    if asked.schedule != "steps":
        return own.milestones if asked.schedule == own.schedule else ()
    shares = [milestone / own.epochs for milestone in own.milestones] or [1 / 3, 2 / 3, 8 / 9]
    return tuple(round(share * asked.epochs) for share in shares)
