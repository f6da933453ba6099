"""From float32 to 8-bit integers: static quantisation on calibration images, and the accuracy that it may cost.

Judged is the edge alone, for no answer of a cloud hides a loss there: the main exit of all images, and the exit rule
with every hard class in use and nothing sent up. Neither depends on an operating point: a new one needs no new
judgement.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from meanet.engines import EdgeEngine, Pictures
from meanet.model_spec import EdgeSpec
from meanet.routing import Policy
from meanet.runtime import EdgeRuntime

MAX_LOSS = 0.003
"""Of accuracy, 0..1: 0.3 points below float32's at most."""
_EXIT = ("AveragePool", "GlobalAveragePool", "ReduceMean", "Gemm", "MatMul")
_SLACK = 1e-9
"""Shares of images are rounded numbers."""

Fed = Mapping[str, NDArray[Any]]
"""A batch of a graph's inputs."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches in the form that ONNX Runtime asks for them."""

    def __init__(self, batches: Iterable[Fed]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Fed | None:
        """The next batch; None after the last."""
        return next(self._batches, None)


def quantise(source: Path, target: Path, batches: Iterable[Fed]) -> None:
    """Weights to signed 7 bits a channel, activations to unsigned 8 bits by the range that these batches show.

    With weights of 8 bits, x86 processors without VNNI add two products in 16 bits and saturate
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html): what was judged on one processor
    would answer otherwise on another. Ranges are means over the batches, which one outlier does not widen. Exits stay
    float32: they cost little, and what they round is the answer.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends what was done
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            nodes = onnx.load(str(prepared)).graph.node
            quantize_static(
                str(prepared),
                str(target),
                _Reader(batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[node.name for node in nodes if node.op_type in _EXIT],
                extra_options={"CalibMovingAverage": True},
            )
            onnx.save(_bytes_as_they_are(onnx.load(str(target))), str(target))
    finally:
        logging.disable(level)


def mean_errors(fp32: EdgeEngine, int8: EdgeEngine, batches: Iterable[Pictures]) -> list[NDArray[np.float64]]:
    """(C,) and (H,): how far int8's logits of the main and the extension exit are from float32's, on average."""
    errors: tuple[list[NDArray[np.float32]], ...] = [], []
    for images in batches:
        every = np.arange(len(images))
        (kept, logits), (kept_too, logits_too) = fp32.main(images), int8.main(images)
        errors[0].append(logits_too - logits)
        errors[1].append(int8.extend(kept_too, every) - fp32.extend(kept, every))
    return [np.concatenate(each).mean(axis=0, dtype=np.float64) for each in errors]


def correct_exit(path: Path, mean_error: NDArray[np.float64]) -> None:
    """Take the mean error of each logit off the exit's bias: rounded weights err to one side (arXiv 1906.04721)."""
    model = onnx.load(str(path))
    exit_ = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    bias = next(each for each in model.graph.initializer if each.name == exit_.input[2])
    corrected = onnx.numpy_helper.to_array(bias) - mean_error
    bias.CopyFrom(onnx.numpy_helper.from_array(corrected.astype(np.float32), bias.name))
    onnx.save(model, str(path))


def _bytes_as_they_are(model: onnx.ModelProto) -> onnx.ModelProto:
    """Bytes that are made floats only to be made the same bytes again (a scale of 1 from 0) stay bytes."""
    graph = model.graph
    numbers = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in casts]:
        if numbers[node.input[1]] != 1 or numbers[node.input[2]] != 0:
            continue
        cast = casts[node.input[0]]
        for other in graph.node:
            other.input[:] = [cast.input[0] if name == node.output[0] else name for name in other.input]
        graph.node.remove(node)
        if not any(cast.output[0] in other.input for other in graph.node):
            graph.node.remove(cast)
    return model


def judge(
    model: EdgeSpec,
    fp32_and_int8: tuple[EdgeEngine, EdgeEngine],
    batches: Iterable[Pictures],
    labels: NDArray[np.int64],
    max_loss: float = MAX_LOSS,
) -> dict[str, Any]:
    """Accuracy of both on labelled images that nothing was chosen on, and whether int8 is kept."""
    policies = {
        "main": Policy(edge_only=True),
        "edge": Policy(hard_classes=model.hard_classes, edge_only=True),
    }
    runtimes = [EdgeRuntime(model, engine) for engine in fp32_and_int8]
    answers: dict[str, list[tuple[NDArray[np.int64], ...]]] = {name: [] for name in policies}
    for images in batches:
        for name, policy in policies.items():
            answers[name].append(tuple(runtime.run(images, policy)[0].pred for runtime in runtimes))
    figures = {}
    for name, parts in answers.items():
        before, after = (np.concatenate(column) for column in zip(*parts, strict=True))
        figures[name] = {
            "accuracy_fp32": float((before == labels).mean()),
            "accuracy": float((after == labels).mean()),
            "same_answers": float((before == after).mean()),
        }
    lost = {name: each["accuracy_fp32"] - each["accuracy"] for name, each in figures.items()}
    worst = max(lost, key=lambda name: lost[name])
    kept = lost[worst] <= max_loss + _SLACK
    reason = (
        f"{worst} loses {100 * lost[worst]:.2f} points of accuracy on validation, and {100 * max_loss:.1f} are allowed"
    )
    return {"kept": kept, "reason": reason, "validation_images": len(labels), "max_loss": max_loss, **figures}
