"""A running server beside the simulated one: calibrated at one client, then predicted and measured at 2 to 8.

Read by `benchmarks.fleet`. Rounds are interleaved, one client and then each other number, so that what else the machine
does falls on all of them alike; and just before each, one client is measured again, for such a machine is now faster
and now slower by a quarter: what several clients saw is told at the speed of the calibration. Of each number, the half
of the rounds counts for latency in which other processes took the least of the machine, whatever was measured then; p50
is the median over these. What goes to the cloud does not depend on that: its share is of all rounds. What is predicted
follows from what one client saw, and from nothing else.
"""

import asyncio
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np

from benchmarks.fleet_load import Answered, Pace, closed_loop, cloud_batches, paced, walk
from benchmarks.memory import tree
from benchmarks.serving_servers import cpu_seconds
from jobs import simulate
from meanet import data
from meanet.data import Images
from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.fleet.model import Arrivals, Autoscaling, CloudTimes, EdgeTimes, Fleet, Link
from meanet.fleet.outcome import Outcome
from meanet.fleet.run import Simulator
from meanet.fleet.workload import Workload, workload
from meanet.preprocessing import encode_png
from meanet.routing import Policy

_ONE_SIGMA = 0.8413
"""Share of a normal distribution below its mean and one standard deviation."""
_IDLE_S = 3.0


@dataclass(frozen=True)
class Compare:
    """Calibrate at one client, predict 2 to 8, measure."""

    url: str
    """Of a running server (python -m serve_apps), on this machine."""
    exits: Path
    """The exits table of the model that it serves."""
    ready_file: Path | None = None
    """That the server was started with: it names the process whose processor time is read."""
    pid: int | None = None
    """That process, in place of a ready file."""
    clients: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Numbers to predict."""
    busy: float = 0.4
    """Share of what the machine has left for requests that the most clients are to take, by the calibration."""
    rounds: int = 6
    """Of all measurements."""
    seconds: float = 5.0
    """Of each measurement of a round; of one client's, twice that."""
    seed: int = 0
    """Of arrivals."""


class Meter:
    """Processor time of the server's processes and of this one, and the whole machine's."""

    def __init__(self, pid: int) -> None:
        self._pids, self._started = [*tree(pid), os.getpid()], time.monotonic()
        self._own, self._all = self.own(), _whole_machine()

    def own(self) -> float:
        """What server and client have taken so far, s."""
        return sum(cpu_seconds(pid) for pid in self._pids)

    def spent(self) -> float:
        """What they have taken since this was made, s."""
        return self.own() - self._own

    def others(self) -> float:
        """Share of the machine that everything else kept busy meanwhile, 0..1."""
        return max(0.0, _whole_machine() - self._all - self.spent()) / self._passed()

    def busy(self) -> float:
        """Share of the machine that server and client kept busy meanwhile, 0..1."""
        return self.spent() / self._passed()

    def _passed(self) -> float:
        return (time.monotonic() - self._started) * (os.cpu_count() or 1)


