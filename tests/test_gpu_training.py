"""Training without Ray for a GPU machine: the same loop, cut in two parts and joined again."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, short

from benchmarks import gpu_training
from meanet import artifact
from meanet.data import Splits
from meanet.loop import PHASES, SingleProcess, State
from meanet.recipes import digits
from meanet.training import Trainer


@pytest.fixture(scope="module")
def whole(splits: Splits) -> State:
    return Trainer(short(digits(), 2), splits, SingleProcess()).run()


def test_parts_joined_are_the_platforms_own_run(whole: State, splits: Splits, tmp_path: Path) -> None:
    """Edge and cloud in trainers of their own, by way of their files, bit by bit as one trainer has them."""
    recipe = short(digits(), 2)
    for part, phases in gpu_training.PARTS.items():
        trainer = gpu_training.GraphTrainer(recipe, splits, SingleProcess())
        gpu_training.keep(trainer.run(phases), tmp_path, part)
    state, machine = gpu_training.joined(tmp_path)
    assert machine["torch"] == torch.__version__
    assert [(row["phase"], row["epoch"]) for row in state.history] == [(name, n) for name in PHASES for n in (1, 2)]
    assert [row["loss"] for row in state.history] == [row["loss"] for row in whole.history]
    assert state.hard_classes == whole.hard_classes
    for phase, weights in whole.weights.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, state.weights[phase][name]), f"{phase} {name}"
    model = artifact.from_state(state, splits, recipe)
    assert model.recipe == recipe


def test_orders_and_augmentations_are_drawn_as_the_platform_draws_them(whole: State, splits: Splits) -> None:
    """Where a graph is replayed, the images still come in the loop's own order."""
    seen: list[tuple[int, int]] = []
    trainer = Trainer(short(digits(), 2), splits, SingleProcess())
    train = trainer.feed.train

    def watched(rows, share, seeds, steps):  # type: ignore[no-untyped-def]
        seen.append(seeds)
        return train(rows, share, seeds, steps)

    trainer.feed.train = watched  # type: ignore[method-assign]
    trainer.run(("main",))
    assert seen == [gpu_training._seeds(digits().seed, "main", epoch) for epoch in range(2)]


def test_a_shorter_schedule_says_so_in_its_recipe() -> None:
    """What breaks off keeps its milestones; what is shortened moves them."""
    flags = argparse.Namespace(
        recipe="cifar100_resnet32_b", data="cifar100", seed=3, main_epochs=123, extension_epochs=90, cloud_epochs=7
    )
    flags.max_steps = None
    recipe = gpu_training.configured(flags)
    assert (recipe.main.epochs, recipe.main.milestones) == (123, (60, 120, 160))
    assert (recipe.extension.epochs, recipe.extension.milestones) == (90, (30, 60, 80))
    assert (recipe.cloud.epochs, recipe.cloud.schedule, recipe.seed) == (7, "one_cycle", 3)
    assert recipe.data.source == "parquet:cifar100/train.parquet"


def test_it_takes_neither_ray_nor_what_commands_need() -> None:
    """A GPU machine may have torch and little else."""
    lacking = "ray", "mlflow", "pydantic", "tyro", "optuna", "boto3", "fastapi", "onnx", "onnxruntime"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); "
        "from benchmarks import gpu_training; gpu_training.recipe('cifar100_resnet32_b')"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=120)
