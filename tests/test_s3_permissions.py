"""A key that may read and not write: the preflight says so before anything is trained, whichever node has it."""

import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from conftest import ENVIRONMENT

from jobs._processes import free_ports
from jobs._s3_server import S3Server as Weed
from meanet import s3
from meanet.errors import UserError

_READER = ("reader", "secret-of-the-reader")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """With an owner, and a reader who may read and list."""
    folder = tmp_path_factory.mktemp("s3")
    port, *others = free_ports(4)
    weed = Weed(folder / "data", port, (others[0], others[1], others[2]), "owner", "secret-of-the-owner")
    allowed = {weed.key: (weed.secret, ["Admin", "Read", "Write", "List"]), _READER[0]: (_READER[1], ["Read", "List"])}
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for key, (secret, actions) in allowed.items()
    ]
    config = folder / "identities.json"
    config.write_text(json.dumps({"identities": identities}))
    weed.folder.mkdir()
    environment = {name: value for name, value in weed.own_environment.items() if not name.startswith("AWS_")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*weed.command, f"-s3.config={config}"], env=environment, cwd=weed.folder, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while not weed.ready():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield weed
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def reader(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Weed:
    """This process has the reader's key."""
    known = {"AWS_ACCESS_KEY_ID": _READER[0], "AWS_SECRET_ACCESS_KEY": _READER[1]}
    for name, value in (server.environment | known).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return server


def test_a_key_that_may_not_write_is_told_so_before_a_training(reader: Weed) -> None:
    s3.preflight("s3://meanet/runs")
    with pytest.raises(UserError, match="may not have the bucket 'meanet' written: ask for the permission"):
        s3.preflight("s3://meanet/runs", write=True)


@pytest.mark.cluster
def test_a_node_that_may_not_write_or_does_not_answer_is_named(server: Weed) -> None:
    """The driver may; another node is asked for longer than it is waited for, or has the reader's key."""
    words = [sys.executable, str(Path(__file__).with_name("two_nodes.py")), "s3://meanet/runs", *_READER]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = ENVIRONMENT | server.environment | token
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    alike, silent, with_reader = done.stdout.splitlines()
    assert alike == "s3://meanet/runs"
    assert re.fullmatch(r"node [0-9a-f]{8} \([0-9.]+\) does not answer within 1 s: look at its load", silent)
    assert re.fullmatch(
        r"node [0-9a-f]{8} \([0-9.]+\): s3://meanet/runs: .* may not have the bucket .* written.*", with_reader
    )
