"""What runs a model's blocks: torch, or ONNX Runtime on files that were exported beside the weights.

    engines.json                          which files there are, how they were judged, and their digests
    main.onnx, extension.onnx, cloud.onnx float32, of any number of images
    main_int8.onnx, extension_int8.onnx   8-bit integers, where their accuracy passed

An engine takes images as bytes, (N, H, W, C), and is imported when it is opened: a device without torch has no use for
torch's. Shape letters: N samples, C classes, H hard classes, F channels of the features, h x w their size.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from meanet.errors import UserError
from meanet.model_spec import EdgeSpec, read_json
from meanet.routing import Ints

if TYPE_CHECKING:
    from meanet.artifact import TrainedModel

Pictures = NDArray[np.uint8]
Logits = NDArray[np.float32]
Name = Literal["auto", "torch", "onnx", "onnx_int8"]
NAMES: tuple[Name, ...] = get_args(Name)
"""What a config may choose; auto takes onnx, else torch: thresholds are searched on float32 answers,
and with onnx_int8 some samples, at the thresholds, go another way than was searched."""
FORMAT = 1
EXPORTED = "engines.json"
EDGE_FILES: dict[Name, tuple[str, str]] = {
    "onnx": ("main.onnx", "extension.onnx"),
    "onnx_int8": ("main_int8.onnx", "extension_int8.onnx"),
}
"""Main block, adaptive and extension block."""
CLOUD_FILE = "cloud.onnx"


class EdgeEngine(Protocol):
    """The edge's blocks."""

    def main(self, images: Pictures) -> tuple[Any, Logits]:
        """Main block of (N, H, W, C): what `extend` will want of these images, and (N, C) logits."""

    def extend(self, kept: Any, rows: Ints) -> Logits:
        """Adaptive and extension blocks of these rows: (len(rows), H) logits."""


class CloudEngine(Protocol):
    """The cloud's network."""

    def logits(self, images: Pictures) -> Logits:
        """(N, C) of (N, H, W, C)."""


@dataclass(frozen=True)
class Exported:
    """The content of engines.json."""

    weights: dict[str, str]
    """File of weights -> SHA-256: those that were exported."""
    files: dict[str, str]
    """Exported file -> SHA-256."""
    fp32: dict[str, Any]
    """How far the float32 files' logits are from torch's."""
    int8: dict[str, Any] | None = None
    """How the 8-bit files were judged, and whether they were kept; None = they were not asked for."""
    versions: dict[str, str] | None = None
    """Of the libraries that wrote the files."""

    @property
    def engines(self) -> tuple[Name, ...]:
        """What the folder has, best first."""
        return tuple(name for name in ("onnx_int8", "onnx") if set(EDGE_FILES[name]) <= set(self.files))

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @staticmethod
    def read(folder: Path) -> "Exported | None":
        """Of a model's folder; None where nothing was exported.

        Raises:
            UserError: it is there and cannot be read.
        """
        if not (folder / EXPORTED).exists():
            return None
        plain = read_json(folder / EXPORTED)
        if plain.pop("format", None) != FORMAT:
            raise UserError(f"{folder / EXPORTED} is of another version than {FORMAT}: export again with jobs.register")
        try:
            return Exported(**plain)
        except TypeError as error:
            raise UserError(f"{folder / EXPORTED} cannot be read ({error}): export again with jobs.register") from error


def choose(folder: Path, name: str = "auto") -> Name:
    """The engine that a name stands for in this folder.

    Raises:
        UserError: there is no such engine, or the folder or this installation lacks what it takes.
    """
    if name not in NAMES:
        raise UserError(f"unknown engine {name!r}: choose one of {', '.join(NAMES)}")
    exported = Exported.read(folder)
    has_runtime = find_spec("onnxruntime") is not None
    there = exported.engines if exported else ()
    if name == "auto":
        return "onnx" if "onnx" in there and has_runtime else "torch"
    if name == "torch":
        return "torch"
    if name not in there:
        refused = exported.int8 if exported and name == "onnx_int8" else None
        why = f" ({refused['reason']})" if refused else ""
        raise UserError(
            f"{folder} has no engine {name}{why}: choose one of {', '.join((*there, 'torch'))}, or register the model "
            "again with --engines"
        )
    if not has_runtime:
        raise UserError(f"engine {name} takes onnxruntime, which is not installed: install meanet[edge]")
    return next(known for known in NAMES if known == name)


def open_edge(folder: Path, name: str = "auto") -> EdgeEngine:
    """The edge's blocks of a model's folder, on one thread.

    Raises:
        UserError: the engine cannot be had; a file is not what was exported.
    """
    chosen = choose(folder, name)
    if chosen == "torch":
        return in_torch(in_networks(folder))
    from meanet.onnx_engine import OnnxEdge

    main, extension = (_checked(folder, file) for file in EDGE_FILES[chosen])
    return OnnxEdge(main, extension)


def open_cloud(folder: Path, name: str = "auto") -> CloudEngine:
    """The cloud's network of a model's folder, on one thread; float32 by any name.

    Raises:
        UserError: as `open_edge`.
    """
    if choose(folder, name) == "torch":
        return cloud_in_torch(in_networks(folder))
    from meanet.onnx_engine import OnnxCloud

    return OnnxCloud(_checked(folder, CLOUD_FILE))


def in_torch(model: EdgeSpec) -> EdgeEngine:
    """The edge's blocks of a trained model that is loaded already."""
    from meanet.artifact import TrainedModel
    from meanet.torch_engine import TorchEdge

    assert isinstance(model, TrainedModel), "a model without its networks runs by an engine that is opened"
    return TorchEdge(model.networks.meanet, model.preprocessing)


def cloud_in_torch(model: EdgeSpec) -> CloudEngine:
    """The cloud's network of a trained model that is loaded already."""
    from meanet.artifact import TrainedModel
    from meanet.torch_engine import TorchCloud

    assert isinstance(model, TrainedModel), "a model without its networks runs by an engine that is opened"
    return TorchCloud(model.networks.cloud, model.preprocessing)


def copy(source: Path, target: Path) -> None:
    """Take what was exported into another folder of the same weights; nothing where nothing was.

    Raises:
        UserError: a file is not what was exported.
    """
    exported = Exported.read(source)
    if exported is None:
        return
    for name in exported.files:
        shutil.copyfile(_checked(source, name), target / name)
    shutil.copyfile(source / EXPORTED, target / EXPORTED)


def digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(folder: Path, name: str) -> Path:
    exported, path = Exported.read(folder), folder / name
    assert exported is not None, "an engine of the folder was chosen"
    if not path.exists() or digest(path) != exported.files.get(name):
        raise UserError(f"{path} is not the file that was exported: register the model again, or download it again")
    return path


def in_networks(folder: Path) -> "TrainedModel":
    """The model with its networks in torch.

    Raises:
        UserError: there is no torch; the folder is not whole.
    """
    if find_spec("torch") is None:
        raise UserError(
            f"torch is not installed, and {folder} has no engine that does without: register the model with --engines, "
            "or install meanet[platform]"
        )
    from meanet import artifact

    return artifact.load(folder)
