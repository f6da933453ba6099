"""The served model as a process beside the job: started, asked over HTTP, stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from meanet.data import Splits
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.preprocessing import encode_png
from meanet.routing import Exit, Policy, route

_START_TIMEOUT_S = 180
_CONNECTIONS = 8
_PAUSE_S = 0.5


@contextlib.contextmanager
def serving(version: int, ray_address: str, log_folder: Path, tracking_uri: str) -> Iterator[str]:
    """Serve a model version on the cluster at this address while the block runs; yields the URL.

    Raises:
        UserError: the server does not come up; the message has the end of its log.
    """
    log_path = log_folder / "serve.log"
    with tempfile.TemporaryDirectory() as folder, log_path.open("w") as log:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "serve_apps", "--version", str(version), "--port", "0"]
        process = subprocess.Popen(  # noqa: S603
            [*command, "--ready-file", str(ready)],
            env={**os.environ, "RAY_ADDRESS": ray_address, "MLFLOW_TRACKING_URI": tracking_uri},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield _wait_until_ready(process, ready, log_path)
        finally:
            _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", ready: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            raise UserError(f"the server did not start; the end of {log}:\n{tail}")
        time.sleep(0.1)
    url: str = json.loads(ready.read_text())["url"]
    return url


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def classify_all(
    url: str,
    splits: Splits,
    table: ExitsTable,
    point: dict[str, Any],
    images: int | None = None,
    *,
    patience_s: float,
) -> dict[str, Any]:
    """Send test images over HTTP and compare the answers with the replayed exits table.

    Args:
        url: the server's.
        splits: of the data that the table is about.
        table: every network's answer to every image.
        point: the operating point that is served.
        images: how many, the first ones; all if None.
        patience_s: how long images that were answered without the cloud are sent again.

    Returns:
        Counts and accuracy of the last answer to each image, and times of the first; a degraded answer, which went
        without the cloud, is no mismatch.
    """
    test, rows = table.exits("test"), table.index("test")[:images]
    expected = route(test.main_logits, test.extension_logits, test.cloud_pred, Policy.from_dict(point))
    batches = splits.table.batches(rows, splits.table.evaluation_batch)
    bodies = [encode_png(image) for images in batches for image in images]
    with httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(_CONNECTIONS) as pool:
        started = time.perf_counter()
        timed = list(pool.map(lambda body: _classify(client, body), bodies))
        seconds = time.perf_counter() - started
        answers = [answer for answer, _ in timed]
        asked_again, until = 0, time.monotonic() + patience_s
        while (lost := [row for row, answer in enumerate(answers) if answer["degraded"]]) and time.monotonic() < until:
            time.sleep(_PAUSE_S)
            again = pool.map(lambda row: _classify(client, bodies[row]), lost)
            for row, (answer, _) in zip(lost, again, strict=True):
                answers[row] = answer
            asked_again += len(lost)
    wanted = [(int(pred), Exit(way).label) for pred, way in zip(expected.pred, expected.exit, strict=True)][: len(rows)]
    wrong = [
        {"index": int(row), "table": want, "http": [answer["class_id"], answer["exit"]]}
        for row, want, answer in zip(rows, wanted, answers, strict=True)
        if not answer["degraded"] and (answer["class_id"], answer["exit"]) != want
    ]
    right = [answer["class_id"] == label for answer, label in zip(answers, test.labels[: len(rows)], strict=True)]
    served_by = {place: Counter(answer["served_by"][place] for answer in answers) for place in ("edge", "cloud")}
    return {
        "images": len(bodies),
        "mismatches": len(wrong),
        "examples": wrong[:3],
        "accuracy": float(np.mean(right)),
        "exits": dict(Counter(answer["exit"] for answer in answers)),
        "degraded": sum(answer["degraded"] for answer in answers),
        "reasons": dict(Counter(answer["reason"] for answer in answers if answer["degraded"])),
        "asked_again": asked_again,
        "versions": dict(Counter(str(answer["model_version"]) for answer in answers)),
        "nodes": {place: {node: n for node, n in nodes.items() if node} for place, nodes in served_by.items()},
        "requests_per_second": round(len(bodies) / seconds, 1),
        "p50_ms": round(1000 * float(np.median([spent for _, spent in timed])), 2),
    }


def _classify(client: httpx.Client, body: bytes) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    response = client.post("/v1/classify", content=body, headers={"content-type": "image/png"})
    if response.status_code != httpx.codes.OK:
        raise UserError(f"the server answered {response.status_code} to a test image: {response.text[:200]}")
    answer: dict[str, Any] = response.json()
    return answer, time.perf_counter() - started
