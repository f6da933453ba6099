"""What phases have trained, kept by what determines it: a trial trains only what its parameters change.

    phases/main-KEY/       weights.safetensors, facts.json, and what the frozen block says of validation
    phases/extension-KEY/  weights.safetensors, facts.json (hard classes, class precision)
    phases/cloud-KEY/      weights.safetensors, facts.json
    phases/log.jsonl       who trained what, when

A key covers the images, the seed, the precision and every field of the recipe that matters to its phase; the
extension's covers the main block's. Weights are safetensors and the rest is JSON: nobody's pickle is executed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meanet.config import Recipe
from meanet.errors import UserError

_PATH_FIELDS = frozenset({"adaptive_stem_width", "adaptive", "extension", "join"})
_WEIGHTS, _FACTS, _LOG = "weights.safetensors", "facts.json", "log.jsonl"


def phase_keys(recipe: Recipe, data_digest: str, num_classes: int) -> dict[str, str]:
    """Phase -> digest of all that determines what it trains.

    The cloud network's initial weights are those of whoever trains it first: it is the study's own, and never varies.
    """
    model = asdict(recipe.model)
    data = {name: value for name, value in asdict(recipe.data).items() if name != "feed"}
    common = {
        "data": data,
        "digest": data_digest,
        "seed": recipe.seed,
        "precision": recipe.precision,
        "imagenet": recipe.model.pretrained or recipe.model.cloud_pretrained,
    }
    cloud = {name: value for name, value in model.items() if name.startswith("cloud")}
    path = {name: value for name, value in model.items() if name in _PATH_FIELDS}
    main = {name: value for name, value in model.items() if name not in {*cloud, *path}}
    main_key = _digest({**common, "model": main, "phase": asdict(recipe.main)})
    split = {"size": recipe.split.size(num_classes), "method": recipe.split.method}
    return {
        "main": main_key,
        "extension": _digest({"main": main_key, "model": path, "split": split, "phase": asdict(recipe.extension)}),
        "cloud": _digest({**common, "model": cloud, "phase": asdict(recipe.cloud)}),
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trained:
    """What a phase left."""

    weights: dict[str, Tensor]
    """State dict of what it trained."""
    facts: dict[str, Any]
    """hard_classes and class_precision of an extension phase."""


class PhaseStore:
    """A folder that every node can write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, phase: str, key: str) -> Path:
        """Where a phase's result lies."""
        return self.root / f"{phase}-{key}"

    def has(self, phase: str, key: str) -> bool:
        """Whether it was trained."""
        return (self.folder(phase, key) / _FACTS).exists()

    def load(self, phase: str, key: str) -> Trained:
        """What was kept.

        Raises:
            UserError: it is damaged.
        """
        folder = self.folder(phase, key)
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            return Trained(load_file(folder / _WEIGHTS), facts)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be read ({error}): remove it to train that phase again") from error

    def save(self, phase: str, key: str, trained: Trained, who: str = "") -> None:
        """Keep a result, whole or not at all; the first of two stays."""
        self.root.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.root))
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in trained.weights.items()}, part / _WEIGHTS
        )
        (part / _FACTS).write_text(json.dumps(trained.facts), encoding="utf-8")
        try:
            part.rename(self.folder(phase, key))
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            if not self.has(phase, key):
                raise
            return
        self._log({"phase": phase, "key": key, "by": who, "at": time.time(), "pid": os.getpid()})

    def _log(self, row: dict[str, Any]) -> None:
        with (self.root / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """Who trained what, in order."""
        path = self.root / _LOG
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @contextmanager
    def lock(self, phase: str, key: str) -> Iterator[None]:
        """While held, nobody else trains that phase; it goes with the process that holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{phase}-{key}.lock").open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
