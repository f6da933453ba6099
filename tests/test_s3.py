"""s3:// against a real server: what is missing is said, what is written is whole, and an outage is outwaited."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import coloured, encode, parquet
from s3_server import S3Server, s3_server
from untrained import Call

from jobs import ingest, sweep
from meanet import s3, storage
from meanet.artifact import TrainedModel
from meanet.config import DataConfig
from meanet.data import ImageTable
from meanet.data.loading import load
from meanet.errors import UserError
from meanet.evaluation import ExitsTable

__all__ = ["s3_server"]


def test_preflight_of_a_bucket_that_can_be_used_leaves_nothing(s3_server: S3Server) -> None:
    s3.preflight("s3://meanet/some/where", write=True)
    assert not storage.has_files("s3://meanet/some", "")


@pytest.mark.parametrize(
    ("variables", "uri", "says"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://meanet/a", r":9 does not answer.*AWS_ENDPOINT_URL"),
        ({}, "s3://nowhere/a", "there is no bucket 'nowhere': create it"),
        ({"AWS_ACCESS_KEY_ID": "somebody"}, "s3://meanet/a", "AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://meanet/a", "AWS_SECRET_ACCESS_KEY"),
        ({}, "s3://", "names no bucket: give s3://bucket/key"),
    ],
)  # fmt: skip
def test_preflight_says_what_is_missing(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], uri: str, says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        s3.preflight(uri, write=True)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:9000", r"AWS_ENDPOINT_URL localhost:9000 does not begin with http://"),
        ("127.0.0.1:9000", r"AWS_ENDPOINT_URL 127.0.0.1:9000 does not begin with http://"),
        ("minio", r"AWS_ENDPOINT_URL minio does not begin with http://"),
        ("s3://localhost:9000", r"s3://localhost:9000 does not begin with http://"),
        ("http://", r"http:// names no host"),
        ("http://:9000", r"http://:9000 names no host"),
        ("http://a host", r"names no host"),
        ("http://localhost:90000", r"localhost:90000 has no host and port that can be read"),
        ("http://[::1", r"has no host and port that can be read"),
        ("http://localhost:9000/bucket", r"localhost:9000/bucket has more than a host and a port"),
        ("http://localhost:9000?secret=1", r"localhost:9000 has more than a host and a port"),
        ("https://me:secret@localhost", r"localhost has credentials in it, which belong in AWS_ACCESS_KEY_ID"),
        ("me:sec/ret@localhost:9000", r"localhost:9000 has credentials in it"),
        ("http://me:secret@[::1", r"has no host and port that can be read"),
    ],
)
@pytest.mark.parametrize(
    "use", [lambda: s3.preflight("s3://meanet/a"), lambda: storage.resolve("s3://meanet/a"), s3.hand_on_endpoint]
)
def test_server_that_is_no_url_is_refused_wherever_it_is_used(
    monkeypatch: pytest.MonkeyPatch, url: str, says: str, use: Callable[[], object]
) -> None:
    """Above all, Amazon is not asked in its place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("MLFLOW_S3_ENDPOINT_URL", raising=False)
    with pytest.raises(UserError, match=says) as refused:
        use()
    assert "set it to http://host:port" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("secret", "sec/ret", "me:"))
    assert "MLFLOW_S3_ENDPOINT_URL" not in os.environ


def test_the_variable_of_s3_alone_comes_first_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9001")
    with pytest.raises(UserError, match=r"^AWS_ENDPOINT_URL_S3 localhost:9001 does not begin"):
        s3.endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://localhost:9001/")
    assert s3.endpoint() == "http://localhost:9001"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    assert s3.endpoint() == "http://localhost:9000"


def test_preflight_without_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"there are no credentials.*set AWS_ACCESS_KEY_ID"):
        s3.preflight("s3://meanet/a")


@pytest.mark.parametrize("off", [-3600, 400])
def test_preflight_sees_a_wrong_clock(off: int) -> None:
    at = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - off))
    with pytest.raises(UserError, match=rf"clock is ({off:+d}|{off + 1:+d}) s off".replace("+", r"\+")):
        s3._check_clock({"ResponseMetadata": {"HTTPHeaders": {"date": at}}}, "s3://meanet/a")


