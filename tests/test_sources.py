"""Folders and Parquet as users have them: what is read, what is refused, and what is skipped and named."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import coloured, encode, image_folder, parquet
from PIL import Image

from meanet import data
from meanet.config import DataConfig
from meanet.data import ImageTable, StreamedTable
from meanet.data.loading import load, resident_limit
from meanet.data.shards import write
from meanet.errors import UserError
from meanet.images import BadImageError

NAMES = ("ant", "bee", "cat")


def config(source: str, **changes: object) -> DataConfig:
    return dataclasses.replace(DataConfig(source=source), **changes)  # type: ignore[arg-type]


def rows(count: int, size: int = 12) -> list[tuple[bytes | None, int | None]]:
    return [(encode(coloured(number % 3, size, number)), number % 3) for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", 3, 20, 12, name_of=lambda class_id: NAMES[class_id])


def test_folder_is_read_as_image_folder_reads_it(folder: Path) -> None:
    """Classes in alphabetical order, files in theirs; pixels as they were drawn."""
    table = load(config(f"folder:{folder}"))
    assert isinstance(table, ImageTable)
    assert table.class_names == NAMES
    assert table.images.shape == (60, 12, 12, 3)
    np.testing.assert_array_equal(table.labels, np.repeat([0, 1, 2], 20))
    np.testing.assert_array_equal(table.images[25], coloured(1, 12, 5))
    assert table.skipped.total == 0


def test_parquet_is_read_with_its_names(tmp_path: Path) -> None:
    table = load(config(f"parquet:{parquet(tmp_path / 'a.parquet', rows(40), NAMES)}"))
    assert isinstance(table, ImageTable)
    assert table.class_names == NAMES
    np.testing.assert_array_equal(table.labels, np.arange(40) % 3)
    np.testing.assert_array_equal(table.images[7], coloured(1, 12, 7))


def test_parquet_without_names_has_its_labels_as_names(tmp_path: Path) -> None:
    assert load(config(f"parquet:{parquet(tmp_path / 'a.parquet', rows(9), None)}")).class_names == ("0", "1", "2")


def test_hubs_names_are_found(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", rows(9), None)
    table = pq.read_table(path)
    features = {"info": {"features": {"fine_label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()}), path)
    assert load(config(f"parquet:{path}")).class_names == NAMES


def test_folder_of_parquet_files_is_one_set(tmp_path: Path) -> None:
    everything = rows(40)
    parquet(tmp_path / "set" / "0.parquet", everything[:25], NAMES)
    parquet(tmp_path / "set" / "1.parquet", everything[25:], NAMES)
    whole = load(config(f"parquet:{parquet(tmp_path / 'one.parquet', everything, NAMES)}"))
    assert load(config(f"parquet:{tmp_path / 'set'}")).digest == whole.digest


def test_same_images_same_digest_wherever_they_are_kept(tmp_path: Path, folder: Path) -> None:
    """A folder, a Parquet set, streamed or in memory, and what ingest wrote: one set."""
    resident = load(config(f"folder:{folder}"))
    streamed = load(config(f"folder:{folder}"), keep="streaming")
    assert isinstance(streamed, StreamedTable)
    files = sorted(folder.rglob("*.png"))
    as_rows = [(file.read_bytes(), NAMES.index(file.parent.name)) for file in files]
    hub = load(config(f"parquet:{parquet(tmp_path / 'h.parquet', as_rows, NAMES)}"))
    (ingested,) = write(streamed, str(tmp_path / "set"), None, rows_per_shard=25)
    again = load(config(f"parquet:{tmp_path / 'set'}"), keep="streaming")
    assert {resident.digest, streamed.digest, hub.digest, again.digest, ingested["digest"]} == {resident.digest}
    assert resident.channel_statistics() == streamed.channel_statistics() == again.channel_statistics()


def test_streamed_batches_are_the_resident_ones(folder: Path) -> None:
    resident, streamed = (load(config(f"folder:{folder}"), keep=keep) for keep in ("resident", "streaming"))
    asked = np.array([5, 3, 59, 20, 20, 0])
    for size in (1, 4, 10):
        one, other = (np.concatenate(list(table.batches(asked, size))) for table in (resident, streamed))
        np.testing.assert_array_equal(one, other)
    assert sum(len(piece.rows) for piece in streamed.pieces(asked)) == 6  # type: ignore[attr-defined]


def test_size_decides_how_a_set_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resident_limit() > 2**28
    monkeypatch.setattr("meanet.data.loading.resident_limit", lambda: 60 * 12 * 12 * 3 - 1)
    assert isinstance(load(config(f"folder:{folder}")), StreamedTable)
    assert isinstance(load(config(f"folder:{folder}", feed="resident")), ImageTable)
    monkeypatch.undo()
    assert isinstance(load(config(f"folder:{folder}")), ImageTable)
    assert isinstance(load(config(f"folder:{folder}", feed="streaming")), StreamedTable)


def test_test_source_is_the_test_split_and_nothing_else(tmp_path: Path, folder: Path) -> None:
    test = image_folder(tmp_path / "held", 3, 4, 12, name_of=lambda class_id: NAMES[class_id])
    asked = config(f"folder:{folder}", test_source=f"folder:{test}", validation_fraction=0.25)
    splits = data.divide(load(asked), asked, seed=0)
    assert splits.test.tolist() == list(range(60, 72))
    assert (len(splits.validation), len(splits.train)) == (15, 45)


def test_test_source_with_an_unknown_class_is_refused(tmp_path: Path, folder: Path) -> None:
    other = image_folder(tmp_path / "held", 1, 4, 12, name_of=lambda _: "dog")
    with pytest.raises(UserError, match="class 'dog', which the training images have not"):
        load(config(f"folder:{folder}", test_source=f"folder:{other}"))


def broken() -> dict[str, bytes]:
    """One image of each kind that cannot be used."""
    good = encode(coloured(0, 12, 0))
    return {
        "undecodable": b"this is no image at all, whatever its name says",
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "wrong mode": encode(coloured(0, 12, 0), mode="RGBA"),
        "wrong size": encode(coloured(0, 16, 0)),
    }


@pytest.mark.parametrize("keep", ["resident", "streaming"])
def test_each_kind_of_bad_file_is_counted_and_named(folder: Path, keep: str) -> None:
    for kind, content in broken().items():
        (folder / "bee" / f"{kind.replace(' ', '-')}.png").write_bytes(content)
    table = load(config(f"folder:{folder}", max_bad_fraction=0.1), keep=keep)  # type: ignore[arg-type]
    assert dict(table.skipped.counts) == dict.fromkeys(broken(), 1)
    said = "\n".join(table.skipped.lines())
    for kind in broken():
        assert f"1 {kind}: bee/{kind.replace(' ', '-')}.png" in said
    assert len(table.labels) == 60
    assert table.digest == load(config(f"folder:{folder}", max_bad_fraction=0.1)).digest
    with pytest.raises(UserError, match=r"5 of 65 rows .* cannot be used \(7.69%\).*allows 1.00%.*wrong mode"):
        load(config(f"folder:{folder}"))


@pytest.mark.parametrize("keep", ["resident", "streaming"])
def test_each_kind_of_bad_row_is_counted_and_named(tmp_path: Path, keep: str) -> None:
    """In a Parquet set: the image, no label, a label that is no class."""
    bad: list[tuple[bytes | None, int | None]] = [(content, 0) for content in broken().values()]
    good = encode(coloured(1, 12, 1))
    bad += [(None, 1), (good, None), (good, 3), (good, -7)]
    path = parquet(tmp_path / "a.parquet", rows(50) + bad, NAMES)
    table = load(config(f"parquet:{path}", max_bad_fraction=0.2), keep=keep)  # type: ignore[arg-type]
    assert dict(table.skipped.counts) == {
        **dict.fromkeys(("undecodable", "truncated", "wrong mode", "wrong size", "without label"), 1),
        "empty": 2,
        "label out of range": 2,
    }
    said = "\n".join(table.skipped.lines())
    assert "1 undecodable: a.parquet row 50" in said
    assert "1 without label: a.parquet row 56" in said
    assert "2 label out of range: a.parquet row 57 (3 of 3 classes), a.parquet row 58 (-7 of 3 classes)" in said
    assert len(table.labels) == 50
    np.testing.assert_array_equal(table.labels, np.arange(50) % 3)
    np.testing.assert_array_equal(next(table.batches(np.array([49]), 1))[0], coloured(1, 12, 49))


def test_grey_images_are_a_set_of_their_own(tmp_path: Path) -> None:
    for class_id in range(2):
        (tmp_path / "grey" / f"c{class_id}").mkdir(parents=True)
        for number in range(4):
            content = encode(coloured(class_id, 12, number), mode="L")
            (tmp_path / "grey" / f"c{class_id}" / f"{number}.png").write_bytes(content)
    assert load(config(f"folder:{tmp_path / 'grey'}")).image_shape == (12, 12, 1)
    with pytest.raises(UserError, match=r"8 of 8 rows.*wrong mode"):
        load(config(f"folder:{tmp_path / 'grey'}", channels=3))


def test_images_of_several_sizes_need_a_size(tmp_path: Path, folder: Path) -> None:
    Image.fromarray(coloured(0, 40, 0)[:30]).save(folder / "ant" / "wide.png")
    with pytest.raises(UserError, match=r"1 of 61 rows .*--data.image-size .*1 wrong size: ant/wide.png"):
        load(config(f"folder:{folder}"))
    for number in range(20):
        Image.fromarray(coloured(0, 40, 0)[: 20 + number]).save(folder / "ant" / f"{number:04d}.png")
    with pytest.raises(UserError, match=r"several sizes .*--data.image-size"):
        load(config(f"folder:{folder}"))
    table = load(config(f"folder:{folder}", image_size=8))
    assert table.image_shape == (8, 8, 3)
    wide = next(table.batches(np.array([20]), 1))[0]
    left, top = (40 - 30 * 7 / 8) / 2, (30 - 30 * 7 / 8) / 2
    box = (left, top, left + 30 * 7 / 8, top + 30 * 7 / 8)
    expected = Image.fromarray(coloured(0, 40, 0)[:30]).resize((8, 8), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(wide, np.asarray(expected))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("folder:nowhere", "nowhere is no folder"),
        ("folder:empty", "empty has no images in class subfolders"),
        ("parquet:nowhere.parquet", r"nowhere.parquet does not exist"),
        ("parquet:empty", r"empty has no \*.parquet files"),
        ("parquet:text.parquet", "text.parquet is no whole Parquet file"),
        ("photos", r"unknown data source 'photos': known sources are digits, cifar100"),
        ("cifar100:empty", r"CIFAR-100 cannot be had from empty .*cifar-100-python"),
        ("folder:gs:x://y", "cannot be opened|is no folder"),
    ],
)
def test_sources_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, names: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=names):
        load(config(source))


def test_columns_are_asked_for_where_they_are_not_clear(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", rows(9), NAMES)
    table = pq.read_table(path)
    two = table.rename_columns(["img", "first"]).append_column("second", pa.array([0] * 9))
    pq.write_table(two, path)
    with pytest.raises(UserError, match=r"2 columns of labels among img, first, second.*--data.label-column"):
        load(config(f"parquet:{path}"))
    assert load(config(f"parquet:{path}", label_column="first")).labels.tolist() == [0, 1, 2] * 3
    with pytest.raises(UserError, match=r"no image column 'picture'.*--data.image-column"):
        load(config(f"parquet:{path}", label_column="first", image_column="picture"))
    pq.write_table(pa.table({"label": [0]}), path)
    with pytest.raises(UserError, match="no columns of images among label"):
        load(config(f"parquet:{path}"))


def test_label_beyond_the_rows_is_no_class(tmp_path: Path) -> None:
    """Where no names say how many classes there are."""
    path = parquet(tmp_path / "a.parquet", rows(9), None)
    table = pq.read_table(path)
    labels = [*table["fine_label"].to_pylist()[:-1], 2**40]
    pq.write_table(table.set_column(1, "fine_label", pa.array(labels)), path)
    found = load(config(f"parquet:{path}", max_bad_fraction=0.2))
    assert found.class_names == ("0", "1", "2")
    assert dict(found.skipped.counts) == {"label out of range": 1}


def test_bad_image_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("truncated", "cut short")))
    assert (error.kind, str(error)) == ("truncated", "cut short")


def test_written_set_says_what_it_is(tmp_path: Path, folder: Path) -> None:
    """Classes, counts, statistics and digest stand in the shards; half a set is not taken for a whole one."""
    table = load(config(f"folder:{folder}"), keep="streaming")
    (said,) = write(table, str(tmp_path / "set"), None, rows_per_shard=25)
    shards = sorted((tmp_path / "set").iterdir())
    assert [shard.name for shard in shards] == [f"0000{number}-of-00003.parquet" for number in range(3)]
    noted = json.loads(pq.read_schema(shards[0]).metadata[b"meanet"])
    assert noted["counts"] == dict.fromkeys(NAMES, 20)
    assert noted["digest"] == said["digest"] == table.digest
    assert tuple(noted["mean"]) == table.channel_statistics()[0]
    with pytest.raises(UserError, match="holds Parquet files already"):
        write(table, str(tmp_path / "set"), None, rows_per_shard=25)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"has 35 of the 60 images .*run jobs.ingest again"):
        load(config(f"parquet:{tmp_path / 'set'}"))


def test_built_in_set_with_its_own_test_images_is_written_as_two(tmp_path: Path) -> None:
    digits = load(DataConfig())
    assert isinstance(digits, ImageTable)
    table = dataclasses.replace(digits.take(np.arange(30)), test_rows=np.arange(20, 30))
    train, test = write(table, str(tmp_path), None, 100)
    assert (train["rows"], test["rows"]) == (20, 10)
    read = load(config(train["uri"], test_source=test["uri"]))
    assert read.test_rows is not None
    assert read.digest == table.digest


def test_streamed_table_travels_without_its_pixels(tmp_path: Path) -> None:
    table = load(config(f"parquet:{parquet(tmp_path / 'a.parquet', rows(64, 32), NAMES)}"), keep="streaming")
    piece = table.pieces(np.arange(20))[0]  # type: ignore[attr-defined]
    assert len(pickle.dumps(piece)) < 2000
    assert pickle.loads(pickle.dumps(piece)).read() == piece.read()


def test_cifar100_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published layout, small: its files' digests are torchvision's business."""
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    generator = np.random.default_rng(0)
    sizes = {"train": 20, "test": 10}
    images = {name: generator.integers(0, 256, (size, 3072), dtype=np.uint8) for name, size in sizes.items()}
    for name, pixels in images.items():
        labels = [number % 2 for number in range(len(pixels))]
        (root / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}))
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    asked = config(f"cifar100:{tmp_path}")
    table = load(asked)
    assert isinstance(table, ImageTable)
    np.testing.assert_array_equal(table.images[3, 1, 2], images["train"][3].reshape(3, 32, 32)[:, 1, 2])
    assert table.class_names == ("apple", "bear")
    splits = data.divide(table, asked, seed=0)
    assert splits.test.tolist() == list(range(20, 30))
