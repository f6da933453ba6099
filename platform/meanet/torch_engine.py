"""Blocks in torch, as they were trained. Shape letters: N samples, C classes, H hard classes."""

import torch
from torch import Tensor

from meanet.engines import Logits, Pictures
from meanet.models import CloudNet, MEANet
from meanet.preprocessing import Preprocessing
from meanet.routing import Ints

Kept = tuple[Tensor, Tensor]
"""Normalised images (N, C, H, W), and features (N, F, h, w)."""


class TorchEdge:
    """Main, adaptive and extension blocks."""

    def __init__(self, meanet: MEANet, preprocessing: Preprocessing) -> None:
        self._meanet, self._preprocessing = meanet, preprocessing

    @torch.inference_mode()
    def main(self, images: Pictures) -> tuple[Kept, Logits]:
        """Main block of (N, H, W, C): what the extension will want, and (N, C) logits."""
        tensor = torch.from_numpy(self._preprocessing.normalise(images))
        features, logits = self._meanet.main(tensor)
        return (tensor, features), logits.numpy()

    @torch.inference_mode()
    def extend(self, kept: Kept, rows: Ints) -> Logits:
        """Adaptive and extension blocks of these rows: (len(rows), H) logits."""
        index = torch.from_numpy(rows)
        logits: Logits = self._meanet.path(*(part.index_select(0, index) for part in kept)).numpy()
        return logits


class TorchCloud:
    """The cloud's network."""

    def __init__(self, cloud: CloudNet, preprocessing: Preprocessing) -> None:
        self._cloud, self._preprocessing = cloud, preprocessing

    @torch.inference_mode()
    def logits(self, images: Pictures) -> Logits:
        """(N, C) of (N, H, W, C)."""
        logits: Logits = self._cloud(torch.from_numpy(self._preprocessing.normalise(images))).numpy()
        return logits