def _whole_machine() -> float:
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in words[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


AnySeen = TypeVar("AnySeen", bound="Seen")


@dataclass(frozen=True)
class Seen:
    """What clients saw in a round."""

    answers: Sequence[Answered]
    others: float
    """Share of the machine that other processes kept busy meanwhile, 0..1."""
    just_before_s: float | None = field(default=None, kw_only=True)
    """p50 of one client just before, s: how fast the machine was; None where that was not measured."""

    @property
    def p50_s(self) -> float:
        """Of all answers."""
        return float(np.median([answer.seconds for answer in self.answers]))


@dataclass(frozen=True)
class Cost:
    """Of a request, at one client."""

    processor_s: float
    """Server and client together, without what they take while nobody asks."""
    idle: float
    """Share of the machine that they take then, 0..1."""

    @property
    def core_s(self) -> float:
        """How long a request holds all processors together, of which the server's own idle work takes its share."""
        return self.processor_s / (os.cpu_count() or 1) / max(0.1, 1 - self.idle)


@dataclass(frozen=True)
class Alone(Seen):
    """What one client saw in a round, at the pace of the measurements."""

    cost: Cost
    image_s: float
    """Of the cloud, for one more image in a call."""
    in_a_row: Sequence[Answered]
    """What it saw when it sent as soon as it had its answer: the machine had no time to fall asleep."""

    def quantile(
        self,
        exit_: str,
        value: Callable[[Answered], float],
        share: float = 0.5,
        answers: Sequence[Answered] | None = None,
    ) -> float:
        """Of the answers from an exit; the median of the paced ones if not said otherwise.

        Raises:
            UserError: there are none.
        """
        found = [value(answer) for answer in answers or self.answers if answer.exit == exit_]
        if not found:
            raise UserError(f"no answer of {len(self.answers)} came from the exit {exit_!r}: measure for longer")
        return float(np.quantile(found, share))

    def times(self) -> dict[str, float]:
        """What the simulation asks for: the core's share of a request, and what a client waits beside it."""
        core = self.cost.core_s
        edge = {exit_: self.quantile(exit_, lambda answer: answer.edge_s) for exit_ in ("main", "extension")}
        front, later = (max(1e-5, self.quantile("main", _seconds, share) - core) for share in (0.5, _ONE_SIGMA))
        return {
            "main_s": core,
            "extension_s": max(0.0, edge["extension"] - edge["main"]),
            "front_s": front,
            "front_spread": math.log(later / front),
            "awake_front_s": max(1e-5, self.quantile("main", _seconds, answers=self.in_a_row) - core),
            "image_s": self.image_s,
            "network_s": max(0.0, self.quantile("cloud", lambda answer: answer.cloud_s) - self.image_s),
        }


def _seconds(answer: Answered) -> float:
    return answer.seconds


@dataclass(frozen=True)
class Calibration:
    """What one client tells: medians over the quieter rounds, s (`front_spread`: of a logarithm)."""

    edge: dict[str, float]
    """Fields of EdgeTimes."""
    cloud: dict[str, float]
    """Fields of CloudTimes."""
    rate: float
    """Images a second of a client in the measurements."""
    cost: dict[str, float]
    """Fields of Cost."""
    awake: dict[str, float]
    """front_s of one client that sends all the time."""

    @staticmethod
    def of(rounds: Sequence[Alone], rate: float) -> "Calibration":
        """From what one client saw."""
        quiet = quieter(rounds)
        times = _medians([one.times() for one in quiet])
        cloud = {name: times.pop(name) for name in ("image_s", "network_s")}
        awake = {"front_s": times.pop("awake_front_s")}
        return Calibration(times, cloud, rate, _medians([asdict(one.cost) for one in quiet]), awake)

    def front_s(self, clients: int) -> float:
        """What a request waits beside the core while so many clients send: as one client saw it that sends all the time
        where the core is busy when it comes, and else with the waking up of what has fallen asleep, as it saw paced."""
        one, all_ = (min(1.0, count * self.rate * self.edge["main_s"]) for count in (1, clients))
        awake = min(self.awake["front_s"], self.edge["front_s"])
        return float(awake + (self.edge["front_s"] - awake) * (1 - all_) / (1 - one))

    def predict(self, work: Workload, clients: int) -> Outcome:
        """One edge replica that so many clients share, and one of the cloud, on this machine."""
        fleet = Fleet(
            devices=clients,
            edge=EdgeTimes(**self.edge | {"front_s": self.front_s(clients)}),  # type: ignore[arg-type]
            cloud=CloudTimes(**self.cloud),
            link=Link(bytes_per_second=1e9),
            arrivals=Arrivals(rate=self.rate),
            scaling=Autoscaling(min_replicas=1, max_replicas=1),
            sources_per_edge=clients,
            horizon_s=1200.0,
        )
        return Simulator(fleet, work, mode="exact").at(clients)


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def quieter(rounds: Sequence[AnySeen]) -> list[AnySeen]:
    """The half in which other processes took the least."""
    return sorted(rounds, key=lambda one: one.others)[: -(-len(rounds) // 2)]


@dataclass(frozen=True)
class Bench:
    """A server under measurement."""

    session: aiohttp.ClientSession
    flags: Compare
    pid: int
    bodies: list[bytes]
    walks: dict[tuple[int, int], Iterator[bytes]] = field(default_factory=dict)
    """Of each client of so many, through all rounds: after a whole walk, each exit's share is that of the images."""

    async def cost(self) -> tuple[Cost, list[Answered]]:
        """Of a request of one client in a closed loop, and the answers to all images."""
        meter = Meter(self.pid)
        await asyncio.sleep(_IDLE_S)
        idle = meter.busy()
        meter, started = Meter(self.pid), time.monotonic()
        answers = await closed_loop(self.session, self.flags.url, self.bodies, len(self.bodies))
        rest = idle * (time.monotonic() - started) * (os.cpu_count() or 1)
        return Cost(max((meter.spent() - rest) / len(answers), 1e-4), idle), answers

    async def rate(self) -> float:
        """Images a second of a client, so that the most of them take as much of the machine as is asked."""
        cost, _ = await self.cost()
        return self.flags.busy / cost.core_s / max(self.flags.clients)

    async def paced(self, clients: int, rate: float, seconds: float, seed: int) -> Seen:
        """What so many clients see."""
        walks = [
            self.walks.setdefault((clients, client), walk(self.bodies, (self.flags.seed, clients, client)))
            for client in range(clients)
        ]
        meter = Meter(self.pid)
        answers = await paced(self.session, self.flags.url, walks, Pace(clients, rate, seconds, seed))
        return Seen(answers, meter.others())

    async def alone(self, rate: float, seed: int) -> Alone:
        """One client of a round."""
        meter = Meter(self.pid)
        cost, answers = await self.cost()
        complex_ones = [body for body, answer in zip(self.bodies, answers, strict=True) if answer.exit == "cloud"]
        image_s = await cloud_batches(self.session, self.flags.url, complex_ones)
        seen = await self.paced(1, rate, 2 * self.flags.seconds, seed)
        return Alone(seen.answers, meter.others(), cost, image_s, answers)


def bodies_of(table: ExitsTable) -> list[bytes]:
    """The test images as PNG, in the table's order."""
    images: Images = data.load(table.recipe.data)
    rows = table.index("test")
    return [encode_png(image) for batch in images.batches(rows, images.evaluation_batch) for image in batch]


def _server_pid(flags: Compare) -> int:
    if flags.pid is None and flags.ready_file is None:
        raise UserError("give --ready-file (or --pid) of a server of this machine: its processor time is read")
    try:
        pid = flags.pid or int(json.loads((flags.ready_file or Path()).read_text())["pid"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--ready-file {flags.ready_file} cannot be read ({error}): give that of the server") from error
    if not Path(f"/proc/{pid}").exists():
        raise UserError(f"process {pid} is not there any more: start a server with `python -m serve_apps`")
    return pid


async def compare(flags: Compare) -> dict[str, Any]:
    """Measure, and predict from what one client saw.

    Raises:
        UserError: no such server process; a server of another model than the table's; an exit that gave no answer; the
            server refused.
    """
    pid, table = _server_pid(flags), ExitsTable.read(flags.exits)
    seen: dict[int, list[Seen]] = {clients: [] for clients in flags.clients}
    alone: list[Alone] = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{flags.url}/v1/model") as response:
            policy = Policy.from_dict((await response.json())["operating_point"])
        simulate.check_is_of(policy, table, f"the operating point of {flags.url}")
        bench = Bench(session, flags, pid, bodies_of(table))
        await closed_loop(session, flags.url, bench.bodies, 200)  # warm
        rate, meter = await bench.rate(), Meter(pid)
        for number in range(flags.rounds):
            seed = 1000 * flags.seed + 100 * number
            alone.append(await bench.alone(rate, seed))
            for clients, rounds in seen.items():
                just_before = await bench.paced(1, rate, flags.seconds, seed + 50 + clients)
                several = await bench.paced(clients, rate, flags.seconds, seed + clients)
                rounds.append(dataclasses.replace(several, just_before_s=just_before.p50_s))
            print(f"round {number + 1} of {flags.rounds}; others kept {meter.others():.0%} busy", flush=True)
        others = meter.others()
    found = Calibration.of(alone, rate)
    work = workload(table.exits("test"), table.costs, policy)
    everybody: dict[int, Sequence[Seen]] = {1: alone, **seen}
    usual = float(np.median([one.p50_s for one in quieter(alone)]))
    rows = [_row(clients, found.predict(work, clients), rounds, usual) for clients, rounds in everybody.items()]
    told = {name: value for name, value in asdict(flags).items() if name not in ("url", "ready_file")}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}
    return {"calibration": asdict(found) | {"others_busy": others}, "rows": rows, "flags": plain}


def _row(clients: int, predicted: Outcome, rounds: Sequence[Seen], usual_s: float) -> dict[str, Any]:
    """`usual_s`: p50 of the one client by which was calibrated; measured is as if the machine had been as fast then."""
    quiet = quieter(rounds)
    p50 = [one.p50_s * usual_s / (one.just_before_s or usual_s) for one in quiet]
    gone = [answer.exit == "cloud" for one in rounds for answer in one.answers]
    return {
        "clients": clients,
        "requests": len(gone),
        "p50": _pair(predicted.latency["p50"], p50) | {"by_the_clock": float(np.median([one.p50_s for one in quiet]))},
        "cloud_share": _pair(predicted.share["cloud"], [float(np.mean(gone))]),
        "degraded": sum(answer.degraded for one in quiet for answer in one.answers),
        "others": [one.others for one in quiet],
        "left_out": [[one.p50_s, one.others] for one in _louder(rounds)],
    }


def _louder(rounds: Sequence[Seen]) -> list[Seen]:
    return sorted(rounds, key=lambda one: one.others)[-(-len(rounds) // 2) :]


def _pair(predicted: float, measured: Sequence[float]) -> dict[str, Any]:
    return {"predicted": predicted, "measured": float(np.median(measured)), "rounds": list(measured)}


def error(pair: Mapping[str, Any]) -> float:
    """How far the prediction lies off, relative to what was measured."""
    return abs(pair["predicted"] / pair["measured"] - 1) if pair["measured"] else float(pair["predicted"] > 0)


def measured(flags: Compare) -> dict[str, Any]:
    """`compare`, with a server that is away named."""
    try:
        return asyncio.run(compare(flags))
    except aiohttp.ClientError as trouble:
        raise UserError(f"--url {flags.url}: {trouble}; start a server with `python -m serve_apps`") from trouble
