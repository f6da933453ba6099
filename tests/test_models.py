"""The networks: shapes, costs counted by hand, and that the main block gets no gradient."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from meanet.config import ModelConfig, StageConfig
from meanet.errors import UserError
from meanet.models import CloudNet, MEANet, count_macs, count_parameters, macs_of
from meanet.models.backbones import load_pretrained
from meanet.models.costs import block_costs
from meanet.recipes import RECIPES, digits, nominal, recipe

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


PUBLISHED = {
    "cifar100_resnet32_a": ((46.66, 0.193), (8.83, 0.01966), (22.55, 0.357), (23.86, 0.377)),
    "cifar100_resnet32_b": ((69.13, 0.473), (12.50, 0.077), (18.88, 0.299), (21.76, 0.344)),
    "imagenet_resnet18_b": ((1814.1, 11.690), (888.7, 4.906), (925.1, 19.139), (1066.4, 22.024)),
    "imagenet_mobilenetv2_b": ((300.8, 3.505), (42.3, 0.178), (56.4, 1.787), (61.6, 1.893)),
}
"""Millions of MACs and parameters of main, adaptive, extension (sum) and extension (concat), derived from the layers of
the authors' repository."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_and_parameters_equal_the_papers_networks(name: str) -> None:
    shape, num_classes = nominal(name)
    image = torch.zeros(1, *shape)
    for join, column in (("sum", 2), ("concat", 3)):
        config = dataclasses.replace(recipe(name).model, join=join)  # type: ignore[arg-type]
        meanet = MEANet(config, shape, num_classes, num_classes // 2)
        adaptive = count_macs(meanet.path.adaptive, image)
        features = torch.zeros(1, *meanet.main.feature_shape)
        ours = [
            (count_macs(meanet.main, image), count_parameters(meanet.main)),
            (adaptive, count_parameters(meanet.path.adaptive)),
            (count_macs(meanet.path, image, features) - adaptive, count_parameters(meanet.path.extension)),
        ]
        theirs = [*PUBLISHED[name][:2], PUBLISHED[name][column]]
        for (macs, params), (published_macs, published_params) in zip(ours, theirs, strict=True):
            assert macs / 1e6 == pytest.approx(published_macs, rel=0.015)
            assert params / 1e6 == pytest.approx(published_params, rel=0.015)


@pytest.mark.parametrize(
    ("name", "published"),
    [("imagenet_resnet18_b", (7801.4, 44.549)), ("cifar100_resnet32_b", (555.47, 11.220))],
)
def test_cloud_networks_cost_what_is_published(name: str, published: tuple[float, float]) -> None:
    """torchvision's ResNet-101; ResNet-18 with the 3x3 stem (its widely quoted 0.56 G and 11.2 M at 100 classes)."""
    shape, num_classes = nominal(name)
    cloud = CloudNet(recipe(name).model, shape, num_classes)
    assert count_macs(cloud, torch.zeros(1, *shape)) / 1e6 == pytest.approx(published[0], rel=0.015)
    assert count_parameters(cloud) / 1e6 == pytest.approx(published[1], rel=0.015)


def test_resnet101_for_small_images_keeps_their_resolution() -> None:
    """The 3x3 stem at stride 1 and no max-pool: 2.51 G MACs at 32x32."""
    cloud = CloudNet(recipe("cifar100_resnet32_b_resnet101").model, (3, 32, 32), 100)
    assert cloud.features(torch.zeros(1, 3, 32, 32)).shape == (1, 2048, 4, 4)
    assert count_macs(cloud, torch.zeros(1, 3, 32, 32)) / 1e9 == pytest.approx(2.51, rel=0.015)


def test_main_networks_are_torchvisions() -> None:
    """Names and shapes of torchvision's own state dict, so that its weights fit."""
    from torchvision.models import mobilenet_v2, resnet18

    for name, build in (("imagenet_resnet18_b", resnet18), ("imagenet_mobilenetv2_b", mobilenet_v2)):
        shape, num_classes = nominal(name)
        main = MEANet(recipe(name).model, shape, num_classes, 500).main
        ours = sorted(tuple(tensor.shape) for tensor in main.state_dict().values())
        assert ours == sorted(tuple(tensor.shape) for tensor in build().state_dict().values())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_pretrained_weights_are_taken_from_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole network answers as torchvision's does; with another number of classes its exit alone is fresh."""
    import torchvision.models

    torch.manual_seed(0)
    published = getattr(torchvision.models, name)().eval()
    weights = {"resnet18": "resnet18-f37072fd.pth", "mobilenet_v2": "mobilenet_v2-7ebf99e0.pth"}
    (tmp_path / "checkpoints").mkdir()
    torch.save(published.state_dict(), tmp_path / "checkpoints" / weights[name])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = recipe({"resnet18": "imagenet_resnet18_b", "mobilenet_v2": "imagenet_mobilenetv2_b"}[name]).model
    images = torch.randn(2, 3, 64, 64)
    main = MEANet(config, (3, 64, 64), 1000, 500).main.eval()
    load_pretrained(name, main.features, main.exit)
    torch.testing.assert_close(main(images)[1], published(images))
    seven = MEANet(config, (3, 64, 64), 7, 3).main.eval()
    load_pretrained(name, seven.features, seven.exit)
    torch.testing.assert_close(seven.features(images), main.features(images))
    assert seven(images)[1].shape == (2, 7)


def test_pretrained_weights_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"cut off")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    main = MEANet(recipe("imagenet_resnet18_b").model, (3, 64, 64), 1000, 500).main
    with pytest.raises(UserError, match=r"weights for resnet18 cannot be used.*resnet18-f37072fd.pth into"):
        load_pretrained("resnet18", main.features, main.exit)


