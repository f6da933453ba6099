"""A set that does not fit in memory: read and decoded in parallel by Ray Data, a bounded part of it at a time.

Shape letters: B batch, C channels, H height, W width.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor

from meanet.config import Recipe
from meanet.data import Splits, StreamedTable
from meanet.data.images import ImageSpec
from meanet.data.loading import Piece
from meanet.feeds import Augmentation, Batch, Feed, Scaling, Share

_BLOCK_BYTES = 4 * 2**20
"""Decoded images travel in blocks of about this size."""
_SHUFFLED_BATCHES = 8
"""So many batches are mixed at a time, beside the shuffled order of shards."""


def streaming_feed(recipe: Recipe, splits: Splits, scaling: Scaling) -> Feed:
    """The feed of a set that stays encoded where it is."""
    assert isinstance(splits.table, StreamedTable), "a set in memory needs no streaming"
    return StreamingFeed(splits.table, Augmentation(recipe.data), scaling)


class StreamingFeed:
    """Shards in random order, decoded by Ray Data's tasks; each worker reads its own shards."""

    def __init__(self, table: StreamedTable, augmentation: Augmentation, scaling: Scaling) -> None:
        self._table, self._augment, self._scaling = table, augmentation, scaling

    def steps(self, rows: Tensor, share: Share) -> int:
        """Of the worker whose shards hold the fewest of these rows."""
        held = [sum(len(piece.rows) for piece in pieces) for pieces in self._divide(rows, share)]
        return min(held) // share.per_worker

    def train(self, rows: Tensor, share: Share, seeds: tuple[int, int]) -> Iterator[Batch]:
        """This worker's shards in an order of their own each time, and batches mixed over some of them."""
        pieces = self._divide(rows, share)[share.rank]
        order = np.random.default_rng(seeds[0]).permutation(len(pieces))
        decode = _Decode(self._table.spec, self._augment.config.min_crop_area, seeds[1])
        dataset = self._dataset([pieces[number] for number in order], decode)
        batches = dataset.iter_batches(
            batch_size=share.per_worker,
            batch_format="numpy",
            drop_last=True,
            local_shuffle_buffer_size=_SHUFFLED_BATCHES * share.per_worker,
            local_shuffle_seed=seeds[0] % 2**31,
        )
        generator = torch.Generator(self._scaling.device).manual_seed(seeds[1] + share.rank)
        whole = self._augment.config.min_crop_area >= 1
        for found, images in self._on_device(batches):
            yield found, self._augment(images, generator) if whole else self._augment.flip(images, generator)

    def evaluate(self, rows: Tensor, size: int) -> Iterator[Batch]:
        """Every one of these rows once, as it is, in ascending order."""
        dataset = self._dataset(self._table.pieces(rows.cpu().numpy()), _Decode(self._table.spec, 1.0, None))
        yield from self._on_device(dataset.iter_batches(batch_size=size, batch_format="numpy"))

    def _divide(self, rows: Tensor, share: Share) -> list[list[Piece]]:
        """Each worker's shards: the largest that are left go to the worker that has least."""
        held: list[list[Piece]] = [[] for _ in range(share.world_size)]
        sizes = [0] * share.world_size
        for piece in sorted(self._table.pieces(rows.cpu().numpy()), key=lambda one: -len(one.rows)):
            least = int(np.argmin(sizes))
            held[least].append(piece)
            sizes[least] += len(piece.rows)
        return held

    def _dataset(self, pieces: Sequence[Piece], decode: "_Decode") -> ray.data.Dataset:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = _BLOCK_BYTES
        context.execution_options.preserve_order = True  # the same seeds, the same batches
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"number": number, "piece": pickle.dumps(piece)} for number, piece in enumerate(pieces)]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        function: Any = decode  # Ray's types know no generator function
        return dataset.map_batches(function, batch_size=1, batch_format="numpy")

    def _on_device(self, batches: Any) -> Iterator[Batch]:
        for batch in batches:
            rows = torch.from_numpy(np.array(batch["row"])).to(self._scaling.device)
            yield rows, self._scaling(torch.from_numpy(np.array(batch["image"])))


@dataclass(frozen=True)
class _Decode:
    """A piece -> its rows and pixels, a few at a time; runs in a task of Ray Data."""

    spec: ImageSpec
    min_crop_area: float
    seed: int | None
    """None: images as they are."""

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for number, pickled in zip(batch["number"], batch["piece"], strict=True):
            piece: Piece = pickle.loads(pickled)  # noqa: S301  # made by `_dataset` in this very run
            generator = np.random.default_rng([int(number), self.seed or 0])
            encoded = piece.read()
            size = max(1, _BLOCK_BYTES // int(np.prod(self.spec.shape)))
            for start in range(0, len(encoded), size):
                images = [self._image(data, generator) for data in encoded[start : start + size]]
                yield {"row": piece.rows[start : start + size], "image": np.stack(images)}

    def _image(self, data: bytes, generator: np.random.Generator) -> NDArray[np.uint8]:
        if self.seed is None or self.min_crop_area >= 1:
            return self.spec.decode(data)
        return self.spec.decode_crop(data, self.min_crop_area, generator)
