"""Named runs: each recipe is a function that returns a whole config.

The authors' schedules (MEANet's released code): SGD, momentum 0.9, weight decay 1e-4. A recipe that ends in `_fast` is
the same networks under one cycle (Smith, arXiv 1708.07120), label smoothing (Szegedy et al., arXiv 1512.00567) and
mixed precision, in a sixth of the epochs.
"""

import dataclasses
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


def _stages(*rows: tuple[int, int, int]) -> tuple[StageConfig, ...]:
    """Of (width, blocks, stride) rows."""
    return tuple(StageConfig(width=width, blocks=blocks, stride=stride) for width, blocks, stride in rows)


RESNET32_A = ModelConfig(
    main=_stages((16, 5, 1), (32, 5, 2)),
    main_pool=3,
    adaptive=_stages((16, 1, 1), (32, 1, 2)),
    extension=_stages((64, 5, 2)),
    cloud_backbone="resnet18",
)
"""ResNet-32 cut after its second stage: the main block is the first part, the extension the rest."""

RESNET32_B = ModelConfig(
    main=_stages((16, 5, 1), (32, 5, 2), (64, 5, 2)),
    adaptive=_stages((16, 1, 1), (32, 1, 2), (64, 1, 2)),
    extension=_stages((64, 4, 1)),
    cloud_backbone="resnet18",
)
"""The whole ResNet-32 as main block, the extension as added depth."""

RESNET18_B = ModelConfig(
    backbone="resnet18",
    stem="7x7",
    adaptive_stem_width=64,
    adaptive=_stages((64, 1, 1), (128, 1, 2), (256, 1, 2), (512, 1, 2)),
    extension=_stages((512, 4, 1)),
    cloud_backbone="resnet101",
    cloud_stem="7x7",
)
"""torchvision's ResNet-18 as main block."""

MOBILENETV2_B = ModelConfig(backbone="mobilenet_v2", cloud_backbone="resnet101", cloud_stem="7x7")
"""torchvision's MobileNetV2 as main block."""

CIFAR = DataConfig(source="cifar100", validation_fraction=0.1, crop_padding=4, flip=True)
IMAGENET = DataConfig(
    source="folder:imagenet/train",
    test_source="folder:imagenet/val",
    validation_fraction=0.02,
    image_size=224,
    channels=3,
    min_crop_area=0.08,
    flip=True,
)


def _steps(epochs: int, batch_size: int, rate: float, milestones: tuple[int, ...], gamma: float = 0.1) -> PhaseConfig:
    return PhaseConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate,
        nesterov=False,
        schedule="steps",
        milestones=milestones,
        gamma=gamma,
    )


def _every(name: str, data: DataConfig, model: ModelConfig, phase: PhaseConfig) -> Recipe:
    """One schedule for every phase, as the authors have it."""
    return Recipe(name=name, data=data, model=model, split=SplitConfig(), main=phase, extension=phase, cloud=phase)


def cifar100_resnet32_a() -> Recipe:
    """CIFAR-100, ResNet-32 A on the edge, ResNet-18 (3x3 stem) in the cloud; the authors' schedule."""
    return _every("cifar100_resnet32_a", CIFAR, RESNET32_A, _steps(180, 128, 0.1, (60, 120, 160), gamma=0.2))


def cifar100_resnet32_b() -> Recipe:
    """CIFAR-100, ResNet-32 B on the edge, ResNet-18 (3x3 stem) in the cloud; the authors' schedule."""
    return _every("cifar100_resnet32_b", CIFAR, RESNET32_B, _steps(180, 128, 0.1, (60, 120, 160)))


def cifar100_resnet32_b_resnet101() -> Recipe:
    """The same with a ResNet-101 (3x3 stem) in the cloud, the authors' depth."""
    return _in_cloud(cifar100_resnet32_b(), "cifar100_resnet32_b_resnet101")


def imagenet_resnet18_b() -> Recipe:
    """ImageNet, torchvision's ResNet-18 on the edge, its ResNet-101 in the cloud; the authors' schedule."""
    return _every("imagenet_resnet18_b", IMAGENET, RESNET18_B, _steps(110, 256, 0.01, (30, 60)))


def imagenet_mobilenetv2_b() -> Recipe:
    """ImageNet, torchvision's MobileNetV2 on the edge, its ResNet-101 in the cloud; the authors' schedule."""
    return _every("imagenet_mobilenetv2_b", IMAGENET, MOBILENETV2_B, _steps(180, 128, 0.01, (30, 60, 110)))


def _in_cloud(recipe: Recipe, name: str) -> Recipe:
    return dataclasses.replace(
        recipe, name=name, model=dataclasses.replace(recipe.model, cloud_backbone="resnet101", cloud_stem="3x3")
    )


def _fast(recipe: Recipe, epochs: int, batch_size: int, rate: float, weight_decay: float) -> Recipe:
    """The same networks under a modern schedule: one cycle, Nesterov momentum, label smoothing, mixed precision."""
    phase = PhaseConfig(epochs=epochs, batch_size=batch_size, learning_rate=rate, weight_decay=weight_decay)
    smooth = dataclasses.replace(phase, label_smoothing=0.1)
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_fast",
        precision="bfloat16",
        main=smooth,
        extension=smooth,
        cloud=smooth,
    )


def cifar100_resnet32_a_fast() -> Recipe:
    """`cifar100_resnet32_a` in 30 epochs a phase."""
    return _fast(cifar100_resnet32_a(), 30, 256, 0.4, 5e-4)


def cifar100_resnet32_b_fast() -> Recipe:
    """`cifar100_resnet32_b` in 30 epochs a phase."""
    return _fast(cifar100_resnet32_b(), 30, 256, 0.4, 5e-4)


def cifar100_resnet32_b_resnet101_fast() -> Recipe:
    """`cifar100_resnet32_b_resnet101` in 30 epochs a phase."""
    return _fast(cifar100_resnet32_b_resnet101(), 30, 256, 0.4, 5e-4)


def imagenet_resnet18_b_fast() -> Recipe:
    """`imagenet_resnet18_b` in 18 epochs a phase (the schedule of Leclerc et al., FFCV, arXiv 2306.12517)."""
    return _fast(imagenet_resnet18_b(), 18, 1024, 2.0, 5e-5)


def imagenet_mobilenetv2_b_fast() -> Recipe:
    """`imagenet_mobilenetv2_b` in 30 epochs a phase."""
    return _fast(imagenet_mobilenetv2_b(), 30, 512, 0.8, 4e-5)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        cifar100_resnet32_a,
        cifar100_resnet32_a_fast,
        cifar100_resnet32_b,
        cifar100_resnet32_b_fast,
        cifar100_resnet32_b_resnet101,
        cifar100_resnet32_b_resnet101_fast,
        imagenet_resnet18_b,
        imagenet_resnet18_b_fast,
        imagenet_mobilenetv2_b,
        imagenet_mobilenetv2_b_fast,
    )
}

NOMINAL = {"digits": ((1, 8, 8), 10), "cifar100": ((3, 32, 32), 100), "imagenet": ((3, 224, 224), 1000)}
"""What a recipe's networks are described for where no data is at hand: (channels, height, width) and classes."""


def nominal(name: str) -> tuple[tuple[int, int, int], int]:
    """Image shape (C, H, W) and number of classes of the data set that a recipe is named after."""
    return NOMINAL[name.split("_", maxsplit=1)[0]]


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none; the message lists those that exist.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: choose one of {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
