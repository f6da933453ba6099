"""What is truly sent, and what the cloud says of what arrives."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained import Call

from jobs import evaluate
from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.config import EnergyConfig
from meanet.data import Splits
from meanet.errors import UserError
from meanet.evaluation import ExitsTable, exits_table
from meanet.preprocessing import encode_jpeg, encode_png, transmit


def with_payload(model: TrainedModel, payload: str) -> TrainedModel:
    return dataclasses.replace(model, recipe=dataclasses.replace(model.recipe, energy=EnergyConfig(payload=payload)))


def test_payloads_are_the_bytes_truly_sent(splits: Splits) -> None:
    images = splits.table.images[:5]
    for payload, encode in {"png": encode_png, "jpeg30": lambda image: encode_jpeg(image, 30)}.items():
        assert transmit(images, payload)[1].tolist() == [len(encode(image)) for image in images]
    arrived, sizes = transmit(images, "raw")
    assert sizes.tolist() == [64] * 5
    np.testing.assert_array_equal(arrived, images)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_lower_quality_costs_less_and_loses_more(channels: int) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (4, 8, 8, channels), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    results = [transmit(images, f"jpeg{quality}") for quality in (10, 60, 95)]
    sizes = [sent.sum() for _, sent in results]
    losses = [np.abs(arrived.astype(float) - images).mean() for arrived, _ in results]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0
    assert all(arrived.shape == images.shape for arrived, _ in results)


def test_cloud_answers_what_arrives(untrained: TrainedModel, splits: Splits) -> None:
    """The JPEG's columns beside the lossless ones, which stay as they are."""
    few = dataclasses.replace(splits, validation=splits.validation[:20], test=splits.test[:30])
    plain = ExitsTable(exits_table(untrained, few))
    table = ExitsTable(exits_table(with_payload(untrained, "jpeg5"), few))
    assert plain.payloads == ("png", "raw")
    assert table.payloads == ("png", "raw", "jpeg5")
    arrived, sizes = transmit(splits.table.images[few.test], "jpeg5")
    with torch.inference_mode():
        logits = untrained.networks.cloud(torch.from_numpy(untrained.preprocessing.normalise(arrived)))
    found = table.exits("test")
    assert found.upload_bytes.tolist() == sizes.tolist()
    assert found.cloud_pred.tolist() == logits.argmax(1).tolist()
    confidence = table.table["cloud_confidence_jpeg5"].to_numpy()[-30:]
    np.testing.assert_allclose(confidence, logits.softmax(1).amax(1), rtol=1e-5)
    for payload in ("png", "raw"):
        ours, theirs = table.exits("test", payload), plain.exits("test", payload)
        np.testing.assert_array_equal(ours.cloud_pred, theirs.cloud_pred)
        np.testing.assert_array_equal(ours.upload_bytes, theirs.upload_bytes)
    assert not np.array_equal(confidence, table.table["cloud_confidence"].to_numpy()[-30:])
    with pytest.raises(UserError, match=r"no payload 'jpeg90' \(it has png, raw, jpeg5\).*--energy.payload jpeg90"):
        table.exits("test", "jpeg90")


def test_what_was_stored_before_bytes_moved_is_read(untrained: TrainedModel, splits: Splits, tmp_path: Path) -> None:
    folder = artifact.save(untrained, tmp_path / "model")
    plain = json.loads((folder / "model.json").read_text())
    del plain["bytes_moved"]
    (folder / "model.json").write_text(json.dumps(plain))
    assert artifact.load(folder).bytes_moved == untrained.bytes_moved

    few = dataclasses.replace(splits, validation=splits.validation[:5], test=splits.test[:5])
    written = exits_table(untrained, few)
    description = json.loads(written.schema.metadata[b"meanet"])
    assert ExitsTable(written).bytes_moved == untrained.bytes_moved
    del description["bytes_moved"]
    old = ExitsTable(written.replace_schema_metadata({b"meanet": json.dumps(description).encode()}))
    assert old.costs.main_joules == untrained.costs.main_joules
    old.energy = EnergyConfig(device="horowitz_45nm_dram")
    with pytest.raises(UserError, match="evaluate again"):
        _ = old.costs


def test_evaluate_takes_another_payload_without_training_again(call: Call, run_folder: Path) -> None:
    done = call(evaluate, "digits", "--output", str(run_folder), "--energy.payload", "jpeg50", "--energy.link", "lte")
    assert done.code == 0, done.err
    table = ExitsTable.read(run_folder / "exits.parquet")
    assert table.payloads == ("png", "raw", "jpeg50")
    assert table.recipe.energy == EnergyConfig(payload="jpeg50", link="lte")
    assert table.costs.tag == "modelled:horowitz_45nm+lte"
    other = call(evaluate, "digits", "--output", str(run_folder), "--energy.payload", "jpeg50", "--main.epochs", "1")
    assert (other.code, "drop the flags (those of --energy may stay)" in other.err) == (1, True)
