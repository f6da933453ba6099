"""A served model as a process, for the tests that ask over HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
from conftest import ENVIRONMENT

MARK = "MEANET_TEST_MARK"


def marked(mark: str) -> list[int]:
    """Processes that inherited a mark in their environment, however they were started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def left_running(mark: str) -> list[str]:
    """Commands of marked processes that do not end by themselves within 20 seconds."""
    deadline = time.monotonic() + 20
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    commands = []
    for pid in found:
        with contextlib.suppress(OSError):
            commands.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return commands


@contextlib.contextmanager
def serving(folder: Path, tracking_uri: str, *words: str) -> Iterator[str]:
    """`python -m serve_apps` on a free port; yields its URL, and sees to it that nothing of it stays.

    It waits for its cloud as long as a busy machine takes: no test that asks it is about that.
    """
    mark = uuid.uuid4().hex
    ready, log = folder / "ready.json", folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve_apps", "--port", "0", "--ready-file", str(ready), *words],
            env=ENVIRONMENT | {"MLFLOW_TRACKING_URI": tracking_uri, "MEANET_TOKEN": mark, MARK: mark},
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        url = json.loads(ready.read_text())["url"]
        told = httpx.put(
            f"{url}/v1/settings",
            json={"deadline_s": 20.0, "cloud_budget_s": 10.0},
            headers={"authorization": f"Bearer {mark}"},
            timeout=30,
        )
        assert told.status_code == 200, told.text
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, log.read_text()
    assert left_running(mark) == [], "Ctrl-C ends all"
