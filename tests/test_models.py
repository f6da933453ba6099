"""The networks: shapes, costs counted by hand, and that the main block gets no gradient."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from meanet.config import StageConfig
from meanet.errors import UserError
from meanet.models import CloudNet, MEANet, count_parameters, macs_of
from meanet.recipes import digits

SHAPE = (1, 8, 8)
B, C, H = 3, 10, 5


def networks() -> tuple[MEANet, CloudNet]:
    return MEANet(digits().model, SHAPE, C, H), CloudNet(digits().model, SHAPE, C)


def test_shapes() -> None:
    meanet, cloud = networks()
    images = torch.zeros(B, *SHAPE)
    features, logits = meanet.main(images)
    assert features.shape == (B, *meanet.main.feature_shape) == (B, 12, 4, 4)
    assert logits.shape == cloud(images).shape == (B, C)
    assert meanet.path(images, features).shape == (B, H)
    assert meanet.path.adaptive(images).shape == features.shape


def conv(cin: int, cout: int, side: int, kernel: int = 3) -> int:
    """MACs of a convolution whose output is side x side."""
    return cin * cout * kernel**2 * side**2


def block(cin: int, cout: int, side: int, *, shortcut: bool) -> int:
    return conv(cin, cout, side) + conv(cout, cout, side) + (conv(cin, cout, side, 1) if shortcut else 0)


def test_macs_equal_a_count_by_hand() -> None:
    macs = macs_of(*networks(), SHAPE)
    body = conv(1, 12, 8) + block(12, 12, 4, shortcut=True)
    assert macs.main == body + 12 * 2 * 2 * C
    assert macs.adaptive == body
    assert macs.extension == block(24, 32, 4, shortcut=True) + block(32, 32, 4, shortcut=False) + 32 * H
    cloud = conv(1, 32, 8) + 2 * block(32, 32, 8, shortcut=False)
    cloud += block(32, 64, 4, shortcut=True) + block(64, 64, 4, shortcut=False)
    cloud += block(64, 128, 2, shortcut=True) + block(128, 128, 2, shortcut=False)
    assert macs.cloud == cloud + 128 * C


def test_sum_needs_a_narrower_extension_than_concat() -> None:
    concat, _ = networks()
    sum_ = MEANet(dataclasses.replace(digits().model, join="sum"), SHAPE, C, H)
    features = torch.zeros(B, *sum_.main.feature_shape)
    assert sum_.path(torch.zeros(B, *SHAPE), features).shape == (B, H)
    assert count_parameters(concat.path) - count_parameters(sum_.path) == 12 * 32 * 9 + 12 * 32


def test_no_gradient_reaches_the_main_block() -> None:
    meanet, _ = networks()
    images = torch.randn(B, *SHAPE)
    features, _ = meanet.main(images)
    F.cross_entropy(meanet.path(images, features), torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in meanet.main.parameters())
    assert all(parameter.grad is not None for parameter in meanet.path.parameters())


def test_blocks_that_do_not_fit_are_named() -> None:
    model = digits().model
    with pytest.raises(UserError, match=r"adaptive block yields \(12, 8, 8\).*\(12, 4, 4\)"):
        MEANet(dataclasses.replace(model, adaptive=(StageConfig(width=12, blocks=1),)), SHAPE, C, H)
    with pytest.raises(UserError, match=r"main_pool is 9.*4x4"):
        MEANet(dataclasses.replace(model, main_pool=9), SHAPE, C, H)
