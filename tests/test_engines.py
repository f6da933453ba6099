"""Engines: what was exported answers as torch does, and int8 is kept only where its accuracy allows."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from meanet import artifact, engines, onnx_export
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.data.table import ImageTable, Rows
from meanet.engines import Exported, Logits, Pictures
from meanet.errors import UserError
from meanet.images import Pixels
from meanet.onnx_export import exported_already
from meanet.quantisation import judge
from meanet.routing import Ints, Policy
from meanet.runtime import Cascade, EdgeRuntime


@dataclasses.dataclass(frozen=True)
class Watched(ImageTable):
    """A table that remembers which rows were asked for."""

    seen: list[Rows] = dataclasses.field(default_factory=list)

    def batches(self, rows: Rows, size: int) -> Iterator[Pixels]:
        self.seen.append(rows)
        return super().batches(rows, size)


@pytest.fixture(scope="module")
def watched(splits: Splits) -> Watched:
    table = splits.table
    assert isinstance(table, ImageTable)
    return Watched(**{field.name: getattr(table, field.name) for field in dataclasses.fields(ImageTable)})


@pytest.fixture(scope="module")
def exported(model: TrainedModel, splits: Splits, watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder with every engine, whatever int8 loses."""
    folder = artifact.save(model, tmp_path_factory.mktemp("exported") / "model")
    onnx_export.export(model, folder, dataclasses.replace(splits, table=watched), max_loss=1.0)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(exported, tmp_path / "model")


def described(folder: Path) -> Exported:
    found = Exported.read(folder)
    assert found is not None
    return found


def test_onnx_answers_as_torch(model: TrainedModel, exported: Path, splits: Splits) -> None:
    images, policy = splits.table.images[splits.test], model.policy  # type: ignore[attr-defined]
    onnx, torch = Cascade.open(exported, "onnx"), Cascade(model)
    wanted = torch.classify(images)
    assert len(set(wanted.exit)) == 3, "every block is asked"
    for size in (1, 7, len(images)):
        parts = [onnx.classify(images[start : start + size], policy) for start in range(0, len(images), size)]
        for name in ("exit", "pred", "extended"):
            found = np.concatenate([getattr(part, name) for part in parts])
            assert found.tolist() == getattr(wanted, name).tolist(), (name, size)
        np.testing.assert_allclose(np.concatenate([part.confidence for part in parts]), wanted.confidence, atol=1e-4)


def test_int8_answers_nearly_as_torch(model: TrainedModel, exported: Path, splits: Splits) -> None:
    """And not just so: it is another network."""
    images = splits.table.images[splits.validation]  # type: ignore[attr-defined]
    (kept, int8), (_, torch) = (engines.open_edge(exported, name).main(images) for name in ("onnx_int8", "torch"))
    assert (int8.argmax(1) == torch.argmax(1)).mean() > 0.95
    assert 0 < np.abs(int8 - torch).max() < 0.2 * np.abs(torch).max()
    assert kept[0] is images


def test_judgement_is_what_the_engines_answer(model: TrainedModel, exported: Path, splits: Splits) -> None:
    images = splits.table.images[splits.validation]  # type: ignore[attr-defined]
    labels, said = splits.table.labels[splits.validation], described(exported).int8
    assert said is not None
    assert said["validation_images"] == len(splits.validation)
    policies = {"main": Policy(edge_only=True), "edge": Policy(hard_classes=model.hard_classes, edge_only=True)}
    for name, policy in policies.items():
        runtimes = {kind: EdgeRuntime(model, engines.open_edge(exported, kind)) for kind in ("onnx", "onnx_int8")}
        accuracy = {kind: (each.run(images, policy)[0].pred == labels).mean() for kind, each in runtimes.items()}
        assert said[name]["accuracy_fp32"] == pytest.approx(accuracy["onnx"])
        assert said[name]["accuracy"] == pytest.approx(accuracy["onnx_int8"])


def test_calibration_sees_training_images_and_the_judge_validation(
    exported: Path, watched: Watched, splits: Splits
) -> None:
    """Nothing asks for a test image."""
    calibration, said = 0, described(exported).int8
    assert said is not None
    for rows in watched.seen:
        assert not np.isin(rows, splits.test).any()
        calibration += len(rows) if np.isin(rows, splits.train).all() else 0
    assert calibration == said["calibration_images"] == min(512, len(splits.train))


class Saying:
    """An engine whose main exit says what it was given."""

    def __init__(self, answers: list[int]) -> None:
        self._answers = iter(answers)

    def main(self, images: Pictures) -> tuple[None, Logits]:
        return None, np.eye(10, dtype=np.float32)[[next(self._answers) for _ in images]]

    def extend(self, kept: None, rows: Ints) -> Logits:
        return np.zeros((len(rows), 5), dtype=np.float32)


@pytest.mark.parametrize(("wrong", "kept"), [(0, True), (3, True), (4, False), (-5, True)])
def test_three_in_a_thousand_may_be_lost(model: TrainedModel, wrong: int, kept: bool) -> None:
    """Of a thousand images that float32 answers rightly but for ten."""
    easy = next(class_id for class_id in range(10) if class_id not in model.hard_classes)
    other = next(class_id for class_id in range(10) if class_id not in (*model.hard_classes, easy))
    labels = np.full(1000, easy)
    answers = [[other] * count + [easy] * (1000 - count) for count in (10, 10 + wrong)]
    images = np.zeros((1000, 8, 8, 1), dtype=np.uint8)
    said = judge(model, (Saying(answers[0] * 2), Saying(answers[1] * 2)), [images], labels)
    assert said["kept"] == kept
    assert said["main"]["accuracy_fp32"] == 0.99
    assert said["edge"]["accuracy"] == pytest.approx(0.99 - wrong / 1000)
    assert f"{wrong / 10:.2f} points" in said["reason"]


