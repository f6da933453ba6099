"""Versions from the registry as replicas hold them, each tried once before anybody depends on it.

Two versions over the same weights share their networks: a new operating point costs no memory.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from meanet.artifact import TrainedModel
from meanet.errors import UserError
from meanet.runtime import CloudRuntime, Images
from meanet.tracking import Tracker
from serve_apps.cloud_calls import CloudRequest
from serve_apps.served import Served


@dataclass(frozen=True)
class CloudVersion:
    """What the cloud answers a version's requests with."""

    version: int
    model: TrainedModel
    runtime: CloudRuntime

    def classify(self, request: CloudRequest) -> tuple[list[int], list[float]]:
        """Class ids and confidences of N samples; NaN where the logits are not finite, for they are no answer."""
        reading = self.runtime.run(request.pixels(self.model.preprocessing))
        confidence = np.where(np.isfinite(reading.entropy), reading.confidence, np.nan)
        return reading.pred.tolist(), confidence.tolist()


@dataclass(frozen=True)
class Loader:
    """From one MLflow store."""

    tracking_uri: str
    node: str = ""
    """Ray's id of the node that this is on."""

    @cached_property
    def _tracker(self) -> Tracker:
        return Tracker(self.tracking_uri)

    def edge(self, version: int, held: dict[int, Served]) -> Served:
        """A version for an edge replica.

        Raises:
            UserError: it cannot be loaded, or says nothing of an image.
        """
        model = self._download(version)
        twin = _twin(model.networks.meanet, ((one.model, one.model.networks.meanet) for one in held.values()))
        served = replace(Served.of(model if twin is None else _over(model, twin), version), node=self.node)
        answers, _ = served.runtime.run(_blank(model), served.policy)
        _require_finite(answers.entropy, version, "main exit")
        return served

    def cloud(self, version: int, held: dict[int, CloudVersion]) -> CloudVersion:
        """A version for a cloud replica.

        Raises:
            UserError: as `edge`.
        """
        model = self._download(version)
        twin = _twin(model.networks.cloud, ((one.model, one.model.networks.cloud) for one in held.values()))
        model = model if twin is None else _over(model, twin)
        loaded = CloudVersion(version, model, CloudRuntime(model))
        _require_finite(loaded.runtime.run(_blank(model)).entropy, version, "cloud's network")
        return loaded

    def _download(self, version: int) -> TrainedModel:
        torch.set_num_threads(1)
        return self._tracker.download(version)


def _over(model: TrainedModel, twin: TrainedModel) -> TrainedModel:
    """A model on another's networks."""
    return replace(model, networks=twin.networks)


def _twin(network: nn.Module, others: Iterable[tuple[TrainedModel, nn.Module]]) -> TrainedModel | None:
    """One of the others whose weights are these, bit by bit."""
    own = _digest(network)
    return next((model for model, other in others if _digest(other) == own), None)


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _blank(model: TrainedModel) -> Images:
    taken = model.preprocessing
    return np.zeros((1, taken.height, taken.width, taken.channels), dtype=np.uint8)


def _require_finite(entropy: Any, version: int, what: str) -> None:
    if not np.isfinite(entropy).all():
        raise UserError(f"the {what} of version {version} says nothing of a blank image: its weights are broken")
