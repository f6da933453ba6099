"""A trained model's blocks as ONNX files beside its weights, judged before they are kept; `meanet.engines` runs them.

Scaling of pixels is part of each graph: the files take bytes (N, H, W, C). Calibration sees training images, the
judgement is on validation; test stays unseen.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from meanet import quantisation
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.engines import CLOUD_FILE, EDGE_FILES, EXPORTED, Exported, Pictures, cloud_in_torch, digest, in_torch
from meanet.errors import UserError
from meanet.model_spec import CLOUD, EDGE
from meanet.onnx_engine import FEATURES, IMAGES, LOGITS, OnnxCloud, OnnxEdge
from meanet.preprocessing import Preprocessing
from meanet.storage import write_text

Engines = Literal["none", "onnx", "int8"]
"""What to export: nothing; float32; float32 and 8-bit integers."""
_OPSET = 20
_COMPARED_IMAGES = 64
_TOLERANCE = 1e-3
"""Of a logit, for each unit of the largest: an export that is further from torch is wrong."""
_CALIBRATION_IMAGES = 512
_JUDGED_IMAGES = 5000
_VERSIONS = ("torch", "onnx", "onnxruntime")


class _FromBytes(nn.Module):
    """A block that takes bytes: the scaling of pixels is part of its first convolution.

    That convolution pads with zeros after scaling, which no constant of unscaled pixels stands for. So the mean comes
    in by a further channel, of 255 within the image and, padded, 0 outside it: exact, and bytes need no arithmetic.
    """

    def __init__(self, block: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        name, first = next((name, part) for name, part in self.block.named_modules() if isinstance(part, nn.Conv2d))
        self.block.set_submodule(name, _scaling_convolution(first, preprocessing))

    def forward(self, images: Tensor, *rest: Tensor) -> Any:
        """(N, H, W, C) bytes, and what else the block takes."""
        marked = functional.pad(images.permute(0, 3, 1, 2), (0, 0, 0, 0, 0, 1), value=255)
        return self.block(marked.to(torch.float32), *rest)


def _scaling_convolution(first: nn.Conv2d, preprocessing: Preprocessing) -> nn.Conv2d:
    """A convolution over normalised images as one over their bytes and a channel of 255."""
    assert first.in_channels == preprocessing.channels, "the first convolution takes the image"
    assert first.padding_mode == "zeros", "a pixel outside is one of the mean colour"
    mean, std = (torch.tensor(each)[None, :, None, None] for each in (preprocessing.mean, preprocessing.std))
    weight = torch.cat([first.weight / std, -(first.weight * mean / std).sum(1, keepdim=True)], dim=1) / 255
    scaling = copy.copy(first)
    scaling._parameters = {**first._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    scaling.in_channels += 1
    return scaling


def export(
    model: TrainedModel,
    folder: Path,
    splits: Splits,
    wanted: Engines = "int8",
    max_loss: float = quantisation.MAX_LOSS,
) -> Exported | None:
    """Write the files into the model's folder, unless they are there for these very weights.

    Args:
        model: what the folder holds.
        folder: it.
        splits: of the data that it was trained on.
        wanted: which files.
        max_loss: of accuracy, 0..1, that 8-bit integers may cost on validation and be kept.

    Raises:
        UserError: an exported file does not answer as torch does.
    """
    if wanted == "none":
        return None
    with tempfile.TemporaryDirectory() as scratch:
        files = _export_fp32(model, Path(scratch))
        fp32 = _compare(model, Path(scratch), splits)
        judged = None
        if wanted == "int8":
            judged = _export_int8(model, Path(scratch), splits, max_loss)
            files += EDGE_FILES["onnx_int8"] if judged["kept"] else ()
        return _publish(folder, Path(scratch), files, fp32, judged)


def exported_already(folder: Path, wanted: Engines) -> bool:
    """Whether the folder has what is wanted, of the weights that it has."""
    found = Exported.read(folder)
    if wanted == "none":
        return True
    if found is None or found.weights != _weights(folder):
        return False
    whole = all((folder / name).exists() and digest(folder / name) == sha for name, sha in found.files.items())
    return whole and (wanted == "onnx" or found.int8 is not None)


def _weights(folder: Path) -> dict[str, str]:
    return {name: digest(folder / name) for name in (EDGE, CLOUD)}


def _publish(
    folder: Path, scratch: Path, files: Sequence[str], fp32: dict[str, Any], int8: dict[str, Any] | None
) -> Exported:
    """Move the files in; engines.json comes last, so that what it names is whole."""
    (folder / EXPORTED).unlink(missing_ok=True)
    for names in EDGE_FILES.values():
        for name in names:
            (folder / name).unlink(missing_ok=True)
    try:
        for name in files:
            (folder / name).write_bytes((scratch / name).read_bytes())
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give --engines none, or free it") from error
    exported = Exported(
        weights=_weights(folder),
        files={name: digest(folder / name) for name in files},
        fp32=fp32,
        int8=int8,
        versions={name: version(name) for name in _VERSIONS},
    )
    write_text(exported.to_json(), folder / EXPORTED)
    return exported


def _export_fp32(model: TrainedModel, folder: Path) -> tuple[str, ...]:
    meanet, taken = model.networks.meanet, model.preprocessing
    images = torch.zeros((2, taken.height, taken.width, taken.channels), dtype=torch.uint8)
    features = torch.zeros((2, *meanet.main.feature_shape))
    main, extension = EDGE_FILES["onnx"]
    _to_onnx(_FromBytes(meanet.main, taken), {IMAGES: images}, (FEATURES, LOGITS), folder / main)
    _to_onnx(_FromBytes(meanet.path, taken), {IMAGES: images, FEATURES: features}, (LOGITS,), folder / extension)
    _to_onnx(_FromBytes(model.networks.cloud, taken), {IMAGES: images}, (LOGITS,), folder / CLOUD_FILE)
    return main, extension, CLOUD_FILE


def _to_onnx(block: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    with _quiet(), _named():
        torch.onnx.export(
            block.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(shapes[0], shapes[1:]) if len(shapes) > 1 else shapes,
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of its own passes."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"the networks cannot be exported to ONNX ({str(error).splitlines()[0]}): give --engines none, "
            "which serves by torch"
        ) from error


def _pick(splits: Splits, rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to so many of these rows, at random but always the same, in the table's order."""
    chosen: NDArray[np.int64] = np.sort(np.random.default_rng(0).permutation(rows)[:count])
    assert not np.isin(chosen, splits.test).any(), "test stays unseen"
    return chosen


