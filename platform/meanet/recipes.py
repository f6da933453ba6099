"""Named runs: each recipe is a function that returns a whole config."""

from collections.abc import Callable

from meanet.config import DataConfig, ModelConfig, PhaseConfig, Recipe, SplitConfig, StageConfig
from meanet.errors import UserError


def digits() -> Recipe:
    """scikit-learn's digits (1,797 scans, 8x8, 10 classes): the whole life of a model in minutes on a laptop.

    Widths, epochs and the share of validation images were chosen on validation alone, with the operating point
    cross-fitted in five folds, over seeds 20 to 27.
    """
    return Recipe(
        name="digits",
        data=DataConfig(source="digits", validation_fraction=0.34, test_fraction=0.26, crop_padding=1),
        model=ModelConfig(
            stem_width=12,
            main=(StageConfig(width=12, blocks=1, stride=2),),
            main_pool=2,
            adaptive_stem_width=12,
            adaptive=(StageConfig(width=12, blocks=1, stride=2),),
            extension=(StageConfig(width=32, blocks=2),),
            cloud_stem_width=32,
            cloud=(
                StageConfig(width=32, blocks=2),
                StageConfig(width=64, blocks=2, stride=2),
                StageConfig(width=128, blocks=2, stride=2),
            ),
        ),
        split=SplitConfig(num_hard_classes=5),
        main=PhaseConfig(epochs=24, batch_size=64, learning_rate=0.1),
        extension=PhaseConfig(epochs=40, batch_size=64, learning_rate=0.1),
        cloud=PhaseConfig(epochs=20, batch_size=64, learning_rate=0.1, label_smoothing=0.1),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {recipe.__name__: recipe for recipe in (digits,)}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none; the message lists those that exist.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: choose one of {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
