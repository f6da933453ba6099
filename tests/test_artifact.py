"""What crosses between stages: preprocessing, the model's folder, the exits table, the runtime, the report."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from meanet import artifact, report, storage
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.operating_point import Search, search
from meanet.preprocessing import encode_png
from meanet.replay import replay
from meanet.routing import MEASURES, Exit, Policy, read_main, route
from meanet.runtime import Cascade, EdgeRuntime


@pytest.fixture
def folder(model: TrainedModel, tmp_path: Path) -> Path:
    return artifact.save(model, tmp_path / "model")


@pytest.fixture(scope="module")
def found(table: ExitsTable) -> Search:
    return search(table, table.operating_point, MEASURES)


def test_model_survives_its_folder(model: TrainedModel, folder: Path, splits: Splits) -> None:
    loaded = artifact.load(folder)
    for field in dataclasses.fields(TrainedModel):
        if field.name != "networks":
            assert getattr(loaded, field.name) == getattr(model, field.name), field.name
    images = torch.from_numpy(model.preprocessing.normalise(splits.table.images[:16]))
    for name, network in model.networks.trained.items():
        arguments = (images, model.networks.meanet.main(images)[0]) if name == "extension" else (images,)
        one, other = network(*arguments), loaded.networks.trained[name](*arguments)
        for a, b in zip(one if name == "main" else [one], other if name == "main" else [other], strict=True):
            assert torch.equal(a, b)


def test_folder_holds_no_pickle(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for path in folder.iterdir():
        head = path.read_bytes()[:2]
        assert head != b"PK"
        assert not head.startswith(b"\x80")


@pytest.mark.parametrize("name", ["edge.safetensors", "cloud.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_damaged_folder_is_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b'{"format": 1}')
    with pytest.raises(UserError, match=re.escape(str(folder))):
        artifact.load(folder)


def test_format_of_another_version_is_refused(folder: Path) -> None:
    described = json.loads((folder / "model.json").read_text()) | {"format": 99}
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="format 99"):
        artifact.load(folder)


def test_operating_point_of_another_split_is_refused(model: TrainedModel) -> None:
    point = {**(model.operating_point or {}), "hard_classes": list(reversed(model.hard_classes))}
    with pytest.raises(UserError, match="hard classes"):
        _ = model.with_operating_point(point).policy
    with pytest.raises(UserError, match=r"no operating point yet.*jobs.sweep"):
        _ = dataclasses.replace(model, operating_point=None).policy


def picture(array: np.ndarray, kind: str = "PNG") -> bytes:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_images_are_decoded_and_encoded_without_loss(model: TrainedModel, splits: Splits) -> None:
    for image in splits.table.images[:20]:
        np.testing.assert_array_equal(model.preprocessing.decode(encode_png(image)), image)
    decoded = model.preprocessing.decode(picture(splits.table.images[0, ..., 0], "JPEG"))
    assert decoded.shape == (8, 8, 1)


def test_training_images_are_normal_after_normalising(model: TrainedModel, splits: Splits) -> None:
    normal = model.preprocessing.normalise(splits.table.images[splits.train])
    assert normal.shape == (len(splits.train), 1, 8, 8)
    assert abs(normal.mean()) < 1e-3
    assert abs(normal.std() - 1) < 1e-3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"GIF89a", "6 bytes are no readable"),
        (picture(np.zeros((9, 8), np.uint8)), "8x9 pixels and this model takes 8x8"),
        (picture(np.zeros((8, 8, 3), np.uint8)), "mode RGB and this model takes 1 channel"),
        (picture(np.zeros((8, 8), bool)), "mode 1 "),
    ],
)
def test_other_images_are_refused(model: TrainedModel, data: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        model.preprocessing.decode(data)


def test_exits_table_has_its_columns(table: ExitsTable, splits: Splits) -> None:
    schema = table.table.schema
    assert schema.field("main_logits").type == pa.list_(pa.float32(), 10)
    assert schema.field("extension_logits").type == pa.list_(pa.float32(), 5)
    expected = {"split", "index", "label", "cloud_pred", "cloud_confidence"}
    expected |= {f"{exit_}_{what}" for exit_ in ("main", "extension") for what in ("pred", "confidence", "entropy")}
    assert set(schema.names) == expected | {"main_logits", "extension_logits"} | {
        "upload_bytes_png",
        "upload_bytes_raw",
    }
    assert table.table.num_rows == len(splits.validation) + len(splits.test)
    test = table.exits("test")
    np.testing.assert_array_equal(test.labels, splits.table.labels[splits.test])
    np.testing.assert_array_equal(table.index("test"), splits.test)
    sizes = [len(encode_png(image)) for image in splits.table.images[splits.test]]
    assert test.upload_bytes.tolist() == sizes
    assert set(table.exits("test", "raw").upload_bytes) == {64}


def test_exits_table_survives_parquet(table: ExitsTable, tmp_path: Path) -> None:
    path = tmp_path / "exits.parquet"
    storage.write_parquet(table.table, path)
    read = ExitsTable.read(path)
    assert read.table.equals(table.table)
    assert (read.recipe, read.macs, read.hard_classes) == (table.recipe, table.macs, table.hard_classes)
    assert [path.name for path in tmp_path.iterdir()] == ["exits.parquet"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path, _: path.unlink(), "does not exist"),
        (lambda path, _: path.write_bytes(path.read_bytes()[:-200]), "no whole Parquet"),
        (lambda path, table: pq.write_table(table.drop(["cloud_pred"]), path), "lacks the columns cloud_pred"),
        (lambda path, table: pq.write_table(table.replace_schema_metadata({}), path), "metadata"),
    ],
)
def test_damaged_table_is_named(table: ExitsTable, tmp_path: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "exits.parquet"
    storage.write_parquet(table.table, path)
    damage(path, table.table)
    with pytest.raises(UserError, match=says) as caught:
        ExitsTable.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_runtime_answers_as_the_replayed_table(
    model: TrainedModel, table: ExitsTable, splits: Splits, size: int
) -> None:
    test = table.exits("test")
    wanted = route(test.main_logits, test.extension_logits, test.cloud_pred, model.policy)
    images = splits.table.images[splits.test]
    parts = [Cascade(model).classify(images[start : start + size]) for start in range(0, len(images), size)]
    assert np.concatenate([part.exit for part in parts]).tolist() == wanted.exit.tolist()
    assert np.concatenate([part.pred for part in parts]).tolist() == wanted.pred.tolist()
    assert set(wanted.exit) == set(Exit)
    extended = np.concatenate([part.extended for part in parts])
    assert extended.tolist() == (wanted.exit == Exit.EXTENSION).tolist(), "no block runs that need not"


def many_gates(table: ExitsTable) -> list[Policy]:
    """A policy of each kind that sends some of each kind of sample and keeps some."""
    validation, hard = table.exits("validation"), table.hard_classes
    entropy = read_main(validation.main_logits, Policy()).entropy
    low, middle = (float(np.quantile(entropy, share)) for share in (0.4, 0.7))
    limits = tuple(middle if class_id % 3 else low for class_id in range(len(table.class_names)))
    temperatures = {"main": 1.5, "extension": 0.8}
    return [
        Policy("accepted_entropy", (low,), hard, temperatures),
        Policy("two_gate", (middle, low / 3), hard, measures=("main_entropy", "accepted_entropy")),
        Policy("two_gate", (low, middle), hard[:3], temperatures, measures=("accepted_entropy", "main_entropy")),
        Policy("per_class", limits, hard),
        Policy("per_class", tuple(limit / 3 for limit in limits), hard, measures=("accepted_entropy",)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_runtime_answers_as_the_replayed_table_by_every_gate(
    model: TrainedModel, table: ExitsTable, splits: Splits, number: int
) -> None:
    test, policy = table.exits("test"), many_gates(table)[number]
    wanted = route(test.main_logits, test.extension_logits, test.cloud_pred, policy)
    answers = Cascade(model).classify(splits.table.images[splits.test], policy)
    assert answers.exit.tolist() == wanted.exit.tolist()
    assert answers.pred.tolist() == wanted.pred.tolist()
    assert answers.extended.tolist() == wanted.extended.tolist()
    assert set(wanted.exit) == set(Exit)
    waits = policy.measures[-1] == "accepted_entropy"
    assert bool((wanted.extended & (wanted.exit == Exit.CLOUD)).any()) == waits, "paid for, and sent all the same"


@pytest.mark.parametrize("number", range(5))
def test_without_its_cloud_the_edge_answers_as_edge_only(
    model: TrainedModel, table: ExitsTable, splits: Splits, number: int
) -> None:
    policy, images = many_gates(table)[number], splits.table.images[splits.test]
    runtime = EdgeRuntime(model)
    answers, pending = runtime.run(images, policy)
    runtime.finish(answers, pending, policy)
    alone, _ = runtime.run(images, policy.with_request(edge_only=True))
    assert answers.exit.tolist() == alone.exit.tolist()
    assert answers.pred.tolist() == alone.pred.tolist()
    np.testing.assert_allclose(answers.confidence, alone.confidence, rtol=1e-5)


def own_table(**changes: Any) -> pa.Table:
    """A table as a user might write it, without our metadata; columns are replaced, or dropped by None."""
    generator = np.random.default_rng(0)
    columns = {
        "split": ["validation"] * 60 + ["test"] * 40,
        "label": generator.integers(0, 4, 100),
        "main_logits": generator.normal(size=(100, 4)).astype(np.float32).tolist(),
        "extension_logits": generator.normal(size=(100, 2)).tolist(),
        "cloud_pred": generator.integers(0, 4, 100),
        "upload_bytes_png": np.full(100, 900),
    }
    return pa.table({name: value for name, value in (columns | changes).items() if value is not None})


OWN = {"hard_classes": (3, 1), "macs": {"main": 1000, "adaptive": 10, "extension": 100, "cloud": 10**6}}


def test_users_own_table_is_swept() -> None:
    found = ExitsTable(own_table(), "mine", OWN)
    assert found.class_names == ("0", "1", "2", "3")
    swept = search(found, dataclasses.replace(found.operating_point, max_accuracy_loss_vs_cloud=0.5), MEASURES)
    assert swept.to_dict(found)["front"]
    without = ExitsTable(own_table(extension_logits=None), "mine", OWN | {"hard_classes": ()})
    assert search(without, without.operating_point, ["main_entropy"]).points > 60
    with pytest.raises(UserError, match="mine names no recipe"):
        print(without.recipe)


@pytest.mark.parametrize(
    ("changes", "description", "says"),
    [
        ({}, {}, "does not say hard_classes and macs.*--hard-classes.*--macs"),
        ({"upload_bytes_png": None}, OWN, "lacks the columns upload_bytes_png"),
        ({"extension_logits": None}, OWN, "lacks the columns extension_logits"),
        ({"label": [0.5] * 100}, OWN, "column label holds double, and must hold integers"),
        ({"label": [None] + [1] * 99}, OWN, "column label has 1 rows without a value"),
        ({"label": [1] * 99 + [4]}, OWN, r"column label is 4 in row 99 .*0\.\.3"),
        ({"cloud_pred": [-1] + [1] * 99}, OWN, "column cloud_pred is -1 in row 0"),
        ({"upload_bytes_png": [-5] * 100}, OWN, "upload_bytes_png is -5 in row 0 .and 99 more"),
        ({"main_logits": [[0.0, 1.0]] * 99 + [[0.0]]}, OWN, "main_logits has lists of different lengths"),
        ({"main_logits": [1.0] * 100}, OWN, "main_logits holds double, and must hold lists"),
        ({"cloud_pred_jpeg90": [77] * 100, "upload_bytes_jpeg90": [9] * 100}, OWN, "cloud_pred_jpeg90 is 77 in row 0"),
        ({"main_logits": [[0.0, None, 1.0, 2.0]] * 100}, OWN, "main_logits has 100 lists with a missing number"),
        ({"split": [1] * 100}, OWN, "column split holds int64, and must hold text"),
        ({}, OWN | {"hard_classes": (3, 1, 0)}, "2 extension logits and 3 hard classes"),
        ({}, OWN | {"hard_classes": (3, 4)}, r"hard classes \[4\] must be distinct ids of the 4"),
        ({}, OWN | {"macs": {"main": 1}}, "no readable .meanet. metadata"),
        ({}, OWN | {"class_names": ["a"]}, "4 main logits and 1 class names"),
        ({"split": ["validation"] * 100}, OWN, "has no test rows"),
    ],
)
def test_users_own_table_is_checked(changes: dict[str, Any], description: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ExitsTable(own_table(**changes), "mine", description).exits("test")


def test_intervals_hold_the_figures_and_tell_equals(table: ExitsTable, found: Search) -> None:
    answer = found.to_dict(table)
    for row in answer["front"]:
        for figure in ("accuracy", "joules"):
            low, high = row[f"{figure}_interval"]
            assert low - 1e-9 <= row[figure] <= high + 1e-9
        low, high = row["test"]["accuracy_interval"]
        assert low <= row["test"]["accuracy"] <= high
    chosen = [row for row in answer["front"] if row["thresholds"] == answer["operating_point"]["thresholds"]]
    assert chosen[0]["same_as_operating_point"], "a point is the same as itself"
    assert not all(row["same_as_operating_point"] for row in answer["front"])


def test_search_reports_test_beside_validation(table: ExitsTable, found: Search) -> None:
    answer = found.to_dict(table)
    assert answer["points"] > len(answer["front"]) > 0
    point = answer["operating_point"]
    policy = Policy.from_dict(point)
    figures, cloud = replay(table.exits("test"), table.costs, policy), table.exits("test")
    on_test = answer["operating_point_on_test"]
    assert (on_test["accuracy"], on_test["joules"]) == (figures.accuracy, figures.joules)
    assert on_test["accuracy_cloud_only"] == (cloud.cloud_pred == cloud.labels).mean()
    low, high = on_test["accuracy_interval"]
    assert low <= figures.accuracy <= high
    assert on_test["joules_source"] == answer["joules_source"] == "modelled:horowitz_45nm+wifi"
    assert point["expected"]["accuracy"] > 0.5
    assert table.hard_classes[: len(policy.hard_classes)] == policy.hard_classes
    assert sum(point["expected"]["share"].values()) == pytest.approx(1)


def test_report_and_page(table: ExitsTable, found: Search, tmp_path: Path) -> None:
    facts = report.Facts(seed=0, commit="abc", seconds={"train": 1.0}, files={})
    built = report.build(table, found, facts)
    report.write(tmp_path, built, table, found)
    assert json.loads((tmp_path / "report.json").read_text()) == built
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=\"https?://(?!www.w3.org)", page)
    text = report.text_table(built)
    assert all(name in text for name in built["policies"])
    assert f"{built['samples']} test images" in report.summary(built)


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written.*--output"):
        storage.writable_directory(tmp_path / "file" / "run")


def test_saving_again_without_an_operating_point_drops_the_old_one(model: TrainedModel, folder: Path) -> None:
    artifact.save(dataclasses.replace(model, operating_point=None), folder)
    assert artifact.load(folder).operating_point is None
