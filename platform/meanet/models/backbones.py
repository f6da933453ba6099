"""torchvision's networks, and the parts that MEANet makes of them (MEANet's released code, the ImageNet variants).

torchvision is imported where it is needed: its import makes directories, and small recipes do without it.

Shape letters: B batch, C channels, H height, W width.
"""

from collections import OrderedDict
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from meanet.config import Join, Stem
from meanet.errors import UserError

MOBILENET_CHANNELS = 320
"""After MobileNetV2's last inverted residual, where the extension block taps it."""
_MOBILENET_ROWS = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
"""(channels, repeats, stride): Sandler et al., arXiv 1801.04381, table 2."""

Parts = tuple[nn.Sequential, nn.Sequential]
"""Features and exit."""


def resnet_parts(name: str, in_channels: int, num_classes: int, stem: Stem) -> Parts:
    """torchvision's ResNet-18 or -101; with the 3x3 stem it has no max-pool, the usual form for 32x32 images."""
    from torchvision.models import resnet18, resnet101

    net = {"resnet18": resnet18, "resnet101": resnet101}[name](num_classes=num_classes)
    if stem == "3x3":
        net.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    elif in_channels != 3:
        net.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    names = ["conv1", "bn1", "relu", *(["maxpool"] if stem == "7x7" else []), *(f"layer{i}" for i in range(1, 5))]
    features = nn.Sequential(OrderedDict((part, getattr(net, part)) for part in names))
    return features, nn.Sequential(OrderedDict(avgpool=net.avgpool, flatten=nn.Flatten(), fc=net.fc))


def mobilenet_parts(in_channels: int, num_classes: int) -> Parts:
    """torchvision's MobileNetV2, cut after its last inverted residual (320 channels)."""
    from torchvision.models import mobilenet_v2
    from torchvision.ops.misc import Conv2dNormActivation

    net = mobilenet_v2(num_classes=num_classes)
    if in_channels != 3:
        net.features[0] = Conv2dNormActivation(in_channels, 32, stride=2, activation_layer=nn.ReLU6)
    head = OrderedDict(
        last=net.features[-1], pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classifier=net.classifier
    )
    return net.features[:-1], nn.Sequential(head)


def mobilenet_adaptive(in_channels: int) -> nn.Sequential:
    """MobileNetV2's layout with expansion 1 everywhere and no last 1x1: (B, C, H, W) -> (B, 320, H / 32, W / 32)."""
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.ops.misc import Conv2dNormActivation

    parts: list[nn.Module] = [Conv2dNormActivation(in_channels, 32, stride=2, activation_layer=nn.ReLU6)]
    width = 32
    for channels, repeats, stride in _MOBILENET_ROWS:
        for number in range(repeats):
            parts.append(InvertedResidual(width, channels, stride if number == 0 else 1, expand_ratio=1))
            width = channels
    return nn.Sequential(*parts)


def mobilenet_extension(join: Join, num_hard: int) -> nn.Sequential:
    """Two inverted residuals, a 1x1 convolution to 1,280 and the exit: (B, 640 or 320, h, w) -> (B, H)."""
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.ops.misc import Conv2dNormActivation

    joined = MOBILENET_CHANNELS * (2 if join == "concat" else 1)
    return nn.Sequential(
        InvertedResidual(joined, MOBILENET_CHANNELS, 1, expand_ratio=1),
        InvertedResidual(MOBILENET_CHANNELS, MOBILENET_CHANNELS, 1, expand_ratio=3),
        Conv2dNormActivation(MOBILENET_CHANNELS, 1280, kernel_size=1, activation_layer=nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1280, num_hard),
    )


def _published(name: str) -> str:
    """Where torchvision's ImageNet weights for a network are published."""
    from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, ResNet101_Weights

    weights = {
        "resnet18": ResNet18_Weights.IMAGENET1K_V1,
        "resnet101": ResNet101_Weights.IMAGENET1K_V2,
        "mobilenet_v2": MobileNet_V2_Weights.IMAGENET1K_V2,
    }
    url: str = weights[name].url
    return url


def load_pretrained(name: str, features: nn.Sequential, exit_: nn.Sequential) -> None:
    """Take torchvision's ImageNet weights; an exit of another number of classes keeps its fresh ones.

    They come from torch's hub cache, or are downloaded into it (TORCH_HOME moves it).

    Raises:
        UserError: they are not there and cannot be downloaded, or do not fit.
    """
    url = _published(name)
    try:
        state = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        _take(features, exit_, state)
    except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(
            f"torchvision's weights for {name} cannot be used ({str(error).splitlines()[0]}): put {url.split('/')[-1]} "
            f"into {torch.hub.get_dir()}/checkpoints, or train without pretrained weights"
        ) from error


def _take(features: nn.Sequential, exit_: nn.Sequential, published: dict[str, Tensor]) -> None:
    """Spread torchvision's state dict over the two parts: what we cut off is called `exit.` there by other names."""
    prefix = "features." if any(key.startswith("features.") for key in published) else ""
    features.load_state_dict({key: published[prefix + key] for key in features.state_dict()})
    state = exit_.state_dict()
    for key, fresh in state.items():
        source = published[key.replace("last.", "features.18.")]
        if source.shape == fresh.shape:
            state[key] = source
    exit_.load_state_dict(state)
