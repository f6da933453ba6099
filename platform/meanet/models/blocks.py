"""What residual networks are made of (He et al. 2016, arXiv 1512.03385).

Shape letters: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meanet.config import StageConfig, Stem


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def stem(in_channels: int, width: int, kind: Stem = "3x3") -> nn.Sequential:
    """(B, C, H, W) -> (B, width, H, W) by a 3x3 convolution (CIFAR), or (B, width, H / 4, W / 4) (ImageNet)."""
    if kind == "3x3":
        return nn.Sequential(conv3x3(in_channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    wide = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
    return nn.Sequential(wide, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


def stages(in_channels: int, configs: Sequence[StageConfig]) -> nn.Sequential:
    """Rows of basic blocks, one a stage; the first block of a stage strides."""
    blocks: list[nn.Module] = []
    for config in configs:
        for number in range(config.blocks):
            blocks.append(BasicBlock(in_channels, config.width, config.stride if number == 0 else 1))
            in_channels = config.width
    return nn.Sequential(*blocks)


def initialise(module: nn.Module) -> None:
    """He initialisation of convolutions (fan out, ReLU), as torchvision's ResNet does."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def output_shape(module: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The (C, H, W) that a module makes of a (C, H, W)."""
    was_training = module.training
    out = module.eval()(torch.zeros((1, *shape)))
    module.train(was_training)
    _, channels, height, width = out.shape
    return channels, height, width
