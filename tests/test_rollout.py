"""The rollout's decisions: what is held and served, given what replicas report and when they fall silent."""

import dataclasses

import pytest

from serve_apps.rollout import Beat, Plan


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Fleet:
    """Replicas that do as they are told, but for those that are told to fail or to be slow."""

    def __init__(self, version: int = 1, edges: int = 2, clouds: int = 1) -> None:
        self.clock = Clock()
        self.plan = Plan(version, clock=self.clock)
        self.beats = {
            f"{place}{n}": Beat(f"{place}{n}", place, "node")  # type: ignore[arg-type]
            for place, count in (("edge", edges), ("cloud", clouds))
            for n in range(count)
        }
        self.fails: dict[str, str] = {}
        self.slow: set[str] = set()
        self.seen: list[tuple[str, int]] = []

    def tick(self, seconds: float = 0.5) -> None:
        self.clock.now += seconds
        for name, beat in self.beats.items():
            told = self.plan.hold
            new = set(told) - set(beat.held)
            failed = {version: self.fails[name] for version in new if name in self.fails}
            held = tuple(v for v in told if v in beat.held or (name not in self.slow and v not in failed))
            serving = self.plan.serving if self.plan.serving in held and beat.place == "edge" else beat.serving
            self.beats[name] = dataclasses.replace(beat, held=held, told=told, serving=serving, failed=failed)
            self.plan.hear(self.beats[name])
            for edge in self.beats.values():  # whatever an edge serves, every replica of the cloud can answer
                for cloud in self.beats.values():
                    if edge.place == "edge" and cloud.place == "cloud" and edge.serving is not None and cloud.held:
                        assert edge.serving in cloud.held
        self.plan.step()
        self.seen.append((self.plan.phase, self.plan.serving))

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.tick()


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    fleet.ticks(6)
    return fleet


def test_version_is_loaded_everywhere_then_served_then_the_old_one_dropped(fleet: Fleet) -> None:
    fleet.plan.start(2)
    assert (fleet.plan.phase, fleet.plan.hold, fleet.plan.serving) == ("load", (1, 2), 1)
    fleet.ticks(3)
    assert (fleet.plan.phase, fleet.plan.serving, fleet.plan.hold) == ("idle", 2, (1, 2)), "the old one lingers"
    fleet.ticks(12)
    assert fleet.plan.hold == (2,)
    assert [phase for phase, _ in fleet.seen[6:9]] == ["switch", "idle", "idle"]


def test_one_slow_replica_holds_it_back_and_one_that_fails_refuses_it(fleet: Fleet) -> None:
    fleet.slow = {"cloud0"}
    fleet.plan.start(2)
    fleet.ticks(10)
    assert (fleet.plan.phase, fleet.plan.serving) == ("load", 1)
    fleet.fails, fleet.slow = {"cloud0": "weights are cut off"}, set()
    fleet.ticks(2)
    assert (fleet.plan.phase, fleet.plan.serving, fleet.plan.hold) == ("idle", 1, (1,))
    assert fleet.plan.refused == {2: "cloud replica: weights are cut off"}
    fleet.fails = {}
    fleet.plan.start(2)
    fleet.ticks(3)
    assert (fleet.plan.serving, fleet.plan.refused) == (2, {}), "asked for again, it is tried again"


def test_replica_that_never_loads_does_not_hold_it_for_ever(fleet: Fleet) -> None:
    fleet.slow = {"edge1"}
    fleet.plan.start(2)
    fleet.ticks(601)
    assert fleet.plan.target is None
    assert "1 replica(s) had not loaded it after 300 s" in fleet.plan.refused[2]


def test_replica_that_vanished_is_forgotten(fleet: Fleet) -> None:
    del fleet.beats["edge1"]
    fleet.plan.start(2)
    fleet.tick()
    assert fleet.plan.phase == "load", "it may only be late"
    fleet.ticks(12)
    assert (fleet.plan.phase, fleet.plan.serving) == ("idle", 2)
    assert len(fleet.plan.members) == 2


def test_replica_that_says_goodbye_is_forgotten_at_once(fleet: Fleet) -> None:
    del fleet.beats["edge1"]
    fleet.plan.forget("edge1")
    fleet.plan.start(2)
    fleet.ticks(3)
    assert (fleet.plan.phase, fleet.plan.serving) == ("idle", 2)


def test_replica_that_joins_in_mid_rollout_is_waited_for(fleet: Fleet) -> None:
    fleet.plan.start(2)
    fleet.slow = {"cloud9"}
    fleet.beats["cloud9"] = Beat("cloud9", "cloud", "node", held=(1,))
    fleet.ticks(4)
    assert fleet.plan.phase == "load"
    fleet.slow = set()
    fleet.ticks(3)
    assert fleet.plan.serving == 2


def test_nothing_moves_before_replicas_had_time_to_report_nor_without_an_edge() -> None:
    fleet = Fleet()
    fleet.plan.start(2)
    fleet.ticks(2)
    assert fleet.plan.phase == "load", "a restarted control knows only some of the replicas"
    fleet.ticks(4)
    assert fleet.plan.serving == 2
    alone = Fleet(edges=0)
    alone.plan.start(2)
    alone.ticks(20)
    assert alone.plan.phase == "load"


def test_newer_wish_replaces_one_under_way_and_going_back_gives_it_up(fleet: Fleet) -> None:
    fleet.slow = {"edge0"}
    fleet.plan.start(2)
    fleet.tick()
    fleet.plan.start(3)
    assert fleet.plan.hold == (1, 3)
    fleet.plan.start(1)
    assert (fleet.plan.phase, fleet.plan.hold) == ("idle", (1,))


def test_lingering_version_is_served_again_without_loading(fleet: Fleet) -> None:
    fleet.plan.start(2)
    fleet.ticks(3)
    fleet.slow = set(fleet.beats)
    fleet.plan.start(1)
    fleet.ticks(2)
    assert fleet.plan.serving == 1
