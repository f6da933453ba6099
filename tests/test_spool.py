"""Points reach a tracking server that comes and goes: each, in order, and after the process has died, too."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from meanet import spool
from meanet.errors import UserError
from meanet.spool import Point, Spool


class Server:
    def __init__(self) -> None:
        self.away = False
        self.got: list[Point] = []
        self.asked = 0

    def take(self, points: Sequence[Point]) -> None:
        self.asked += 1
        if self.away:
            raise ConnectionError("the server is away")
        self.got += points


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(spool, "_LONGEST_PAUSE_S", 0.1)


def points(count: int, start: int = 0) -> list[Point]:
    return [Point("main", step, {"loss": 1 / (1 + step)}) for step in range(start, start + count)]


def put(kept: Spool, some: Sequence[Point]) -> None:
    for point in some:
        kept.put(point.run, point.step, point.metrics)


def test_points_arrive_at_once_and_in_order(tmp_path: Path) -> None:
    server = Server()
    kept = Spool(tmp_path / "points.jsonl", server.take)
    put(kept, points(50))
    kept.close()
    assert server.got == points(50)


def test_server_that_is_away_for_a_while_gets_all(tmp_path: Path) -> None:
    server, said = Server(), []
    server.away = True
    kept = Spool(tmp_path / "points.jsonl", server.take, said.append)
    put(kept, points(10))
    time.sleep(0.3)
    assert server.asked < 20, "it pauses between attempts"
    while server.asked < 2:
        time.sleep(0.01)
    assert server.got == []
    assert kept.unsent == 10
    server.away = False
    put(kept, points(5, 10))
    kept.close()
    assert server.got == points(15)
    assert [text.split(":")[0] for text in said] == [
        "points are kept in points.jsonl and follow",
        "the tracking server is back",
    ]


def test_what_could_not_be_sent_stays_and_the_next_process_sends_it(tmp_path: Path) -> None:
    server = Server()
    first = Spool(tmp_path / "points.jsonl", server.take)
    put(first, points(3))
    while first.unsent:
        time.sleep(0.01)
    server.away = True
    put(first, points(4, 3))
    with pytest.raises(UserError, match=r"4 points could not be sent \(the server is away\).*same command again"):
        first.close(patience_s=0.2)
    server.away = False
    second = Spool(tmp_path / "points.jsonl", server.take)
    put(second, points(1, 7))
    second.close()
    assert server.got == points(8), "each once"


def test_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    path, server = tmp_path / "points.jsonl", Server()
    first = Spool(path, server.take)
    put(first, points(2))
    first.close()
    with path.open("a") as file:
        file.write('{"run": "main", "st')
    second = Spool(path, server.take)
    put(second, points(1, 2))
    second.close()
    assert server.got == points(3)
    path.write_text("no json\n")
    with pytest.raises(UserError, match="remove it to go on without its points"):
        Spool(path, server.take)


def test_close_waits_for_a_server_that_comes_back(tmp_path: Path) -> None:
    server = Server()
    server.away = True
    kept = Spool(tmp_path / "points.jsonl", server.take)
    put(kept, points(3))
    threading.Timer(0.3, lambda: setattr(server, "away", False)).start()
    kept.close(patience_s=10)
    assert server.got == points(3)


def test_stop_waits_for_what_is_on_its_way_and_the_rest_stays(tmp_path: Path) -> None:
    server, on_its_way, go_on = Server(), threading.Event(), threading.Event()

    def take(some: Sequence[Point]) -> None:
        on_its_way.set()
        assert go_on.wait(10)
        server.take(some)

    kept = Spool(tmp_path / "points.jsonl", take)
    put(kept, points(1))
    assert on_its_way.wait(10)
    put(kept, points(4, start=1))
    threading.Timer(0.2, go_on.set).start()
    kept.stop()
    assert server.got == points(1)
    Spool(tmp_path / "points.jsonl", server.take).close()
    assert server.got == points(5)