def test_training_memory_is_what_autograd_keeps() -> None:
    """By hand for one convolution, batch-norm, ReLU; and the extension phase keeps less than half of joint training."""
    meanet, cloud = networks()
    costs = block_costs(meanet, cloud, SHAPE, "float32", batch_size=10)
    for block in costs.values():
        assert block.training_bytes >= 10 * block.activation_bytes + 12 * block.params
        assert block.training_bytes < 10 * block.activation_bytes + 12 * block.params + 4 * block.params + 4096
    shape, num_classes = nominal("cifar100_resnet32_b")
    model = recipe("cifar100_resnet32_b").model
    big = MEANet(model, shape, num_classes, 50), CloudNet(model, shape, num_classes)
    full, half = (block_costs(*big, shape, precision, batch_size=1) for precision in ("float32", "bfloat16"))
    joint = sum(full[name].activation_bytes for name in ("main", "adaptive", "extension"))
    assert full["adaptive"].activation_bytes + full["extension"].activation_bytes < joint / 2
    assert half["main"].activation_bytes < 0.75 * full["main"].activation_bytes


def test_counting_memory_changes_nothing() -> None:
    meanet, cloud = networks()
    before = {name: tensor.clone() for name, tensor in meanet.state_dict().items()}
    block_costs(meanet, cloud, SHAPE, "float32", batch_size=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in meanet.state_dict().items())


@pytest.mark.parametrize("name", RECIPES)
def test_fast_recipes_differ_in_schedule_alone(name: str) -> None:
    fast = RECIPES.get(f"{name}_fast")
    if fast is None:
        return
    slow = recipe(name)
    assert (fast().model, fast().data, fast().split) == (slow.model, slow.data, slow.split)
    assert fast().main.epochs < slow.main.epochs / 3
    assert (slow.main.schedule, slow.main.nesterov, slow.precision) == ("steps", False, "float32")


def test_stages_are_for_residual_networks() -> None:
    with pytest.raises(UserError, match=r"model\.adaptive has stages, which mobilenet_v2 does not take"):
        ModelConfig(backbone="mobilenet_v2", adaptive=(StageConfig(width=4, blocks=1),), cloud_backbone="resnet18")
    with pytest.raises(UserError, match="residual main block has no published weights"):
        dataclasses.replace(digits().model, pretrained=True)
    with pytest.raises(UserError, match="with the 7x7 stem"):
        dataclasses.replace(recipe("cifar100_resnet32_b").model, cloud_pretrained=True)
