"""A command's process ends with its status, and takes nothing apart where that was asked for; and how a Ray begins."""

import subprocess
import sys
from typing import Any

import pytest
import ray
from conftest import ENVIRONMENT, ROOT

from meanet import cluster
from meanet.errors import UserError

_COMMAND = """
import atexit, sys
from meanet.errors import UserError, exit_on_user_error
from meanet.stopping import leave_after, leave_at_once

atexit.register(print, "taken apart")

@exit_on_user_error
def main():
    print("asked", {asks} and leave_at_once())
    {end}

leave_after(main)
"""


def _run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('no such thing')", 1, "no such thing\n"),
        ("raise UserError('a is 7: give less')", 1, "error: a is 7: give less\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise OSError('the disk is full')", 1, "OSError: the disk is full\n"),
    ],
)
def test_status_and_output_are_the_commands(asks: bool, end: str, status: int, says: str) -> None:
    done = _run(_COMMAND.format(asks=asks, end=end))
    assert done.returncode == status, done.stderr
    assert done.stderr.endswith(says)
    assert done.stdout == f"asked {asks}\n" + ("" if asks else "taken apart\n")


def test_nobody_leaves_for_a_library() -> None:
    """Outside a command, what runs goes on: nothing may be left standing."""
    done = _run("from meanet.stopping import leave_at_once; print(leave_at_once())")
    assert done.stdout == "False\n"


@pytest.mark.cluster
def test_cluster_that_was_joined_is_left_standing() -> None:
    """Two commands, one after the other: each ends with its own status, Ray's core worker is not freed below a reply
    that is on its way (SIGSEGV), and the cluster has back what they held."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "joining.py")],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.stdout.splitlines() == ["3 [1, 1]", "3 [1, 1]", "taken apart 0 of 2", "free 2.0"], done.stderr


@pytest.mark.parametrize("again", [True, False])
def test_local_ray_that_does_not_come_up_in_time_is_tried_twice(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """What the first try has left is ended: it would hold CPUs and memory for as long as this process lives."""
    left: list[subprocess.Popen[bytes]] = []

    def init(*, _temp_dir: str, **_options: Any) -> None:
        if left and not again:
            return
        started = subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)", _temp_dir],
            stdout=subprocess.PIPE,
        )
        left.append(started)
        assert started.stdout is not None
        started.stdout.readline()
        started.stdout.close()
        raise Exception("The current node timed out during startup. This could happen ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: ray)
    monkeypatch.setattr(ray, "gcs_address", "127.0.0.1:1", raising=False)
    try:
        if again:
            with pytest.raises(UserError, match="timed out during startup"), cluster.ray_cluster(None):
                pytest.fail("there is none")
            assert len(left) == 2
        else:
            with cluster.ray_cluster(None) as address:
                assert address == "127.0.0.1:1"
        assert left[0].wait(10) == -9
    finally:
        for process in left:
            process.kill()
            process.wait()


def test_cluster_that_cannot_be_joined_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def init(*, address: str, **_options: Any) -> None:
        tries.append(address)
        raise ConnectionError("timed out during startup")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="no Ray cluster can be used at a:1 "), cluster.ray_cluster("a:1"):
        pytest.fail("there is none")
    assert tries == ["a:1"]
