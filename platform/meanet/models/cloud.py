"""The cloud's network: residual, over all classes."""

from torch import Tensor, nn

from meanet.config import ModelConfig
from meanet.models.backbones import resnet_parts
from meanet.models.blocks import initialise, stages, stem


class CloudNet(nn.Module):
    """A deep classifier that gets the raw image: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, width = image_shape[0], config.cloud_stem_width
        if config.cloud_backbone == "residual":
            self.features = nn.Sequential(stem(channels, width, config.cloud_stem), stages(width, config.cloud))
            linear = nn.Linear(config.cloud[-1].width, num_classes)
            self.exit = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
            initialise(self)
        else:
            self.features, self.exit = resnet_parts(config.cloud_backbone, channels, num_classes, config.cloud_stem)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes) logits."""
        logits: Tensor = self.exit(self.features(images))
        return logits
