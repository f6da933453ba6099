"""Blocks in ONNX Runtime, on one thread: more replicas, not more threads, are what a busy machine wants.

The files take images as bytes, so that scaling runs in the graph. Shape letters: N samples, C classes, H hard classes.
"""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from meanet.engines import Logits, Pictures
from meanet.errors import UserError
from meanet.routing import Ints

IMAGES, FEATURES, LOGITS = "images", "features", "logits"
"""Names of inputs and outputs."""
Kept = tuple[Pictures, NDArray[np.float32]]
"""Images (N, H, W, C), and features (N, F, h, w)."""


def session(path: Path) -> onnxruntime.InferenceSession:
    """One file, ready to run.

    Raises:
        UserError: it cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors: it warns of every weight that it folds
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own kinds share no base but this
        raise UserError(f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {error}") from error


class OnnxEdge:
    """Main, adaptive and extension blocks."""

    def __init__(self, main: Path, extension: Path) -> None:
        self._main, self._extension = session(main), session(extension)

    def main(self, images: Pictures) -> tuple[Kept, Logits]:
        """Main block of (N, H, W, C): what the extension will want, and (N, C) logits."""
        features, logits = self._main.run((FEATURES, LOGITS), {IMAGES: images})
        return (images, features), logits

    def extend(self, kept: Kept, rows: Ints) -> Logits:
        """Adaptive and extension blocks of these rows: (len(rows), H) logits."""
        images, features = kept
        if len(rows) < len(images):
            images, features = images[rows], features[rows]
        logits: Logits = self._extension.run((LOGITS,), {IMAGES: images, FEATURES: features})[0]
        return logits


class OnnxCloud:
    """The cloud's network."""

    def __init__(self, path: Path) -> None:
        self._session = session(path)

    def logits(self, images: Pictures) -> Logits:
        """(N, C) of (N, H, W, C)."""
        logits: Logits = self._session.run((LOGITS,), {IMAGES: images})[0]
        return logits