def _batches(splits: Splits, rows: NDArray[np.int64]) -> Iterator[Pictures]:
    return splits.table.batches(rows, min(64, splits.table.evaluation_batch))


def _compare(model: TrainedModel, folder: Path, splits: Splits) -> dict[str, Any]:
    """Logits of the float32 files beside torch's, on validation.

    Raises:
        UserError: they differ by more than rounding.
    """
    rows = _pick(splits, splits.validation, _COMPARED_IMAGES)
    main, extension = EDGE_FILES["onnx"]
    ours, theirs = OnnxEdge(folder / main, folder / extension), in_torch(model)
    cloud, deep = OnnxCloud(folder / CLOUD_FILE), cloud_in_torch(model)
    furthest = dict.fromkeys(("main", "extension", "cloud"), 0.0)
    for images in _batches(splits, rows):
        every = np.arange(len(images))
        (kept, logits), (kept_too, logits_too) = ours.main(images), theirs.main(images)
        pairs = {
            "main": (logits, logits_too),
            "extension": (ours.extend(kept, every), theirs.extend(kept_too, every)),
            "cloud": (cloud.logits(images), deep.logits(images)),
        }
        for name, (one, other) in pairs.items():
            scale = max(1.0, float(np.abs(other).max()))
            furthest[name] = max(furthest[name], float(np.abs(one - other).max()) / scale)
    if not max(furthest.values()) <= _TOLERANCE:  # nor NaN
        raise UserError(
            f"the exported files' logits are up to {max(furthest.values()):g} from torch's and may be {_TOLERANCE:g}: "
            "register with --engines none, which serves by torch"
        )
    return {"images": len(rows), "max_difference": furthest, "tolerance": _TOLERANCE}


def _export_int8(model: TrainedModel, folder: Path, splits: Splits, max_loss: float) -> dict[str, Any]:
    """Write the 8-bit files and judge them."""
    calibration = _pick(splits, splits.train, _CALIBRATION_IMAGES)
    sources, targets = (tuple(folder / name for name in EDGE_FILES[kind]) for kind in ("onnx", "onnx_int8"))
    fp32 = OnnxEdge(*sources)
    seen = list(_batches(splits, calibration))
    quantisation.quantise(sources[0], targets[0], ({IMAGES: batch} for batch in seen))
    pairs = (fp32.main(batch)[0] for batch in seen)
    quantisation.quantise(sources[1], targets[1], ({IMAGES: batch, FEATURES: features} for batch, features in pairs))
    judged = _pick(splits, splits.validation, _JUDGED_IMAGES)
    images, labels = _batches(splits, judged), splits.table.labels[judged]
    verdict = quantisation.judge(model, (fp32, OnnxEdge(*targets)), images, labels, max_loss)
    return {**verdict, "calibration_images": len(calibration)}
