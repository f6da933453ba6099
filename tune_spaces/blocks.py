"""The shape of the edge's networks: where the main block ends, how wide and deep extension and adaptive blocks are.

A trial that moves the main block's end trains that main block, once for all trials that share it.
"""

import dataclasses
import math

from meanet.config import ModelConfig, Recipe, StageConfig
from meanet.errors import UserError
from meanet.study import Choice, Domain, IntRange, Params, Space

_FACTORS = Choice((0.5, 1.0, 1.5))
_MORE_BLOCKS = 2
"""How many blocks a main block may have beyond the recipe's, of its last stage's width."""
_MIN_WIDTH = 4

Stages = tuple[StageConfig, ...]


def blocks(recipe: Recipe, num_classes: int) -> Space:
    """Main block's end, width and depth of the others, and how they are joined; what the backbone allows of it."""
    del num_classes
    return Space("blocks", parameters(recipe), (default(recipe),), apply)


def parameters(recipe: Recipe) -> dict[str, Domain]:
    """What may vary: of MobileNetV2 the join alone, of torchvision's ResNet all but the main block's end."""
    found: dict[str, Domain] = {"model.join": Choice(("concat", "sum"))}
    if recipe.model.extension:
        found |= {
            "blocks.extension_width": _FACTORS,
            "blocks.extension_depth": _FACTORS,
            "blocks.adaptive_width": _FACTORS,
            "blocks.adaptive_depth": Choice((1, 2)),
        }
    if _can_move_the_end(recipe.model):
        found["blocks.main_blocks"] = IntRange(1, _count(recipe.model.main) + _MORE_BLOCKS)
    return found


def default(recipe: Recipe) -> Params:
    """The recipe's own shape."""
    own: Params = {
        "model.join": recipe.model.join,
        "blocks.extension_width": 1.0,
        "blocks.extension_depth": 1.0,
        "blocks.adaptive_width": 1.0,
        "blocks.adaptive_depth": 1,
        "blocks.main_blocks": _count(recipe.model.main),
    }
    return {name: own[name] for name in parameters(recipe)}


def apply(recipe: Recipe, params: Params) -> Recipe:
    """The recipe in another shape: the adaptive block follows the main one, pooling and strides keep their reach.

    Raises:
        UserError: a parameter that this recipe's backbone does not have.
    """
    known = parameters(recipe)
    for name in params:
        if name not in known:
            raise UserError(f"{name} cannot vary for a {recipe.model.backbone} main block: choose from {sorted(known)}")
    model = dataclasses.replace(recipe.model, join=params["model.join"])  # type: ignore[arg-type]
    if "blocks.main_blocks" in params:
        model = _end_after(model, int(params["blocks.main_blocks"]))
    if "blocks.extension_width" in params:
        model = _scale(model, params)
    return dataclasses.replace(recipe, model=model)


def _can_move_the_end(model: ModelConfig) -> bool:
    """Whether the adaptive block has the main one's stages, so that both can be cut alike."""
    return model.backbone == "residual" and [s.stride for s in model.main] == [s.stride for s in model.adaptive]


def _count(stages: Stages) -> int:
    return sum(stage.blocks for stage in stages)


def _end_after(model: ModelConfig, count: int) -> ModelConfig:
    """The main block with so many basic blocks; one change keeps the shape of all that reads its features.

    Where a stage goes, its stride goes into the pooling of the main exit and into the extension's first block.
    """
    kept: list[StageConfig] = []
    left = count
    for stage in model.main:
        if left > 0:
            kept.append(dataclasses.replace(stage, blocks=min(stage.blocks, left)))
        left -= stage.blocks
    if left > 0:
        kept[-1] = dataclasses.replace(kept[-1], blocks=kept[-1].blocks + left)
    lost = math.prod(stage.stride for stage in model.main[len(kept) :])
    adaptive = list(model.adaptive[: len(kept)])
    adaptive[-1] = dataclasses.replace(adaptive[-1], width=kept[-1].width)
    first, *others = model.extension
    first = dataclasses.replace(first, stride=first.stride * lost)
    return dataclasses.replace(
        model,
        main=tuple(kept),
        main_pool=model.main_pool * lost,
        adaptive=tuple(adaptive),
        extension=(first, *others),
    )


def _scale(model: ModelConfig, params: Params) -> ModelConfig:
    wide, deep = float(params["blocks.extension_width"]), float(params["blocks.extension_depth"])
    thin, times = float(params["blocks.adaptive_width"]), int(params["blocks.adaptive_depth"])
    extension = tuple(
        dataclasses.replace(stage, width=_times(stage.width, wide), blocks=max(1, round(stage.blocks * deep)))
        for stage in model.extension
    )
    last = len(model.adaptive) - 1
    adaptive = tuple(
        dataclasses.replace(
            stage,
            width=stage.width if number == last else _times(stage.width, thin),  # the last meets the main features
            blocks=stage.blocks * times,
        )
        for number, stage in enumerate(model.adaptive)
    )
    stem = _times(model.adaptive_stem_width, thin)
    return dataclasses.replace(model, extension=extension, adaptive=adaptive, adaptive_stem_width=stem)


def _times(width: int, factor: float) -> int:
    return max(_MIN_WIDTH, round(width * factor)) if factor != 1.0 else width
