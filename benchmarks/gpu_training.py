"""A CIFAR-100 recipe on one GPU, without Ray: `python -m benchmarks.gpu_training --data cifar100 --output outputs/gpu`
-> outputs/gpu/model, exits.parquet, history.json: what `jobs.train` and `jobs.evaluate` leave, for benchmarks.cifar100.

Runs on any CUDA machine (and, slowly, without one) that has torch, torchvision, NumPy, Pillow, pyarrow and safetensors,
with PYTHONPATH=platform. `--data` is a folder with train.parquet and test.parquet in the hubs' layout. Phases, split,
loop and feed are the platform's own (meanet.training). Two processes share the GPU: one trains main and then extension,
the other the cloud network, which needs neither.

A step of ResNet-32 at batch 128 is several hundred kernels of a few microseconds: it is captured once as a CUDA graph
and replayed (Gray et al., developer.nvidia.com/blog/cuda-graphs, 2019), with the rate in a tensor that steps overwrite.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from meanet import artifact, data, storage
from meanet.config import PhaseConfig, Recipe
from meanet.evaluation import exits_table
from meanet.loop import PHASES, Epoch, PhaseRunner, SingleProcess, State, autocast, learning_rate
from meanet.recipes import recipe
from meanet.training import Trainer

PARTS = {"edge": ("main", "extension"), "cloud": ("cloud",)}
_EAGER_STEPS = 8
"""Steps before the capture: cuDNN chooses its kernels, momentum comes to be."""
_SAVE_EVERY = 20


class GraphRunner(PhaseRunner):
    """A phase whose step is a CUDA graph; without a GPU, the platform's own loop."""

    compiles = False
    _graph: torch.cuda.CUDAGraph | None = None

    def _train_epoch(self, epoch: int) -> float:
        device = self.worker.device
        if device.type != "cuda":
            return super()._train_epoch(epoch)
        if self._graph is None:
            self._rate = torch.zeros((), device=device)
            self._side = torch.cuda.Stream()
        seeds = _seeds(self.seed, self.phase.name, epoch)
        batches = self.feed.train(self.phase.train_rows, self.share, seeds, self.steps)
        self.module.train()
        total, rate = torch.zeros((), device=device), 0.0
        for step, (rows, images) in enumerate(batches):
            rate = learning_rate(self.phase.config, epoch * self.steps + step, self.steps)
            self._rate.fill_(rate)
            if self._graph is not None:
                self._rows.copy_(rows)
                self._images.copy_(images)
                self._graph.replay()
                total += self._loss
                continue
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                total += self._step(rows, images)
            torch.cuda.current_stream().wait_stream(self._side)
            if step + 1 == min(_EAGER_STEPS, self.steps):
                self._capture(rows, images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate  # for the history; the graph has its own
        return float(total) / self.steps

    def _capture(self, rows: Tensor, images: Tensor) -> None:
        """Record a step; nothing is trained by it."""
        self._rows, self._images = rows.clone(), images.clone()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            self._loss = self._step(self._rows, self._images)
        self._graph = graph

    def _step(self, rows: Tensor, images: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        with autocast(self.worker.device, enabled=self.mixed):
            logits = self.phase.forward(self.module, images, rows)
        smoothing = self.phase.config.label_smoothing
        loss = F.cross_entropy(logits.float(), self.labels[rows], label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


class EagerRunner(PhaseRunner):
    """The platform's own loop, as it is without a compiler."""

    compiles = False


class GraphTrainer(Trainer):
    """The platform's trainer with steps as CUDA graphs."""

    runner = GraphRunner


class EagerTrainer(Trainer):
    """The platform's trainer, kernel by kernel: what the graphs are checked against."""

    runner = EagerRunner


def _seeds(seed: int, phase: str, epoch: int) -> tuple[int, int]:
    """As the platform's loop draws them."""
    drawn = np.random.SeedSequence([seed, PHASES.index(phase), epoch]).generate_state(2)
    return int(drawn[0]), int(drawn[1])


def configured(flags: argparse.Namespace) -> Recipe:
    """The recipe as it is trained here: the authors' schedule on the edge, one cycle in the cloud, bfloat16."""
    base = recipe(flags.recipe)
    shorter = flags.extension_epochs / base.extension.epochs
    changed = {
        "main": {"epochs": flags.main_epochs},
        "extension": {
            "epochs": flags.extension_epochs,
            "milestones": tuple(max(1, round(at * shorter)) for at in base.extension.milestones),
        },
    }
    cloud = PhaseConfig(
        epochs=flags.cloud_epochs, batch_size=256, learning_rate=0.4, weight_decay=5e-4, label_smoothing=0.1
    )
    phases = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in changed.items()}
    phases = {
        name: dataclasses.replace(phase, max_steps=flags.max_steps)
        for name, phase in {**phases, "cloud": cloud}.items()
    }
    images = dataclasses.replace(
        base.data,
        feed="resident",
        source=f"parquet:{flags.data}/train.parquet",
        test_source=f"parquet:{flags.data}/test.parquet",
    )
    return dataclasses.replace(base, data=images, precision="bfloat16", seed=flags.seed, **phases)


def train_part(flags: argparse.Namespace, part: str) -> None:
    """Train the phases of one part, keeping weights and history every few epochs."""
    started = time.perf_counter()
    chosen = configured(flags)
    splits = data.divide(data.load(chosen.data), chosen.data, chosen.seed)
    print(f"{part}: data after {time.perf_counter() - started:.0f} s, digest {splits.table.digest[:12]}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True

    def on_epoch(row: Epoch, state: State) -> None:
        last = row.epoch == row.epochs
        if last or row.epoch <= 3 or row.epoch % 10 == 0:
            print(
                f"{part} {time.perf_counter() - started:5.0f} s {row.phase} {row.epoch}/{row.epochs} loss "
                f"{row.loss:.3f} validation {row.validation_accuracy:.2%} {row.seconds:.2f} s",
                flush=True,
            )
        if last or row.epoch % _SAVE_EVERY == 0:
            keep(state, flags.output, part)

    trainer = (EagerTrainer if flags.eager else GraphTrainer)(chosen, splits, SingleProcess(on_epoch, device))
    keep(trainer.run(PARTS[part]), flags.output, part)


def keep(state: State, folder: Path, part: str) -> None:
    """Weights and history of a part."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{phase}/{name}": tensor.detach().cpu().contiguous()
        for phase, tensors in state.weights.items()
        for name, tensor in tensors.items()
    }
    save_file(weights, folder / f"{part}.part.safetensors")
    facts = {
        "history": state.history,
        "hard_classes": state.hard_classes,
        "class_precision": state.class_precision,
        "machine": machine(),
    }
    storage.write_text(json.dumps(facts), folder / f"{part}.part.json")


def joined(folder: Path) -> tuple[State, dict[str, Any]]:
    """The finished state of both parts, and where they were trained."""
    state, trained_on = State({}, phase=len(PHASES)), dict[str, Any]()
    for part in PARTS:
        facts = json.loads((folder / f"{part}.part.json").read_text(encoding="utf-8"))
        trained_on = facts["machine"]
        state.history += facts["history"]
        if facts["hard_classes"]:
            state.hard_classes, state.class_precision = facts["hard_classes"], facts["class_precision"]
        for name, tensor in load_file(folder / f"{part}.part.safetensors").items():
            phase, _, place = name.partition("/")
            state.weights.setdefault(phase, {})[place] = tensor
    return state, trained_on


def finish(folder: Path, chosen: Recipe) -> None:
    """Model, exits table and history of what both parts left."""
    state, trained_on = joined(folder)
    splits = data.divide(data.load(chosen.data), chosen.data, chosen.seed)
    model = artifact.from_state(state, splits, chosen)
    artifact.save(model, folder / "model")
    torch.backends.cudnn.allow_tf32 = False  # the exits in full float32, as a CPU has them
    if torch.cuda.is_available():
        for module in (model.networks.meanet, model.networks.cloud):
            module.cuda()
    storage.write_parquet(exits_table(model, splits), folder / "exits.parquet")
    storage.write_text(json.dumps({"machine": trained_on, "phases": state.history}), folder / "history.json")


def machine() -> dict[str, Any]:
    """What trains here."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def main() -> None:
    """Command-line entry; argparse, because such a machine may have nothing but torch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--recipe", default="cifar100_resnet32_b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--main-epochs", type=int, default=180, help="after which main's schedule breaks off")
    parser.add_argument("--extension-epochs", type=int, default=180, help="of extension's; its milestones scale")
    parser.add_argument("--cloud-epochs", type=int, default=60, help="of the cloud network's one cycle")
    parser.add_argument("--max-steps", type=int, help="steps an epoch at most, to try things out")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one, to check the graphs by")
    parser.add_argument("--only", choices=[*PARTS, "finish"], help="one part, or what follows them, in this process")
    flags = parser.parse_args()
    started = time.perf_counter()
    if flags.only in PARTS:
        train_part(flags, flags.only)
        return
    if flags.only is None:
        command = [sys.executable, "-m", "benchmarks.gpu_training", *sys.argv[1:], "--only"]
        parts = [subprocess.Popen([*command, part]) for part in PARTS]
        codes = [part.wait() for part in parts]
        if any(codes):
            raise SystemExit("a part was not trained to its end: what it said stands above")
    finish(flags.output, configured(flags))
    print(f"done after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