def test_int8_weights_have_seven_bits(exported: Path) -> None:
    """With eight, processors without VNNI saturate, and answer otherwise than the one that judged."""
    for name in ("main_int8.onnx", "extension_int8.onnx"):
        numbers = [onnx.numpy_helper.to_array(one) for one in onnx.load(exported / name).graph.initializer]
        weights = [one for one in numbers if one.dtype == np.int8 and one.ndim == 4]
        assert len(weights) >= 2
        assert max(np.abs(one.astype(np.int16)).max() for one in weights) == 64


def test_int8_that_loses_too_much_is_not_kept(
    model: TrainedModel, exported: Path, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact.save(model, tmp_path / "model")
    (folder / "main_int8.onnx").write_bytes(b"of an earlier export")

    def as_before(_model: TrainedModel, target: Path) -> tuple[str, ...]:
        names = ("main.onnx", "extension.onnx", "cloud.onnx")
        for name in names:
            shutil.copy(exported / name, target)
        return names

    monkeypatch.setattr(onnx_export, "_export_fp32", as_before)  # seconds of torch's exporter
    found = onnx_export.export(model, folder, splits, max_loss=-1.0)
    assert found == described(folder)
    assert found.int8 is not None
    assert not found.int8["kept"]
    assert "-100.0 are allowed" in found.int8["reason"]
    assert set(found.files) == {"main.onnx", "extension.onnx", "cloud.onnx"} == {p.name for p in folder.glob("*.onnx")}
    assert engines.choose(folder) == "onnx"
    assert exported_already(folder, "int8"), "it need not be tried again"


def without_int8(folder: Path) -> None:
    """As export leaves it where int8 lost too much."""
    plain = json.loads((folder / "engines.json").read_text())
    plain["files"] = {name: sha for name, sha in plain["files"].items() if "int8" not in name}
    plain["int8"] |= {"kept": False, "reason": "main loses 9.00 points"}
    (folder / "engines.json").write_text(json.dumps(plain))


def test_the_best_that_there_is_is_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [engines.choose(folder, name) for name in engines.NAMES] == ["onnx", "torch", "onnx", "onnx_int8"]
    without_int8(folder)
    assert engines.choose(folder) == "onnx"
    with pytest.raises(UserError, match=r"no engine onnx_int8 \(main loses 9.00 points\): choose one of onnx, torch"):
        engines.choose(folder, "onnx_int8")
    with pytest.raises(UserError, match="unknown engine 'tpu': choose one of auto, torch, onnx, onnx_int8"):
        engines.choose(folder, "tpu")
    monkeypatch.setattr(engines, "find_spec", lambda _name: None)
    assert engines.choose(folder) == "torch"
    with pytest.raises(UserError, match=r"onnxruntime, which is not installed: install meanet\[edge\]"):
        engines.choose(folder, "onnx")
    (folder / "engines.json").unlink()
    with pytest.raises(UserError, match="torch is not installed"):
        engines.open_edge(folder)


def test_a_model_without_engines_runs_in_torch(model: TrainedModel, tmp_path: Path) -> None:
    """As those registered before there were any."""
    folder = artifact.save(model, tmp_path / "model")
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    assert engines.choose(folder) == "torch"
    wanted = Cascade(model).classify(images)
    assert Cascade.open(folder).classify(images).pred.tolist() == wanted.pred.tolist()
    with pytest.raises(UserError, match="no engine onnx: choose one of torch"):
        engines.open_cloud(folder, "onnx")


@pytest.mark.parametrize("name", ["main_int8.onnx", "extension_int8.onnx"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_that_is_not_what_was_exported_is_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-9])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path} is not the file that was exported")):
        engines.open_edge(folder, "onnx_int8")
    assert not exported_already(folder, "int8")
    assert engines.open_edge(folder, "onnx")


def test_a_file_that_onnx_runtime_cannot_load_is_named(folder: Path) -> None:
    plain = json.loads((folder / "engines.json").read_text())
    (folder / "cloud.onnx").write_bytes(b"no graph")
    plain["files"]["cloud.onnx"] = engines.digest(folder / "cloud.onnx")
    (folder / "engines.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"cloud.onnx cannot be loaded by ONNX Runtime"):
        engines.open_cloud(folder)


def test_what_was_exported_holds_for_its_weights_alone(model: TrainedModel, folder: Path, tmp_path: Path) -> None:
    assert exported_already(folder, "int8")
    assert exported_already(folder, "onnx")
    engines.copy(folder, artifact.save(model, tmp_path / "copy"))
    assert exported_already(tmp_path / "copy", "int8"), "another operating point is another folder of the same weights"
    weights = folder / "edge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert not exported_already(folder, "onnx")
    artifact.save(model, folder)
    assert not (folder / "engines.json").exists()
    assert not exported_already(folder, "onnx")
    assert exported_already(folder, "none")


def test_an_export_that_answers_otherwise_is_refused(
    model: TrainedModel, exported: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_TOLERANCE", 1e-12)
    with pytest.raises(UserError, match=r"may be 1e-12: register with --engines none"):
        onnx_export._compare(model, exported, splits)
