"""The whole work of an answer in one process, as plain as it can be written: decode, ONNX Runtime, exit rule.

The other servers call it, and a loop over it is the limit that none can pass. Needs numpy, Pillow and onnxruntime; the
folder that it reads is written by `benchmarks.serving_model`.
"""

import http.client
import io
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

CloudAnswers = list[tuple[int, float]]
"""Class id and confidence of each image."""
MAX_BATCH = 64


def session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, as all servers here have it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def decode(bodies: Sequence[bytes]) -> Any:
    """(N, H, W, C) bytes: the files scale pixels themselves."""
    return np.stack([np.asarray(Image.open(io.BytesIO(body), formats=("PNG", "JPEG"))) for body in bodies])


def softmax(logits: Any) -> Any:
    """By row."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


class Edge:
    """Main block on the batch; the extension on what main calls hard; the cloud for what is uncertain."""

    def __init__(self, folder: Path, ask_cloud: Callable[[Sequence[bytes]], CloudAnswers] | None = None) -> None:
        described = json.loads((folder / "served.json").read_text())
        self._main, self._path = session(folder / "main.onnx"), session(folder / "extension.onnx")
        self._names = described["class_names"]
        self._classes = np.array(described["hard_classes"])
        self._hard = np.isin(np.arange(len(self._names)), self._classes)
        self._threshold = described["threshold"] if ask_cloud else np.inf
        self._ask = ask_cloud

    def predict(self, bodies: Sequence[bytes]) -> list[dict[str, Any]]:
        """The answers, in order."""
        images = decode(bodies)
        features, logits = self._main.run(["features", "logits"], {"images": images})
        p = softmax(logits)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=1)
        pred, confidence = p.argmax(axis=1), p.max(axis=1)
        exits = np.where(entropy > self._threshold, 2, np.where(self._hard[pred], 1, 0))
        rows = np.flatnonzero(exits == 1)
        if len(rows):
            (logits,) = self._path.run(None, {"images": images[rows], "features": features[rows]})
            q = softmax(logits)
            better = q.max(axis=1) >= confidence[rows]
            pred[rows] = np.where(better, self._classes[q.argmax(axis=1)], pred[rows])
            confidence[rows] = np.where(better, q.max(axis=1), confidence[rows])
        rows = np.flatnonzero(exits == 2)
        if len(rows) and self._ask:
            for row, (class_id, sure) in zip(rows, self._ask([bodies[row] for row in rows]), strict=True):
                pred[row], confidence[row] = class_id, sure
        columns = zip(pred.tolist(), exits.tolist(), confidence.tolist(), entropy.tolist(), strict=True)
        return [
            {
                "class_id": class_id,
                "class_name": self._names[class_id],
                "exit": ("main", "extension", "cloud")[exit_],
                "confidence": sure,
                "entropy": nats,
            }
            for class_id, exit_, sure, nats in columns
        ]


class Cloud:
    """The deep network."""

    def __init__(self, folder: Path) -> None:
        self._network = session(folder / "cloud.onnx")

    def classify(self, bodies: Sequence[bytes]) -> CloudAnswers:
        """Class ids and confidences, in order."""
        (logits,) = self._network.run(None, {"images": decode(bodies)})
        p = softmax(logits)
        return list(zip(p.argmax(axis=1).tolist(), p.max(axis=1).tolist(), strict=True))


def pack(bodies: Sequence[bytes]) -> bytes:
    """Many images in one body: each after its length."""
    return b"".join(part for body in bodies for part in (struct.pack("<I", len(body)), body))


def unpack(data: bytes) -> list[bytes]:
    """What `pack` made."""
    bodies, place = [], 0
    while place < len(data):
        (size,) = struct.unpack_from("<I", data, place)
        bodies.append(data[place + 4 : place + 4 + size])
        place += 4 + size
    return bodies


class HttpCloud:
    """Asks a cloud at the other end of one kept connection, a call a batch."""

    def __init__(self, address: str, path: str) -> None:
        self._address, self._path = address, path
        self._connection: http.client.HTTPConnection | None = None

    def __call__(self, bodies: Sequence[bytes]) -> CloudAnswers:
        """Class ids and confidences, in order."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._address, timeout=30)
        try:
            return self._asked(self._connection, pack(bodies))
        except (http.client.HTTPException, OSError):  # an idle connection was closed: once more
            self._connection.close()
            return self._asked(self._connection, pack(bodies))

    def _asked(self, connection: http.client.HTTPConnection, body: bytes) -> CloudAnswers:
        connection.request("POST", self._path, body, {"content-type": "application/octet-stream"})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"the cloud answered {response.status}: {content[:200]!r}")
        answers: CloudAnswers = json.loads(content)
        return answers
