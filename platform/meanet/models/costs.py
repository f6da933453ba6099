"""MACs, parameters, bytes moved and training memory of each block.

MACs are counted by PyTorch's own flop counter (two flops a MAC; no BN, no ReLU), memory by what autograd keeps. Bytes
moved are those of fp32 at batch 1: weights read once; of each convolution and linear layer, the input read and the
output written, with all that stands between two of them (BN, ReLU, sums) taken as fused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meanet.config import Precision
from meanet.energy import BytesMoved, Macs
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


@torch.no_grad()
def count_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that one call of `module` moves, as above."""
    activations = 0

    def count(_layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal activations
        activations += given[0].numel() + made.numel()

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = module.training
    module.eval()(*inputs)
    module.train(was_training)
    for hook in hooks:
        hook.remove()
    return 4 * (activations + sum(parameter.numel() for parameter in module.parameters()))


def joined_shape(meanet: MEANet) -> tuple[int, int, int]:
    """(C, H, W) of what the extension block gets: main and adaptive features, joined."""
    channels, height, width = meanet.main.feature_shape
    return channels * (2 if meanet.path.join == "concat" else 1), height, width


def bytes_moved_of(meanet: MEANet, image_shape: tuple[int, int, int]) -> BytesMoved:
    """Bytes moved for one (C, H, W) image in each of the edge's blocks."""
    image = torch.zeros((1, *image_shape))
    return BytesMoved(
        main=count_bytes(meanet.main, image),
        adaptive=count_bytes(meanet.path.adaptive, image),
        extension=count_bytes(meanet.path.extension, torch.zeros((1, *joined_shape(meanet)))),
    )


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


@dataclass(frozen=True)
class BlockCost:
    """What one block takes."""

    macs: int
    """Multiply-accumulates an image."""
    params: int
    """Trainable numbers."""
    moved_bytes: int
    """Between memory and arithmetic, an image at batch 1, fp32."""
    activation_bytes: int
    """Kept for the backward pass, an image."""
    training_bytes: int
    """At a batch size: activations, weights, gradients and momentum (4 bytes each)."""


def block_costs(
    meanet: MEANet, cloud: CloudNet, image_shape: tuple[int, int, int], precision: Precision, batch_size: int
) -> dict[str, BlockCost]:
    """Of main, adaptive, extension and cloud, by name; training memory at `batch_size` images."""
    macs = macs_of(meanet, cloud, image_shape)
    blocks: dict[str, tuple[nn.Module, tuple[int, int, int], int]] = {
        "main": (meanet.main, image_shape, macs.main),
        "adaptive": (meanet.path.adaptive, image_shape, macs.adaptive),
        "extension": (meanet.path.extension, joined_shape(meanet), macs.extension),
        "cloud": (cloud, image_shape, macs.cloud),
    }
    return {
        name: _cost(module, shape, block_macs, precision, batch_size)
        for name, (module, shape, block_macs) in blocks.items()
    }


def _cost(
    module: nn.Module, shape: tuple[int, int, int], macs: int, precision: Precision, batch_size: int
) -> BlockCost:
    small, large = (_saved_bytes(module, torch.zeros((size, *shape)), precision) for size in (2, 4))
    each = (large - small) // 2
    fixed = small - 2 * each  # weights in the lower precision
    params = count_parameters(module)
    moved = count_bytes(module, torch.zeros((1, *shape)))
    return BlockCost(macs, params, moved, each, batch_size * each + fixed + 3 * 4 * params)


def _saved_bytes(module: nn.Module, inputs: Tensor, precision: Precision) -> int:
    """Bytes that autograd keeps of one forward pass, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    was_training = module.training
    module.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        out = module(inputs.requires_grad_())
    del out
    module.train(was_training)
    for name, buffer in module.named_buffers():
        buffer.copy_(state[name])
    return sum(kept.values())
