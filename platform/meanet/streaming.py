"""A set that does not fit in memory: read and decoded in parallel by Ray Data, a bounded part of it at a time.

Shape letters: B batch, C channels, H height, W width.
"""

import itertools
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
from meanet.data.loading import Piece
from meanet.feeds import Augmentation, Batch, Feed, Scaling, Share
from meanet.images import ImageSpec

_BLOCK_BYTES = 16 * 2**20
"""What a task decodes at most."""
_BLOCK_SHARE = 1 / 32
"""And of the object store: tasks, queues and batches hold several blocks at a time."""
_STORE_SHARE = 0.2
"""Of the object store, for all images on their way."""
_SHUFFLED_BATCHES = 8
"""So many batches are mixed at a time, beside the shuffled order of pieces."""

_Image = tuple[int, NDArray[np.uint8]]
"""Row of the table, and pixels (H, W, C)."""


def streaming_feed(recipe: Recipe, splits: Splits, scaling: Scaling) -> Feed:
    """The feed of a set that stays encoded where it is."""
    assert isinstance(splits.table, StreamedTable), "a set in memory needs no streaming"
    return StreamingFeed(splits.table, Augmentation(recipe.data), scaling)


class StreamingFeed:
    """Pieces of shards in random order, decoded by Ray Data's tasks; each worker reads its own pieces."""

    def __init__(self, table: StreamedTable, augmentation: Augmentation, scaling: Scaling) -> None:
        self._table, self._augment, self._scaling = table, augmentation, scaling

    def steps(self, rows: Tensor, share: Share) -> int:
        """Of the worker whose pieces hold the fewest of these rows."""
        held = [sum(len(piece.rows) for piece in pieces) for pieces in self._divide(rows, share)]
        return min(held) // share.per_worker

    def train(self, rows: Tensor, share: Share, seeds: tuple[int, int], steps: int) -> Iterator[Batch]:
        """This worker's pieces in an order of their own each time, and batches mixed over some of them."""
        generator = np.random.default_rng(seeds[0])
        pieces = self._divide(rows, share)[share.rank]
        shuffled = [pieces[number] for number in generator.permutation(len(pieces))]
        needed = _first(shuffled, steps * share.per_worker)
        decode = _Decode(self._table.spec, self._augment.config.min_crop_area, seeds[1])
        mixed = _mix(self._decoded(needed, decode), _SHUFFLED_BATCHES * share.per_worker, generator)
        on_device = torch.Generator(self._scaling.device).manual_seed(seeds[1] + share.rank)
        whole = self._augment.config.min_crop_area >= 1
        for step, (found, images) in enumerate(self._batches(mixed, share.per_worker)):
            if step < steps:  # to its end: a pass that is given up would leave its threads behind
                yield found, self._augment(images, on_device) if whole else self._augment.flip(images, on_device)

    def evaluate(self, rows: Tensor, size: int) -> Iterator[Batch]:
        """Every one of these rows once, as it is, in ascending order."""
        pieces = self._cut(self._table.pieces(rows.cpu().numpy()))
        yield from self._batches(self._decoded(pieces, _Decode(self._table.spec, 1.0, None)), size)

    def _divide(self, rows: Tensor, share: Share) -> list[list[Piece]]:
        """Each worker's pieces: the largest that are left go to the worker that has least."""
        held: list[list[Piece]] = [[] for _ in range(share.world_size)]
        sizes = [0] * share.world_size
        for piece in sorted(self._cut(self._table.pieces(rows.cpu().numpy())), key=lambda one: -len(one.rows)):
            least = int(np.argmin(sizes))
            held[least].append(piece)
            sizes[least] += len(piece.rows)
        return held

    def _cut(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Pieces of at most a block's size, decoded."""
        images = max(1, _block_bytes() // int(np.prod(self._table.image_shape)))
        return [part for piece in pieces for part in piece.split(images)]

    def _decoded(self, pieces: Sequence[Piece], decode: "_Decode") -> Iterator[_Image]:
        """Row and pixels of each image, in order; what Ray Data's object store holds of them is bounded."""
        if not pieces:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = _block_bytes()
        options = context.execution_options
        options.preserve_order = True  # the same seeds, the same batches
        options.resource_limits = options.resource_limits.copy(object_store_memory=_STORE_SHARE * _store_bytes())
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"number": number, "piece": pickle.dumps(piece)} for number, piece in enumerate(pieces)]
        function: Any = decode  # Ray's types know no callable object
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        decoded = dataset.map_batches(function, batch_size=1, batch_format="numpy")
        for block in decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            # Copies, one an image: the block is the object store's, and mixing keeps some images longer than others.
            yield from zip(block["row"].tolist(), (image.copy() for image in block["image"]), strict=True)

    def _batches(self, images: Iterator[_Image], size: int) -> Iterator[Batch]:
        while part := list(itertools.islice(images, size)):
            rows = torch.tensor([row for row, _ in part], device=self._scaling.device)
            yield rows, self._scaling(torch.from_numpy(np.stack([image for _, image in part])))


def _store_bytes() -> float:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("object_store_memory", 0.0)


def _block_bytes() -> int:
    return int(min(_BLOCK_BYTES, _BLOCK_SHARE * _store_bytes()))


def _mix(images: Iterator[_Image], size: int, generator: np.random.Generator) -> Iterator[_Image]:
    """Draw from the next `size` at random; they are held here, for the object store has no room for them."""
    held: list[_Image] = []
    for image in images:
        held.append(image)
        if len(held) > size:
            yield _draw(held, generator)
    while held:
        yield _draw(held, generator)


def _draw(held: list[_Image], generator: np.random.Generator) -> _Image:
    number = int(generator.integers(len(held)))
    held[number], held[-1] = held[-1], held[number]
    return held.pop()


def _first(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """As many pieces as it takes to have so many rows."""
    ends = np.cumsum([len(piece.rows) for piece in pieces])
    return list(pieces[: int(np.searchsorted(ends, count)) + 1])


@dataclass(frozen=True)
class _Decode:
    """A piece -> its rows and pixels; runs in a task of Ray Data."""

    spec: ImageSpec
    min_crop_area: float
    seed: int | None
    """None: images as they are."""

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (number,), (pickled,) = batch["number"], batch["piece"]
        piece: Piece = pickle.loads(pickled)  # noqa: S301  # made by `_dataset` in this very run
        generator = np.random.default_rng([int(number), self.seed or 0])
        return {"row": piece.rows, "image": np.stack([self._image(data, generator) for data in piece.read()])}

    def _image(self, data: bytes, generator: np.random.Generator) -> NDArray[np.uint8]:
        if self.seed is None or self.min_crop_area >= 1:
            return self.spec.decode(data)
        return self.spec.decode_crop(data, self.min_crop_area, generator)
