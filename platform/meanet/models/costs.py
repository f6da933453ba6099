"""MACs and parameters of each block, counted by PyTorch's own flop counter (two flops a MAC; no BN, no ReLU)."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meanet.energy import Macs
from meanet.models.cloud import CloudNet
from meanet.models.meanet import MEANet


@torch.no_grad()
def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one call of `module`."""
    was_training = module.training
    module.eval()
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    module.train(was_training)
    return int(counter.get_total_flops()) // 2


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


def macs_of(meanet: MEANet, cloud: CloudNet, image_shape: tuple[int, int, int]) -> Macs:
    """MACs of one (C, H, W) image in each block."""
    image = torch.zeros((1, *image_shape))
    features = torch.zeros((1, *meanet.main.feature_shape))
    adaptive = count_macs(meanet.path.adaptive, image)
    return Macs(
        main=count_macs(meanet.main, image),
        adaptive=adaptive,
        extension=count_macs(meanet.path, image, features) - adaptive,
        cloud=count_macs(cloud, image),
    )
