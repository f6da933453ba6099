"""The cloud's network: a residual network of basic blocks over all classes."""

from torch import Tensor, nn

from meanet.config import ModelConfig
from meanet.models.blocks import initialise, stages, stem


class CloudNet(nn.Module):
    """A deep classifier that gets the raw image: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            stem(image_shape[0], config.cloud_stem_width), stages(config.cloud_stem_width, config.cloud)
        )
        self.exit = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(config.cloud[-1].width, num_classes))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes) logits."""
        logits: Tensor = self.exit(self.features(images))
        return logits
