"""`jobs.classify` beside a server that is busy, lies or is away; the whole way to a real one is test_whole_life's."""

import contextlib
import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from untrained import Call

from jobs import classify, demo
from jobs._run import Record, RunFolder
from meanet import artifact, storage
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.preprocessing import encode_png
from meanet.routing import Exit, route


class Busy(ThreadingHTTPServer):
    """Answers as the table has it, but the first times that it is asked about a complex image."""

    daemon_threads = True

    def __init__(self, answers: dict[bytes, dict[str, Any]], times: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.times, self.seen = answers, times, Counter[bytes]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Busy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen[body] += 1
        answer = self.server.answers[body]
        if answer["exit"] == "cloud" and self.server.seen[body] <= self.server.times:
            wrong = (answer["class_id"] + 1) % 10
            alone = {"class_id": wrong, "exit": "main", "degraded": True, "reason": "cloud timed out"}
            answer = answer | alone
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def answers(model: TrainedModel, splits: Splits, table: ExitsTable) -> dict[bytes, dict[str, Any]]:
    test, rows = table.exits("test"), table.index("test")
    right = route(test.main_logits, test.extension_logits, test.cloud_pred, model.policy)
    common = {"degraded": False, "reason": None, "model_version": 1, "served_by": {"edge": "a", "cloud": None}}
    return {
        encode_png(splits.table.images[row]): {"class_id": int(pred), "exit": Exit(way).label, **common}
        for row, pred, way in zip(rows, right.pred, right.exit, strict=True)
    }


@pytest.fixture
def run(model: TrainedModel, table: ExitsTable, tmp_path: Path) -> str:
    """A run's folder."""
    artifact.save(dataclasses.replace(model, operating_point=None), tmp_path / "run" / "model")
    storage.write_parquet(table.table, tmp_path / "run" / "exits.parquet")
    (tmp_path / "run" / "operating_point.json").write_text(json.dumps(model.operating_point))
    return str(tmp_path / "run")


@contextlib.contextmanager
def busy(answers: dict[bytes, dict[str, Any]], times: float) -> Iterator[Busy]:
    """A server that is too busy so many times."""
    with Busy(answers, times) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def complex_images(answers: dict[bytes, dict[str, Any]]) -> set[bytes]:
    found = {body for body, answer in answers.items() if answer["exit"] == "cloud"}
    assert 0.05 * len(answers) < len(found) < len(answers)
    return found


def test_sent_again_until_the_cloud_has_answered(run: str, call: Call, answers: dict[bytes, dict[str, Any]]) -> None:
    complex_ones = complex_images(answers)
    with busy(answers, 2) as server:
        done = call(classify, run, "--url", server.url, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["degraded"], found["reasons"], found["mismatches"]) == (0, {}, 0)
    assert found["asked_again"] == 2 * len(complex_ones)
    assert found["exits"]["cloud"] == len(complex_ones)
    assert {body for body, times in server.seen.items() if times == 3} == complex_ones
    assert {body for body, times in server.seen.items() if times == 1} == set(answers) - complex_ones


@pytest.mark.parametrize(("patience_s", "most"), [("0", 1), ("1", 4)])
def test_not_for_ever(run: str, call: Call, answers: dict[bytes, dict[str, Any]], patience_s: str, most: int) -> None:
    complex_ones = complex_images(answers)
    with busy(answers, float("inf")) as server:
        done = call(classify, run, "--url", server.url, "--patience-s", patience_s)
        assert done.code == 1
        assert f"{len(complex_ones)} of {len(answers)} images went without the cloud" in done.err
        assert f"within {patience_s} s: {{'cloud timed out': {len(complex_ones)}}}" in done.err
        assert 1 <= max(server.seen.values()) <= most
        tolerant = call(classify, run, "--url", server.url, "--patience-s", "0", "--max-degraded", "1")
    assert tolerant.code == 0, "those say themselves that they went without the cloud: no mismatch"
    assert f"{len(complex_ones)} degraded, 0 sent again" in tolerant.out


def test_answers_unlike_the_table_are_told(run: str, call: Call, answers: dict[bytes, dict[str, Any]]) -> None:
    body = next(iter(answers))
    answers[body]["class_id"] = (answers[body]["class_id"] + 1) % 10
    with busy(answers, 0) as server:
        done = call(classify, run, "--url", server.url)
    assert done.code == 1
    assert "1 answers over HTTP differ from the exits table" in done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--patience-s", "-1"), "--patience-s is -1.0: it must be 0 or more seconds"),
        (("--patience-s", "nan"), "--patience-s is nan"),
        (("--patience-s", "inf"), "--patience-s is inf"),
        (("--images", "0"), "--images is 0: it must be 1 or more"),
        (("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9 does not answer"),
    ],
)
def test_mistakes(run: str, call: Call, words: tuple[str, ...], says: str) -> None:
    done = call(classify, run, *words)
    assert done.code == 1
    assert says in done.err


@pytest.mark.parametrize(("times", "patience_s"), [(2, 60.0), (float("inf"), 0.2)])
def test_demo_waits_for_a_busy_server_but_not_for_ever(
    times: float,
    patience_s: float,
    answers: dict[bytes, dict[str, Any]],
    model: TrainedModel,
    splits: Splits,
    table: ExitsTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    complex_ones = complex_images(answers)
    monkeypatch.setattr(demo, "_PATIENCE_S", patience_s)
    one: Any = SimpleNamespace(splits=splits, environment=SimpleNamespace(tracking_uri="sqlite://"))
    one.run = RunFolder(tmp_path, Record("1", "digits", "digest", "sqlite://", version=1), resumed=False)
    found: Any = SimpleNamespace(chosen=model.operating_point)
    with busy(answers, times) as server:
        monkeypatch.setattr(demo._server, "serving", lambda *_: contextlib.nullcontext(server.url))
        if times == 2:
            demo.Demo._serve(one, table, found, "address")
        else:
            with pytest.raises(UserError, match=rf"{len(complex_ones)} images went without the cloud.*serve\.log"):
                demo.Demo._serve(one, table, found, "address")
    assert one.run.record.http["asked_again"] == (2 if times == 2 else 1) * len(complex_ones)
