"""A run's folder without an hour of training, and commands called in this process: for what needs neither."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs._run import Record, RunFolder
from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.models import bytes_moved_of, macs_of
from meanet.preprocessing import Preprocessing
from meanet.recipes import digits
from meanet.training import build_networks

Call = Callable[..., SimpleNamespace]


def untrained_model(splits: Splits) -> TrainedModel:
    """The digits' networks as they are initialised: enough where it does not matter what they answer."""
    recipe = digits()
    preprocessing = Preprocessing.of(splits)
    networks = build_networks(recipe, preprocessing.image_shape, 10)
    networks.meanet.eval()
    networks.cloud.eval()
    return TrainedModel(
        recipe=recipe,
        class_names=splits.table.class_names,
        hard_classes=(3, 8, 9, 1, 5),
        class_precision=(0.5,) * 10,
        preprocessing=preprocessing,
        macs=macs_of(networks.meanet, networks.cloud, preprocessing.image_shape),
        bytes_moved=bytes_moved_of(networks.meanet, preprocessing.image_shape),
        data_digest=splits.table.digest,
        networks=networks,
    )


def run_folder_of(model: TrainedModel, root: Path) -> Path:
    """What a finished training leaves in `root/digits`, its MLflow store in `root`."""
    folder = root / "digits"
    artifact.save(model, folder / "model")
    record = Record("1", "digits", digits().digest(), store_of(root), seconds={"train": 1.0})
    RunFolder(folder, record, resumed=True).save()
    return folder


def store_of(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


def caller(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command's `main` in `root`; an escaping exception (a stack trace) fails the test."""

    def run(module: Any, *words: str) -> SimpleNamespace:
        monkeypatch.chdir(root)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store_of(root))
        monkeypatch.setattr(sys, "argv", ["job", *words])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run
