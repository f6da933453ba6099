"""The edge's three blocks (MEANet, section III).

Shape letters: B batch, C classes, H hard classes, F channels of the main block's features, h x w their size.

    images --+--> main features (B, F, h, w) --+--> main exit (B, C)
             |                                 | detached
             +--> adaptive (B, F, h, w) -------+--> extension --> extension exit (B, H)
"""

import torch
from torch import Tensor, nn

from meanet.config import ModelConfig
from meanet.errors import UserError
from meanet.models.backbones import Parts, mobilenet_adaptive, mobilenet_extension, mobilenet_parts, resnet_parts
from meanet.models.blocks import initialise, output_shape, stages, stem

Shape = tuple[int, int, int]


class MainBlock(nn.Module):
    """An ordinary classifier over all classes, whose features the extension block reads too."""

    def __init__(self, config: ModelConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        if config.backbone == "residual":
            self.features, self.exit = _residual_parts(config, image_shape, num_classes)
        elif config.backbone == "mobilenet_v2":
            self.features, self.exit = mobilenet_parts(image_shape[0], num_classes)
        else:
            self.features, self.exit = resnet_parts(config.backbone, image_shape[0], num_classes, config.stem)
        self.feature_shape = output_shape(self.features, image_shape)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> features (B, F, h, w) and logits (B, C)."""
        features = self.features(images)
        return features, self.exit(features)


def _residual_parts(config: ModelConfig, image_shape: Shape, num_classes: int) -> Parts:
    features = nn.Sequential(
        stem(image_shape[0], config.stem_width, config.stem), stages(config.stem_width, config.main)
    )
    channels, height, width = output_shape(features, image_shape)
    pool = config.main_pool
    if pool > min(height, width):
        raise UserError(f"model.main_pool is {pool} but the main block's feature map is {height}x{width}: lower it")
    flat = channels * (height // pool) * (width // pool)
    exit_ = nn.Sequential(nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(flat, num_classes))
    initialise(features)
    return features, exit_


class ExtensionPath(nn.Module):
    """Adaptive and extension blocks: the raw image and the main features -> the hard classes' logits."""

    def __init__(self, config: ModelConfig, image_shape: Shape, feature_shape: Shape, num_hard: int) -> None:
        super().__init__()
        self.join = config.join
        if config.backbone == "mobilenet_v2":
            self.adaptive = mobilenet_adaptive(image_shape[0])
        else:
            width = config.adaptive_stem_width
            self.adaptive = nn.Sequential(stem(image_shape[0], width, config.stem), stages(width, config.adaptive))
        adaptive_shape = output_shape(self.adaptive, image_shape)
        if adaptive_shape != feature_shape:
            raise UserError(
                f"the adaptive block yields {adaptive_shape} and the main block {feature_shape} (channels, height, "
                "width): give model.adaptive the same total stride and last width as model.main"
            )
        if config.backbone == "mobilenet_v2":
            self.extension = mobilenet_extension(config.join, num_hard)
        else:
            joined = feature_shape[0] * (2 if config.join == "concat" else 1)
            self.extension = nn.Sequential(
                stages(joined, config.extension),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(config.extension[-1].width, num_hard),
            )
        initialise(self)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """Images and main features (B, F, h, w) -> logits (B, H). No gradient reaches the main block."""
        adapted = self.adaptive(images)
        features = features.detach()
        joined = torch.cat((features, adapted), dim=1) if self.join == "concat" else features + adapted
        logits: Tensor = self.extension(joined)
        return logits


class MEANet(nn.Module):
    """What runs on the edge device."""

    def __init__(self, config: ModelConfig, image_shape: Shape, num_classes: int, num_hard: int) -> None:
        super().__init__()
        self.main = MainBlock(config, image_shape, num_classes)
        self.path = ExtensionPath(config, image_shape, self.main.feature_shape, num_hard)
