"""What reaches the network: every image once a pass, changed only as the recipe says."""

import dataclasses

import numpy as np
import pytest
import torch

from meanet.config import DataConfig
from meanet.data import ImageTable
from meanet.feeds import Augmentation, ResidentFeed, Scaling, Share
from meanet.preprocessing import Preprocessing

SHAPE = (12, 10, 3)
PREPROCESSING = Preprocessing(12, 10, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def table() -> ImageTable:
    images = np.random.default_rng(0).integers(0, 256, (50, *SHAPE), dtype=np.uint8)
    return ImageTable(images, np.arange(50) % 2, ("a", "b"), "random")


def feed(table: ImageTable, *, channels_last: bool = False, **changes: object) -> ResidentFeed:
    config = dataclasses.replace(DataConfig(), **changes)  # type: ignore[arg-type]
    return ResidentFeed(table, config, Scaling(PREPROCESSING, CPU, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
def test_scaling_is_the_preprocessing_that_is_served(table: ImageTable, channels_last: bool) -> None:
    (rows, images), *rest = feed(table, channels_last=channels_last).evaluate(torch.arange(50), 64)
    assert (rest, rows.tolist()) == ([], list(range(50)))
    np.testing.assert_array_equal(images.numpy(), PREPROCESSING.normalise(table.images))
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_a_pass_has_every_row_once_divided_among_workers(table: ImageTable) -> None:
    everything = torch.arange(0, 48)
    seen = []
    for rank in range(3):
        share = Share(rank, 3, 4)
        assert feed(table).steps(everything, share) == 4
        seen += [row for rows, _ in feed(table).train(everything, share, (1, 2), 4) for row in rows.tolist()]
    assert sorted(seen) == everything.tolist()


def test_same_seeds_same_batches_other_seeds_other(table: ImageTable) -> None:
    def first(seeds: tuple[int, int]) -> torch.Tensor:
        return next(iter(feed(table, crop_padding=2, flip=True).train(torch.arange(50), Share(0, 1, 16), seeds, 3)))[1]

    assert torch.equal(first((1, 2)), first((1, 2)))
    assert not torch.equal(first((1, 2)), first((3, 2)))
    assert not torch.equal(first((1, 2)), first((1, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crop_is_a_shifted_image_padded_with_the_mean_colour(layout: torch.memory_format) -> None:
    images = torch.randn(30, 3, 8, 8).contiguous(memory_format=layout)
    cropped = Augmentation(DataConfig(crop_padding=2))(images, torch.Generator().manual_seed(0))
    assert cropped.is_contiguous(memory_format=layout)
    shifts = set()
    for image, found in zip(torch.nn.functional.pad(images, [2] * 4), cropped, strict=True):
        fits = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 8, x : x + 8], found)]
        assert len(fits) == 1
        shifts.add(fits[0])
    assert len(shifts) > 10


def test_flips_are_about_half() -> None:
    images = torch.randn(200, 3, 4, 4)
    flipped = Augmentation(DataConfig(flip=True))(images, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(one.flip(2), other) for one, other in zip(images, flipped, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(images, flipped, strict=True)]
    assert sum(mirrored) + sum(same) == 200
    assert 70 < sum(mirrored) < 130


def test_resized_crops_are_parts_of_the_image() -> None:
    """Of a ramp, a part is a ramp with a smaller slope; the whole image's share of area bounds it from below."""
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32).contiguous()
    cropped = Augmentation(DataConfig(min_crop_area=0.25))(ramp, torch.Generator().manual_seed(0))
    slopes = (cropped[:, 0, 16, 24] - cropped[:, 0, 16, 8]) / 16 * 31
    assert cropped.shape == ramp.shape
    assert slopes.min() >= (0.25 * 3 / 4) ** 0.5 - 0.05
    assert slopes.max() <= 1.05
    assert slopes.std() > 0.05


def test_pixels_of_the_object_store_are_used_as_they_are(table: ImageTable) -> None:
    """Read-only memory is shared, neither copied nor complained about."""
    table.images.setflags(write=False)
    shared = feed(table)
    assert shared._images.data_ptr() == table.images.ctypes.data
