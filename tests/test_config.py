"""Recipes: validated, and whole after a journey through JSON."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from meanet.config import DataConfig, ModelConfig, OperatingPointConfig, PhaseConfig, Recipe, StageConfig
from meanet.errors import UserError
from meanet.recipes import RECIPES, digits, recipe

STAGE = (StageConfig(width=4, blocks=1),)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: DataConfig(validation_fraction=0.0), "validation_fraction is 0.0"),
        (lambda: DataConfig(test_fraction=1.5), "test_fraction is 1.5"),
        (lambda: DataConfig(validation_fraction=0.5, test_fraction=0.5), "take 1.00"),
        (lambda: DataConfig(crop_padding=-1), "crop_padding is -1"),
        (lambda: DataConfig(min_crop_area=0.0), "min_crop_area is 0.0"),
        (lambda: DataConfig(max_bad_fraction=1.5), "max_bad_fraction is 1.5"),
        (lambda: DataConfig(image_size=0), "image_size is 0"),
        (lambda: PhaseConfig(max_steps=0), "max_steps is 0"),
        (lambda: StageConfig(width=0, blocks=1), "width 0"),
        (lambda: ModelConfig(main=STAGE, adaptive=STAGE, extension=STAGE), "model.cloud has no stages"),
        (lambda: PhaseConfig(epochs=0), "epochs is 0"),
        (lambda: PhaseConfig(batch_size=0), "batch_size is 0"),
        (lambda: PhaseConfig(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: PhaseConfig(momentum=1.0), "momentum is 1.0"),
        (lambda: PhaseConfig(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: OperatingPointConfig(max_accuracy_loss_vs_cloud=5.0), "is 5.0.*half a point"),
        (lambda: OperatingPointConfig(confidence=0.3), "confidence is 0.3"),
        (lambda: dataclasses.replace(digits(), seed=-1), "seed is -1"),
    ],
)
def test_senseless_values_are_named(build: Callable[[], Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        build()


def test_adaptive_block_must_end_as_wide_as_the_main_block() -> None:
    with pytest.raises(UserError, match="8 channels and the main block with 4"):
        ModelConfig(main=STAGE, adaptive=(StageConfig(width=8, blocks=1),), extension=STAGE, cloud=STAGE)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name: str) -> None:
    there = json.dumps(recipe(name).to_dict())
    assert Recipe.from_dict(json.loads(there)) == recipe(name)
    assert recipe(name).name == name


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'cifar1000'.*digits"):
        recipe("cifar1000")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda plain: plain.pop("model"), "model"),
        (lambda plain: plain["main"].update(epochs="many"), r"main.epochs"),
        (lambda plain: plain["main"].update(epochs=0), "epochs is 0"),
        (lambda plain: plain["model"].update(join="knot"), "model.join"),
    ],
)
def test_damaged_recipe_names_the_field(change: Callable[[dict[str, Any]], Any], names: str) -> None:
    plain = digits().to_dict()
    change(plain)
    with pytest.raises(UserError, match=names):
        Recipe.from_dict(plain)


def test_digest_changes_with_any_field() -> None:
    base = digits()
    others = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, main=dataclasses.replace(base.main, epochs=99)),
        dataclasses.replace(base, energy=dataclasses.replace(base.energy, link="lte")),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 4
    assert digits().digest() == base.digest()