def test_tables_and_sets_come_back_as_they_went(s3_server: S3Server, tmp_path: Path, call: Call) -> None:
    table = pa.table({"a": np.arange(1000), "b": [b"x" * 10] * 1000})
    storage.write_parquet(table, "s3://meanet/tables/one.parquet", row_group_size=100)
    assert storage.read_parquet("s3://meanet/tables/one.parquet").equals(table)
    with pytest.raises(UserError, match=r"s3://meanet/tables/two.parquet does not exist"):
        storage.read_parquet("s3://meanet/tables/two.parquet")

    rows = [(encode(coloured(number % 3, 12, number)), number % 3) for number in range(60)]
    local = parquet(tmp_path / "local.parquet", rows, ("ant", "bee", "cat"))
    done = call(ingest, f"parquet:{local}", "s3://meanet/sets/insects", "--rows-per-shard", "20", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["sets"][0]["shards"] == 3
    there, here = (
        load(DataConfig(source="parquet:s3://meanet/sets/insects")),
        load(DataConfig(source=f"parquet:{local}")),
    )
    assert isinstance(there, ImageTable)
    assert isinstance(here, ImageTable)
    np.testing.assert_array_equal(there.images, here.images)
    assert there.digest == here.digest
    again = call(ingest, f"parquet:{local}", "s3://meanet/sets/insects")
    assert (again.code, "holds Parquet files already" in again.err) == (1, True)
    gone = call(ingest, f"parquet:{local}", "s3://nowhere/sets")
    assert (gone.code, "there is no bucket 'nowhere'" in gone.err) == (1, True)


def test_exits_table_is_swept_from_a_bucket(s3_server: S3Server, table: ExitsTable, tmp_path: Path, call: Call) -> None:
    uri = "s3://meanet/run/exits.parquet"
    storage.write_parquet(table.table, uri)
    local = tmp_path / "exits.parquet"
    storage.write_parquet(table.table, local)
    points = []
    for exits in (uri, str(local)):
        done = call(sweep, exits, "--space", "early_gates", "--json")
        assert done.code == 0, done.err
        points.append(json.loads(done.out)["operating_point"])
    assert points[0] == points[1]
    missing = call(sweep, "s3://meanet/run/none.parquet")
    assert (missing.code, "s3://meanet/run/none.parquet does not exist" in missing.err) == (1, True)


def test_an_outage_is_outwaited_by_readers_and_writers(s3_server: S3Server) -> None:
    """Down when the write begins, back some seconds later: nobody above hears of it."""
    table = pa.table({"a": np.arange(100_000)})
    s3_server.stop()
    threading.Timer(4.0, s3_server.start).start()
    started = time.monotonic()
    storage.write_parquet(table, "s3://meanet/outage/one.parquet")
    assert time.monotonic() - started > 3
    assert storage.read_parquet("s3://meanet/outage/one.parquet").equals(table)


def test_file_system_keeps_its_patience_and_no_credentials_when_it_travels(s3_server: S3Server) -> None:
    import pickle

    data = pickle.dumps(s3.PatientS3())
    assert s3_server.secret.encode() not in data
    assert isinstance(pickle.loads(data), s3.PatientS3)


def test_registered_model_lives_in_a_bucket(s3_server: S3Server, model: TrainedModel, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from meanet import artifact
    from meanet.tracking import EXPERIMENT, Tracker

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(tracking_uri=uri).create_experiment(EXPERIMENT, artifact_location="s3://mlflow/artifacts")
    tracker = Tracker(uri)
    version = tracker.register(model, tracker.start_run("r", {}, {}))
    assert any(name.endswith("edge.safetensors") for name in storage.list_files("s3://mlflow/artifacts"))
    assert artifact.load(tracker.download_to(version, tmp_path / "there")).operating_point == model.operating_point


def test_folder_is_copied_but_for_what_is_not_whole(s3_server: S3Server, tmp_path: Path) -> None:
    for name in ("model/deep/a", "model/b", ".part-1/c", "model/.part/d", "e.json", "not-asked-for"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for place in ("s3://meanet/copied", str(tmp_path / "copy")):
        assert storage.upload(tmp_path, place, ("model", ".part-1", "e.json", "missing")) == 3
        assert storage.list_files(place) == ["e.json", "model/b", "model/deep/a"]
        assert list(storage.read_files(place, ["e.json", "model/deep/a"])) == [b"e.json", b"model/deep/a"]
