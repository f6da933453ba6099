"""What a study may vary: every configuration is a valid recipe, and domains say what is wrong with them."""

import dataclasses

import numpy as np
import pytest
import torch

from meanet.errors import UserError
from meanet.phases import phase_keys
from meanet.recipes import RECIPES, digits, nominal
from meanet.study import (
    Choice,
    FloatRange,
    IntRange,
    Params,
    Space,
    set_fields,
)
from meanet.training import build_networks
from tune_spaces.blocks import blocks
from tune_spaces.class_split import class_split
from tune_spaces.joint import joint
from tune_spaces.training import training

SPACES = (class_split, blocks, training, joint)


def drawn(space: Space, generator: np.random.Generator) -> Params:
    """Any configuration of a space."""
    params: Params = {}
    for name, domain in space.parameters.items():
        if isinstance(domain, Choice):
            params[name] = domain.values[int(generator.integers(len(domain.values)))]
        elif isinstance(domain, IntRange):
            params[name] = int(generator.integers(domain.low, domain.high + 1))
        else:
            params[name] = float(generator.uniform(domain.low, domain.high))
    return params


@pytest.mark.parametrize("recipe_name", ["digits", "cifar100_resnet32_a", "cifar100_resnet32_b_fast"])
@pytest.mark.parametrize("make", SPACES)
def test_every_configuration_builds_networks(make, recipe_name: str) -> None:  # type: ignore[no-untyped-def]
    recipe, (shape, classes) = RECIPES[recipe_name](), nominal(recipe_name)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, cloud_backbone="residual", cloud=recipe.model.main)
    )
    space, generator = make(recipe, classes), np.random.default_rng(0)
    for _ in range(12):
        changed = space.apply(recipe, drawn(space, generator))
        networks = build_networks(changed, shape, classes)
        images = torch.zeros(2, *shape)
        with torch.inference_mode():
            features, logits = networks.meanet.eval().main(images)
            assert logits.shape == (2, classes)
            assert networks.meanet.path(images, features).shape == (2, changed.split.size(classes))


@pytest.mark.parametrize("make", SPACES)
@pytest.mark.parametrize("recipe_name", sorted(RECIPES))
def test_default_is_the_recipe(make, recipe_name: str) -> None:  # type: ignore[no-untyped-def]
    """The first configuration trains what the recipe trains: it shares every phase with it."""
    recipe, classes = RECIPES[recipe_name](), nominal(recipe_name)[1]
    space = make(recipe, classes)
    assert phase_keys(space.apply(recipe, space.first[0]), "d", classes) == phase_keys(recipe, "d", classes)


def test_mobilenet_varies_its_join_alone_and_resnet18_keeps_its_main_block() -> None:
    mobile = RECIPES["imagenet_mobilenetv2_b"]()
    assert set(blocks(mobile, 1000).parameters) == {"model.join"}
    assert blocks(mobile, 1000).apply(mobile, {"model.join": "sum"}).model.join == "sum"
    with pytest.raises(UserError, match=r"blocks.main_blocks cannot vary for a mobilenet_v2 main block"):
        blocks(mobile, 1000).apply(mobile, {"model.join": "sum", "blocks.main_blocks": 3})
    resnet = RECIPES["imagenet_resnet18_b"]()
    space = blocks(resnet, 1000)
    assert "blocks.main_blocks" not in space.parameters
    widened = space.apply(resnet, {**space.first[0], "blocks.adaptive_width": 0.5})
    assert [stage.width for stage in widened.model.adaptive] == [32, 64, 128, 512], "the last meets the main features"


def test_cut_main_block_hands_its_strides_on() -> None:
    """ResNet-32 B cut after its second stage: what is read of its features has the size that it had."""
    recipe = RECIPES["cifar100_resnet32_b"]()
    space = blocks(recipe, 100)
    model = space.apply(recipe, {**space.first[0], "blocks.main_blocks": 7}).model
    assert [(s.width, s.blocks, s.stride) for s in model.main] == [(16, 5, 1), (32, 2, 2)]
    assert [(s.width, s.stride) for s in model.adaptive] == [(16, 1), (32, 2)]
    assert (model.main_pool, model.extension[0].stride) == (16, 2)
    longer = space.apply(recipe, {**space.first[0], "blocks.main_blocks": 17}).model
    assert longer.main[-1].blocks == 7


def test_milestones_keep_their_share_of_the_epochs() -> None:
    recipe = RECIPES["cifar100_resnet32_b"]()
    space = training(recipe, 100)
    halved = space.apply(recipe, {**space.first[0], "extension.epochs": 90})
    assert halved.extension.milestones == (30, 60, 80)
    assert halved.main == recipe.main
    cycle = space.apply(recipe, {**space.first[0], "extension.schedule": "one_cycle"})
    assert cycle.extension.milestones == ()
    fast = RECIPES["cifar100_resnet32_b_fast"]()
    steps = training(fast, 100).apply(fast, {**training(fast, 100).first[0], "extension.schedule": "steps"})
    assert steps.extension.milestones == (10, 20, 27)


def test_domains_name_what_is_wrong() -> None:
    with pytest.raises(UserError, match="a range from 3 to 2 holds no number"):
        IntRange(3, 2)
    with pytest.raises(UserError, match=r"a range from 0.0 to 1.0: give it low < high, and above 0"):
        FloatRange(0.0, 1.0, log=True)
    with pytest.raises(UserError, match="needs one value or more"):
        Choice(())
    with pytest.raises(AssertionError, match=r"\['a'\]"):
        Space("s", {"a": IntRange(1, 2)}, ({"a": 3},))


def test_set_fields_changes_what_is_named() -> None:
    changed = set_fields(digits(), {"extension.epochs": 3, "model.join": "sum", "extension.learning_rate": 0.5})
    assert (changed.extension.epochs, changed.extension.learning_rate, changed.model.join) == (3, 0.5, "sum")
    assert (changed.main, changed.extension.batch_size) == (digits().main, digits().extension.batch_size)
