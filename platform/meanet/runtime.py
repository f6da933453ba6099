"""A trained model as an edge device executes it: conditional and batched. One pass of the main block; the extension
runs only on the samples that go on; the complex ones are handed back for the cloud. What computes is an engine
(`meanet.engines`): torch or ONNX Runtime.

Shape letters: N samples, C classes, H hard classes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet import engines, model_spec
from meanet.engines import CloudEngine, EdgeEngine
from meanet.model_spec import EdgeSpec, ModelSpec
from meanet.preprocessing import transmit
from meanet.routing import (
    Exit,
    Floats,
    Ints,
    Policy,
    Reading,
    first_exit,
    is_hard,
    read,
    read_extension,
    read_main,
    settle,
    still_complex,
)

Images = NDArray[np.uint8]


@dataclass
class Answers:
    """What N samples were answered; filled in place as exits answer."""

    exit: Ints
    """(N,) `Exit` values; CLOUD marks a sample that still waits for the cloud."""
    pred: Ints
    """(N,) class ids."""
    confidence: Floats
    """(N,) 0..1, of the answer."""
    entropy: Floats
    """(N,) nats, of the main exit: what the gate saw."""
    extended: NDArray[np.bool_]
    """(N,) whether adaptive and extension blocks ran."""

    def accept(self, rows: Ints, exit_: Exit, reading: Reading) -> None:
        """Take an exit's answers for these rows."""
        self.exit[rows], self.pred[rows], self.confidence[rows] = exit_, reading.pred, reading.confidence


class EdgeRuntime:
    """Main, adaptive and extension blocks in one process."""

    def __init__(self, model: EdgeSpec, engine: EdgeEngine | None = None) -> None:
        """`engine` runs the blocks; torch, over a trained model's own networks, if not given."""
        self.model = model
        self.engine = engine or engines.in_torch(model)

    def run(self, images: Images, policy: Policy) -> tuple[Answers, "Pending"]:
        """Answer what the edge may answer of (N, H, W, C) images; the others wait in `Pending`."""
        kept, logits = self.engine.main(images)
        main = read_main(logits, policy)
        exits = first_exit(main, policy)
        answers = Answers(
            exits.copy(), main.pred.copy(), main.confidence.copy(), main.entropy, np.zeros(len(images), dtype=bool)
        )
        pending = Pending(kept, main)
        rows = np.flatnonzero(exits == Exit.EXTENSION)
        if len(rows):
            settled = self._extend(rows, pending, answers, policy)
            answers.exit[rows[still_complex(main.take(rows), settled, policy)]] = Exit.CLOUD
        pending.rows = np.flatnonzero(answers.exit == Exit.CLOUD)
        return answers, pending

    def finish(self, answers: Answers, pending: "Pending", policy: Policy, rows: Ints | None = None) -> None:
        """The cloud cannot be had: give waiting samples the edge's best answer (steps 2 and 3 of the rule).

        Args:
            answers: filled in place.
            pending: of the same run.
            policy: of the same run.
            rows: which of the waiting samples; all if None.
        """
        rows = pending.rows if rows is None else rows
        ran = answers.extended[rows]
        answers.exit[rows[ran]] = Exit.EXTENSION  # their answer stands already
        rows = rows[~ran]
        hard = is_hard(pending.main.take(rows), policy)
        answers.accept(rows[~hard], Exit.MAIN, pending.main.take(rows[~hard]))
        if hard.any():
            self._extend(rows[hard], pending, answers, policy)

    def _extend(self, rows: Ints, pending: "Pending", answers: Answers, policy: Policy) -> Reading:
        logits = self.engine.extend(pending.kept, rows)
        settled = settle(pending.main.take(rows), read_extension(logits, policy))
        answers.accept(rows, Exit.EXTENSION, settled)
        answers.extended[rows] = True
        return settled


@dataclass
class Pending:
    """Samples that wait for the cloud, and what the edge needs should it not answer."""

    kept: Any
    """What the engine keeps of the whole batch for its extension block."""
    main: Reading
    """Of the whole batch."""
    rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Which samples wait."""


class CloudRuntime:
    """The cloud's network."""

    def __init__(self, model: EdgeSpec, engine: CloudEngine | None = None) -> None:
        """`engine` runs the network; torch, over a trained model's own, if not given."""
        self.engine = engine or engines.cloud_in_torch(model)

    def run(self, images: Images) -> Reading:
        """Answers for (N, H, W, C) images."""
        return read(self.engine.logits(images))


class Cascade:
    """Edge and cloud in one process, as a registered model answers in plain Python."""

    def __init__(self, model: ModelSpec, edge: EdgeEngine | None = None, cloud: CloudEngine | None = None) -> None:
        self.model = model
        self._edge, self._cloud = EdgeRuntime(model, edge), CloudRuntime(model, cloud)

    @staticmethod
    def open(folder: Path, engine: str = "auto") -> "Cascade":
        """Of a model's folder.

        Raises:
            UserError: it is not whole, or the engine cannot be had.
        """
        engine = engines.choose(folder, engine)
        if engine == "torch":
            return Cascade(engines.in_networks(folder))
        spec = model_spec.read(folder)
        return Cascade(spec, engines.open_edge(folder, engine), engines.open_cloud(folder, engine))

    def classify(self, images: Images, policy: Policy | None = None) -> Answers:
        """Answers for (N, H, W, C) images, by the model's own operating point unless told otherwise."""
        policy = policy or self.model.policy
        answers, pending = self._edge.run(images, policy)
        if len(pending.rows):
            arrived, _ = transmit(images[pending.rows], self.model.energy.payload)
            answers.accept(pending.rows, Exit.CLOUD, self._cloud.run(arrived))
        return answers

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """MLflow's contract: a frame with a column `image` of PNG or JPEG bytes -> a frame of answers."""
        import pandas as pd

        decode = self.model.preprocessing.decode
        images = np.stack([decode(data) for data in model_input["image"]])
        answers = self.classify(images)
        return pd.DataFrame(
            {
                "class_id": answers.pred,
                "class_name": [self.model.class_names[class_id] for class_id in answers.pred],
                "exit": [Exit(value).label for value in answers.exit],
                "confidence": answers.confidence,
                "entropy": answers.entropy,
            }
        )


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> Cascade:
    """MLflow's loader contract: called by `mlflow.pyfunc.load_model` with the artifact's folder.

    Of its `model_config`, `engine` is read: one of `meanet.engines.NAMES`, `auto` if not given.
    """
    return Cascade.open(Path(data_path), (model_config or {}).get("engine", "auto"))
