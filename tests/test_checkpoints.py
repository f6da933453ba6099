"""What an interrupted training has left, in a real bucket and on a disk: the newest whole checkpoint, and the rest."""

import json
from pathlib import Path

import boto3
import pytest
import torch
from ray.train import Checkpoint
from s3_server import S3Server, s3_server

from meanet import s3, storage
from meanet.checkpoints import STATE, tidied
from meanet.cluster import _newer

__all__ = ["s3_server"]
OLD, REGISTERED, WHOLE, HALF = (f"checkpoint_2026-01-01_00-00-0{number}.000000" for number in range(4))
SNAPSHOT_NAME = "checkpoint_manager_snapshot.json"
SNAPSHOT = {
    "checkpoint_results": [{"checkpoint_dir_name": REGISTERED, "metrics": {}}],
    "latest_checkpoint_result": {"checkpoint_dir_name": REGISTERED, "metrics": {}},
}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder or a bucket, for runs."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_server")
    return f"s3://meanet/{tmp_path.name}"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("state") / STATE
    torch.save({"weights": torch.ones(1000)}, path)
    return path.read_bytes()


def write(uri: str, data: bytes) -> None:
    system, path = storage.resolve(uri)
    system.create_dir(path.rpartition("/")[0], recursive=True)
    with system.open_output_stream(path) as stream:
        stream.write(data)


def test_newest_whole_one_is_found_and_what_nobody_takes_goes(place: str, state: bytes) -> None:
    """Of a registered checkpoint, a whole one that was not registered in time, one before it, and one cut short."""
    run = f"{place}/run"
    write(f"{run}/{SNAPSHOT_NAME}", json.dumps(SNAPSHOT).encode())
    for name in (OLD, REGISTERED, WHOLE):
        write(f"{run}/{name}/{STATE}", state)
    write(f"{run}/{HALF}/{STATE}", state[:-200])  # as a disk may show it
    write(f"{run}/other/kept", b"x")
    newest = tidied(place, "run")
    assert newest is not None
    assert newest == storage.resolve(f"{run}/{WHOLE}")[1]
    assert sorted(storage.folders(run)) == [REGISTERED, WHOLE, "other"]
    assert tidied(place, "run") == newest, "it is there to be taken again"


def test_a_run_that_has_not_begun(place: str) -> None:
    assert tidied(place, "none") is None


@pytest.mark.parametrize(
    ("snapshot", "left"),
    [
        ("", [WHOLE]),
        ("{", [WHOLE]),
        ('{"checkpoint_results": 1, "latest_checkpoint_result": null}', [OLD, WHOLE, SNAPSHOT_NAME]),
        ("[]", [OLD, WHOLE, SNAPSHOT_NAME]),
    ],
)
def test_a_snapshot_that_was_cut_off_goes_and_beside_one_that_is_strange_nothing_does(
    tmp_path: Path, state: bytes, snapshot: str, left: list[str]
) -> None:
    """Ray refuses to start beside the former; of the latter it is not known what is registered."""
    run = tmp_path / "run"
    write(f"{run}/{SNAPSHOT_NAME}", snapshot.encode())
    for name in (OLD, WHOLE):
        write(f"{run}/{name}/{STATE}", state)
    assert tidied(str(tmp_path), "run") == f"{run}/{WHOLE}"
    assert sorted(one.name for one in run.iterdir()) == sorted(left)


def test_uploads_that_were_cut_off_are_given_up(s3_server: S3Server) -> None:
    client = boto3.session.Session().client("s3", endpoint_url=s3_server.url, region_name="us-east-1")
    for key in (f"cut/run/{HALF}/{STATE}", "cut/runner/other"):
        upload = client.create_multipart_upload(Bucket="meanet", Key=key)["UploadId"]
        client.upload_part(Bucket="meanet", Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    assert tidied("s3://meanet/cut", "run") is None
    left = client.list_multipart_uploads(Bucket="meanet", Prefix="cut/").get("Uploads", [])
    assert [one["Key"] for one in left] == ["cut/runner/other"], "another run's goes on"
    assert s3.abort_uploads("s3://meanet/cut/runner") == ["cut/runner/other"]
    assert s3.abort_uploads("s3://nowhere/a") == [], "what cannot be looked at stays"


def test_the_later_of_two_checkpoints_is_taken() -> None:
    registered, whole = Checkpoint(f"/a/{REGISTERED}"), Checkpoint(f"/a/{WHOLE}")
    assert _newer(registered, whole) is _newer(whole, registered) is whole
    assert _newer(registered, None) is registered
    assert _newer(None, whole) is whole
    assert _newer(None, None) is None
