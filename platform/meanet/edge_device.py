"""The edge part alone, on a device without Ray and torch: `pip install 'meanet[edge]'`, then

    python -m meanet.edge_device MODEL_FOLDER IMAGE... [--engine auto] [--cloud http://host:8000] [--json]

answers PNG or JPEG files by the model's operating point. MODEL_FOLDER needs model.json, operating_point.json,
engines.json and the edge's ONNX files. What is too complex for the edge goes to a MEANet server's /v1/classify, in the
bytes that it has; without a server, or where it does not answer, the edge's best answer stands and says that it is
degraded. Joules are the device's, by the profiles that the model names.
"""

import argparse
import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from meanet import engines, model_spec
from meanet.errors import UserError, exit_on_user_error
from meanet.routing import Exit, Policy
from meanet.runtime import Answers, EdgeRuntime

_BATCH = 64
"""Images a pass at most, so that memory is bounded."""


@dataclass(frozen=True)
class DeviceAnswer:
    """What one image was answered."""

    class_id: int
    class_name: str
    exit: str
    """main, extension or cloud."""
    confidence: float
    """0..1, of the answer."""
    entropy: float | None
    """Nats, of the main exit; None where its logits are not finite."""
    degraded: bool = False
    """Whether the cloud was wanted and not had."""
    reason: str | None = None
    """Why not."""
    joules: dict[str, Any] | None = None
    """edge_compute and upload, J, of this device, and their source; None where the folder does not say them."""


@dataclass(frozen=True)
class Cloud:
    """A MEANet server that takes what is too complex."""

    url: str
    """Up to the path: http://host:8000."""
    timeout_s: float = 5.0
    """For one image, seconds."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise UserError(f"--cloud is {self.url!r}: give a server's address, http://host:8000")
        if not 0 < self.timeout_s < math.inf:
            raise UserError(f"--timeout is {self.timeout_s}: it must be above 0 seconds")

    def classify(self, data: bytes) -> dict[str, Any]:
        """The server's answer to one image.

        Raises:
            OSError: there is none in time.
            ValueError: it is no answer.
        """
        address, headers = f"{self.url.rstrip('/')}/v1/classify", {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(address, data, headers)  # noqa: S310 (checked above)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:  # noqa: S310
            answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise ValueError("the answer is no JSON object")
        return answer


class EdgeDevice:
    """A model's edge part, ready to answer."""

    def __init__(self, folder: Path, engine: str = "auto", cloud: Cloud | None = None) -> None:
        self.spec = model_spec.read_edge(folder)
        self.policy = self.spec.policy
        self._joules = model_spec.read_joules(folder)
        self._runtime = EdgeRuntime(self.spec, engines.open_edge(folder, engine))
        self._cloud = cloud

    def answer(self, bodies: Sequence[bytes]) -> list[DeviceAnswer]:
        """The answers to PNG or JPEG bytes, in order.

        Raises:
            UserError: bytes that are no image, or not one that the model takes.
        """
        found: list[DeviceAnswer] = []
        for start in range(0, len(bodies), _BATCH):
            found += self._answer(bodies[start : start + _BATCH], self.policy)
        return found

    def _answer(self, bodies: Sequence[bytes], policy: Policy) -> list[DeviceAnswer]:
        images = np.stack([self.spec.preprocessing.decode(data) for data in bodies])
        answers, pending = self._runtime.run(images, policy)
        asked = {row: self._ask(bodies[row], answers.entropy[row]) for row in pending.rows.tolist()}
        self._runtime.finish(answers, pending, policy)
        edge = [self._of(answers, row) for row in range(len(bodies))]
        for row, got in asked.items():
            edge[row] = got if isinstance(got, DeviceAnswer) else replace(edge[row], degraded=True, reason=got)
        if self._joules is None:
            return edge
        sent = {row: len(bodies[row]) for row in asked} if self._cloud else {}
        spent = [
            self._joules.of(extended=bool(extended), num_bytes=sent.get(row))
            for row, extended in enumerate(answers.extended)
        ]
        return [replace(answer, joules=joules) for answer, joules in zip(edge, spent, strict=True)]

    def _of(self, answers: Answers, row: int) -> DeviceAnswer:
        class_id = int(answers.pred[row])
        return DeviceAnswer(
            class_id=class_id,
            class_name=self.spec.class_names[class_id],
            exit=Exit(answers.exit[row]).label,
            confidence=float(answers.confidence[row]),
            entropy=_finite(answers.entropy[row]),
        )

    def _ask(self, data: bytes, entropy: float) -> DeviceAnswer | str:
        """The cloud's answer, or why there is none."""
        if self._cloud is None:
            return "no cloud given"
        try:
            got = self._cloud.classify(data)
            class_id, confidence = int(got["class_id"]), float(got["confidence"])
            if not (0 <= class_id < len(self.spec.class_names) and 0 <= confidence <= 1):
                return f"cloud answered class {class_id} at confidence {confidence}"
            if got.get("degraded"):
                return f"server: {got.get('reason')}"
        except urllib.error.HTTPError as error:
            return f"cloud answered {error.code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"cloud failed: {type(error).__name__}"
        return DeviceAnswer(class_id, self.spec.class_names[class_id], "cloud", confidence, _finite(entropy))


def _finite(entropy: float) -> float | None:
    return float(entropy) if math.isfinite(entropy) else None


def _joules(answer: DeviceAnswer) -> str:
    if answer.joules is None:
        return ""
    return f"  {answer.joules['edge_compute'] + answer.joules['upload']:.3g} J ({answer.joules['source']})"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give PNG or JPEG files") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m meanet.edge_device", description="Answer images on the edge.")
    parser.add_argument("model", type=Path, help="a model's folder")
    parser.add_argument("images", type=Path, nargs="+", help="PNG or JPEG files")
    parser.add_argument("--engine", default="auto", choices=engines.NAMES, help="what runs the blocks")
    parser.add_argument("--cloud", metavar="URL", help="a MEANet server for what is too complex")
    parser.add_argument("--timeout", type=float, default=5.0, help="for the server's answer, seconds an image")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    asked = _parser().parse_args()
    cloud = Cloud(asked.cloud, asked.timeout) if asked.cloud else None
    device = EdgeDevice(asked.model, asked.engine, cloud)
    bodies = [_read(path) for path in asked.images]
    for path, answer in zip(asked.images, device.answer(bodies), strict=True):
        if asked.json:
            print(json.dumps({"image": str(path), **asdict(answer)}))
        else:
            note = f"  (degraded: {answer.reason})" if answer.degraded else ""
            print(f"{path}  {answer.class_name}  {answer.exit}  {answer.confidence:.3f}{_joules(answer)}{note}")


if __name__ == "__main__":
    main()
