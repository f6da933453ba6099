"""What `jobs.cluster`, `jobs.life` and `jobs.deploy` do beside the cluster itself, which test_whole_life.py has."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs import _processes, cluster, deploy, life
from jobs._alone import alone
from jobs._cli import Environment
from jobs._processes import Part
from meanet.errors import UserError
from meanet.recipes import digits
from meanet.recipes import recipe as named

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import time; print('child', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(60)
"""
"""Ignores SIGTERM, and has a child in a session of its own."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A command's own handlers of signals end with its test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def mark() -> str:
    return f"test-{os.urandom(6).hex()}"


def begun(tmp_path: Path, mark: str, code: str) -> Part:
    return _processes.begin("part", [sys.executable, "-c", code], dict(os.environ), mark, tmp_path / "part.log")


def test_all_that_descends_from_a_part_ends_with_it(tmp_path: Path, mark: str) -> None:
    part = begun(tmp_path, mark, STUBBORN)
    deadline = time.monotonic() + 20
    while "child" not in (tmp_path / "part.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes.alive(part, mark)
    assert len(_processes.marked(mark)) == 2
    assert _processes.end([part], mark, 0.3) == 2, "both had to be killed"
    assert not _processes.alive(part, mark)
    assert _processes.marked(mark) == []


def test_part_that_ends_when_asked_is_not_killed(tmp_path: Path, mark: str) -> None:
    part = begun(tmp_path, mark, "import time; time.sleep(60)")
    assert _processes.end([part], mark, 10) == 0
    assert (tmp_path / "part.log").stat().st_mode & 0o077 == 0, "a log is its user's"


def test_id_that_went_to_another_process_is_left_alone(mark: str) -> None:
    stranger = Part("part", os.getpid(), "")
    assert not _processes.alive(stranger, mark)
    assert _processes.end([stranger], mark, 0.1) == 0


def test_part_that_does_not_come_up_says_why(tmp_path: Path, mark: str) -> None:
    part = begun(tmp_path, mark, "raise SystemExit('no such disk')")
    with pytest.raises(UserError, match=r"part has ended; the end of .*:\nno such disk"):
        _processes.wait_until(lambda: False, part, mark, 20)
    part = begun(tmp_path, mark, "import time; time.sleep(60)")
    with pytest.raises(UserError, match="part is not healthy after 0 s"):
        _processes.wait_until(lambda: False, part, mark, 0.2)
    _processes.end([part], mark, 10)


def test_taken_port_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be had .* choose another with --mlflow-port"):
            _processes.chosen_port(port, "--mlflow-port")


def test_interrupted_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the servers are up and the nodes are not."""
    marks = []

    def interrupted(made: cluster.Cluster, node: object) -> None:
        assert made.record is not None
        marks.append(made.record.mark)
        assert len(_processes.marked(made.record.mark)) >= 2
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.Cluster, "_begin_node", interrupted)
    ours = cluster.Cluster(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ours.up(cluster.Flags("up", folder=tmp_path, dashboard_port=0, mlflow_port=0))
    assert _processes.marked(marks[0]) == []
    assert {path.name for path in tmp_path.iterdir()} == {"s3", "mlflow", "logs", "s3-key.json"}
    assert not ours.running


def recorded(folder: Path, mark: str) -> cluster.Cluster:
    """A cluster of one part that is no more than a process."""
    made = cluster.Cluster(folder)
    made.record = cluster.Record(mark, str(folder / "temporary"), "127.0.0.1:1", {})
    made._begin("part", [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    return made


def test_interrupt_waits_for_a_command_at_work_and_stops_what_it_has_added(tmp_path: Path, mark: str) -> None:
    """Ctrl-C of `up --block` while `add` holds the lock."""
    ours, holds = recorded(tmp_path, mark), threading.Event()

    def add() -> None:
        other = cluster.Cluster(tmp_path)
        with other.alone():
            holds.set()
            time.sleep(1.5)
            other._begin("added", [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))

    signal.signal(signal.SIGINT, cluster._interrupt)
    adding = threading.Thread(target=add)
    adding.start()
    assert holds.wait(10)
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster._until_interrupted(ours)
        assert _processes.marked(mark) == []
    finally:
        adding.join()
        interrupt.join()
        _processes.end([], mark, 1)
    assert not (tmp_path / "cluster.json").exists()


def test_a_cluster_that_was_started_since_is_left_alone(tmp_path: Path, mark: str) -> None:
    """By `down` and `up` while `up --block` looked away."""
    ours = recorded(tmp_path, mark)
    cluster.Cluster(tmp_path).down()
    newer = recorded(tmp_path, f"{mark}-newer")
    try:
        cluster._until_interrupted(ours)
        assert newer.running
    finally:
        newer.down()


# The life

STORE = Environment("http://store", "127.0.0.1:1", "http://dashboard", has_store=True)


def lives(
    folder: Path, fails: str | None, done: list[str], monkeypatch: pytest.MonkeyPatch, recipe: str = "digits"
) -> life.Record:
    words = ["--main.epochs", "3", "--workers=2", "--no-energy.x", "--data.source", "digits", "--seed", "4"]

    def step(_: life.Life, job: str, *given: str) -> list[str]:
        done.append(" ".join([job, *given]))
        if job == fails:
            raise UserError(f"{job} failed: {life.reason(['a', 'error: no disk', ''])}")
        results = {
            "ingest": {"sets": [{"uri": "parquet:there"}]},
            "deploy": {"url": "http://here"},
            "classify": {"n": 1},
        }
        return ["some line", json.dumps(results.get(job, {}))]

    monkeypatch.setattr(life.Life, "_step", step)
    flags = life.Flags(named(recipe), storage=str(folder / "storage"), output=folder, workers=2)
    return life.Life(flags, words, STORE).run()


def test_life_stops_with_the_reason_and_goes_on_after_the_last_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    with pytest.raises(UserError, match=r"^tune failed: no disk$"):
        lives(tmp_path, "tune", done, monkeypatch)
    assert [line.split()[0] for line in done] == ["ingest", "train", "evaluate", "tune"]
    assert done[1].startswith(
        "train digits --data.source parquet:there --main.epochs 3 --no-energy.x --seed 4 --output"
    )
    done.clear()
    record = lives(tmp_path, None, done, monkeypatch)
    assert [line.split()[0] for line in done] == ["tune", "register", "promote", "deploy", "classify"]
    assert (record.url, record.result, list(record.seconds)) == ("http://here", {"n": 1}, list(life.STEPS))
    done.clear()
    assert lives(tmp_path, None, done, monkeypatch).id != record.id, "a finished life is over"
    assert len(done) == len(life.STEPS)


def test_second_life_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    with alone(tmp_path), pytest.raises(UserError, match=rf"^another life is at work in {tmp_path}: wait"):
        lives(tmp_path, None, done, monkeypatch)
    assert done == []


@pytest.mark.parametrize("earlier", [False, True], ids=["other recipe", "record of an earlier version"])
def test_interrupted_life_of_another_recipe_is_not_gone_on_with(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    with pytest.raises(UserError):
        lives(tmp_path, "tune", done, monkeypatch)
    record = json.loads((tmp_path / "life.json").read_text())
    if earlier:
        del record["recipe"]
        (tmp_path / "life.json").write_text(json.dumps(record))
    done.clear()
    recipe = "digits" if earlier else "cifar100_resnet32_a"
    assert lives(tmp_path, None, done, monkeypatch, recipe).id != record["id"]
    assert [line.split()[0] for line in done] == list(life.STEPS)
    assert done[1].startswith(f"train {recipe} ")


def test_interrupted_step_ends_with_the_life(tmp_path: Path) -> None:
    code = "import time; print('begun', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        life.Life._stop(process, None)
        assert process.returncode == -signal.SIGTERM


def test_life_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a life needs RAY_ADDRESS"):
        life.Life(life.Flags(digits(), output=tmp_path), [], Environment("sqlite:///x", None))


def test_reason_is_the_last_error_or_the_last_line() -> None:
    assert life.reason(["error: one", "error: two", "Job failed"]) == "two"
    assert life.reason(["a", "killed", ""]) == "killed"
    assert life.reason([]) == "it said nothing"


# Deploying


def test_yaml_takes_the_store_and_the_port_asked_for(tmp_path: Path) -> None:
    config = deploy.read_config(deploy.CONFIG, "http://store:1", 8123)
    assert config["applications"][0]["args"]["tracking_uri"] == "http://store:1"
    assert config["http_options"] == {**yaml.safe_load(deploy.CONFIG.read_text())["http_options"], "port": 8123}
    assert deploy.read_config(deploy.CONFIG, None, None) == yaml.safe_load(deploy.CONFIG.read_text())
    (tmp_path / "two.yaml").write_text("applications: [{name: a}, {name: b}]")
    for name in ("two.yaml", "none.yaml"):
        with pytest.raises(UserError, match=f"{name} is no Serve config of one application"):
            deploy.read_config(tmp_path / name, None, None)


@pytest.mark.parametrize(
    ("application", "says"),
    [
        ({"message": "Traceback:\n  x\nModuleNotFoundError: no a\n"}, "ModuleNotFoundError: no a"),
        (
            {
                "message": "failed to update ['edge']",
                "deployments": {
                    "cloud": {"status": "HEALTHY", "message": ""},
                    "edge": {"status": "DEPLOY_FAILED", "message": "failed 3 times\nUserError: no such version\n"},
                },
            },
            "UserError: no such version",
        ),
        ({}, "Serve says nothing about it"),
    ],
)
def test_why_a_deployment_failed_is_one_line(application: dict[str, object], says: str) -> None:
    assert deploy._why(application) == says
