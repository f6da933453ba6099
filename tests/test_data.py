"""Digits as they are, and their division."""

import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits

from meanet import data
from meanet.config import DataConfig
from meanet.data import ImageTable, Splits
from meanet.errors import UserError
from meanet.recipes import digits


@pytest.fixture(scope="module")
def all_digits() -> ImageTable:
    return data.load(digits().data)


def test_digits_are_scikit_learns_without_loss(all_digits: ImageTable) -> None:
    bunch = load_digits()
    assert all_digits.images.shape == (1797, 8, 8, 1)
    assert all_digits.images.dtype == np.uint8
    np.testing.assert_array_equal(all_digits.images[..., 0] / 15, bunch.images)
    np.testing.assert_array_equal(all_digits.labels, bunch.target)
    assert all_digits.class_names == tuple("0123456789")


def test_unknown_source_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'mnist'.*digits"):
        data.load(DataConfig(source="mnist"))


def test_division_is_disjoint_complete_and_stratified(all_digits: ImageTable) -> None:
    splits = data.divide(all_digits, digits().data, seed=0)
    rows = np.concatenate([splits.train, splits.validation, splits.test])
    assert sorted(rows.tolist()) == list(range(1797))
    assert len(splits.test) >= 450
    share = np.bincount(all_digits.labels) / 1797
    for part in (splits.train, splits.validation, splits.test):
        np.testing.assert_allclose(np.bincount(all_digits.labels[part]) / len(part), share, atol=0.005)


def test_division_follows_its_seed(all_digits: ImageTable) -> None:
    def test_rows(seed: int) -> list[int]:
        return data.divide(all_digits, digits().data, seed).test.tolist()

    assert test_rows(3) == test_rows(3)
    assert test_rows(3) != test_rows(4)


def test_class_that_is_too_small_is_named(all_digits: ImageTable) -> None:
    few = np.concatenate([np.flatnonzero(all_digits.labels != 7), np.flatnonzero(all_digits.labels == 7)[:2]])
    with pytest.raises(UserError, match=r"class '7' has 2 images.*add images"):
        data.divide(all_digits.take(few), DataConfig(), seed=0)


def test_digest_changes_with_a_pixel_a_label_or_a_name(all_digits: ImageTable) -> None:
    pixel, labels = all_digits.images.copy(), all_digits.labels.copy()
    pixel[0, 0, 0, 0] += 1
    labels[0] += 1
    digests = {
        all_digits.digest,
        dataclasses.replace(all_digits, images=pixel).digest,
        dataclasses.replace(all_digits, labels=labels).digest,
        dataclasses.replace(all_digits, class_names=(*"012345678", "nine")).digest,
    }
    assert len(digests) == 4
    assert data.load(digits().data).digest == all_digits.digest


def test_channel_statistics(splits: Splits) -> None:
    mean, std = splits.table.channel_statistics()
    scaled = splits.table.images / 255
    assert mean[0] == pytest.approx(scaled.mean())
    assert std[0] == pytest.approx(scaled.std())
