"""The fleet on paper against a running server, and up to a million devices.

    python -m benchmarks.fleet compare --url http://127.0.0.1:8000 --exits outputs/demo/exits.parquet
    python -m benchmarks.fleet plot

compare: calibrated at one client, p50 and cloud share are predicted for 2 to 8 and measured; times.json is what
`jobs.simulate --times` takes. plot: the figure of docs/benchmarks/fleet.md, which both write. The server must run on
this machine, which must be quiet: processor time of a request is read from the whole machine's.
"""

import asyncio
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tyro

from benchmarks.fleet_load import Answered, Pace, closed_loop, cloud_batches, paced
from jobs import simulate
from jobs._cli import commit
from meanet import data
from meanet.data import Images
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable
from meanet.fleet import page
from meanet.fleet.model import Arrivals, Autoscaling, CloudTimes, EdgeTimes, Fleet, Link
from meanet.fleet.outcome import Outcome
from meanet.fleet.run import Simulator
from meanet.fleet.workload import Workload, workload
from meanet.plots import save_png
from meanet.preprocessing import encode_png
from meanet.routing import Policy
from meanet.storage import write_text

FOLDER = Path("docs/benchmarks/fleet")
BOUND = 0.15
OFFICE = (1, 1, 1, 1, 1, 2, 4, 8, 12, 14, 15, 15, 14, 15, 15, 14, 12, 10, 8, 6, 4, 3, 2, 1)
"""Hours of the figure's day: an example."""


@dataclass(frozen=True)
class Compare:
    """Calibrate at one client, predict 2 to 8, measure."""

    url: str
    """Of a running server (python -m serve_apps), on this machine."""
    exits: Path
    """The exits table of the model that it serves."""
    clients: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Numbers to predict."""
    busy: float = 0.4
    """Share of this machine's processors that the most clients are to keep busy, by the calibration."""
    seconds: float = 30.0
    """Of each measurement."""
    seed: int = 0
    """Of arrivals."""


@dataclass(frozen=True)
class Plot:
    """Simulate one to a million devices over a day."""

    exits: str = "benchmarks/evidence/cifar100_resnet32_b/exits.parquet"
    """An exits table."""
    main_ms: float = 20.0
    """Main block on the device: assumed, a small board."""
    extension_ms: float = 12.0
    """Adaptive and extension block: assumed."""
    cloud_image_ms: float = 8.0
    """Cloud network on a processor's core: assumed."""
    cloud_call_ms: float = 2.0
    """Of a call: assumed."""
    rate: float = 0.1
    """Images a second of a device."""
    max_replicas: int = 500
    """Of the cloud."""
    devices: tuple[int, ...] = field(default=(1, 10, 100, 1_000, 10_000, 100_000, 1_000_000))
    """Numbers of devices."""


# compare


def bodies_of(table: ExitsTable) -> list[bytes]:
    """The test images as PNG, in the table's order."""
    images: Images = data.load(table.recipe.data)
    rows = table.index("test")
    return [encode_png(image) for batch in images.batches(rows, images.evaluation_batch) for image in batch]


def processor_seconds() -> float:
    """What all processors of this machine have worked so far, s."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in words[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Calibration:
    """What one client tells."""

    edge: dict[str, float]
    """Fields of EdgeTimes."""
    cloud: dict[str, float]
    """Fields of CloudTimes."""
    rate: float
    """Images a second of a client in the measurements."""
    processor_s: float
    """Of a request, all processes together, this client among them."""
    p50_s: float
    """Measured at one client and that rate."""
    others_busy: float
    """Share of the machine that was busy before."""


async def calibrate(session: aiohttp.ClientSession, flags: Compare, bodies: list[bytes]) -> Calibration:
    """One client: in a closed loop for the processor time, then at the rate of the measurements for the rest."""
    await closed_loop(session, flags.url, bodies, 100)
    started, before = time.monotonic(), processor_seconds()
    await asyncio.sleep(3)
    others = (processor_seconds() - before) / (time.monotonic() - started)
    started, before = time.monotonic(), processor_seconds()
    alone = await closed_loop(session, flags.url, bodies, 400)
    spent = processor_seconds() - before - others * (time.monotonic() - started)
    processor_s = max(spent, 1e-4 * len(alone)) / len(alone)
    cores = os.cpu_count() or 1
    rate = flags.busy * cores / processor_s / max(flags.clients)
    complex_ones = [body for body, answer in zip(bodies, alone, strict=False) if answer.exit == "cloud"]
    image_s = await cloud_batches(session, flags.url, complex_ones)
    one = await paced(session, flags.url, bodies, Pace(1, rate, 2 * flags.seconds, flags.seed))

    def median(exit_: str, value: Callable[[Answered], float]) -> float:
        found = [value(answer) for answer in one if answer.exit == exit_]
        if not found:
            raise UserError(f"no answer came from the exit {exit_!r} in {flags.seconds:g} s: measure for longer")
        return float(np.median(found))

    core_s = processor_s / cores
    main = median("main", lambda answer: answer.seconds)
    extension_s = max(0.0, median("extension", lambda answer: answer.edge_s) - median("main", lambda a: a.edge_s))
    network = median("cloud", lambda answer: answer.cloud_s) - image_s
    return Calibration(
        edge={"main_s": core_s, "extension_s": extension_s, "front_s": max(0.0, main - core_s)},
        cloud={"image_s": image_s, "call_s": 0.0, "network_s": max(0.0, network)},
        rate=rate,
        processor_s=processor_s,
        p50_s=float(np.median([answer.seconds for answer in one])),
        others_busy=others / cores,
    )


def predict(found: Calibration, work: Workload, clients: int) -> Outcome:
    """One edge replica that so many clients share, and one of the cloud, on this machine."""
    fleet = Fleet(
        devices=clients,
        edge=EdgeTimes(**found.edge),  # type: ignore[arg-type]
        cloud=CloudTimes(**found.cloud),
        link=Link(bytes_per_second=1e9),
        arrivals=Arrivals(rate=found.rate),
        scaling=Autoscaling(min_replicas=1, max_replicas=1),
        sources_per_edge=clients,
        horizon_s=1200.0,
    )
    return Simulator(fleet, work, mode="exact").at(clients)


async def compare(flags: Compare) -> dict[str, Any]:
    """Predictions, then measurements: none of these has been seen when those are made."""
    table = ExitsTable.read(flags.exits)
    bodies = bodies_of(table)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{flags.url}/v1/model") as response:
            policy = Policy.from_dict((await response.json())["operating_point"])
        work = workload(table.exits("test"), table.costs, policy)
        found = await calibrate(session, flags, bodies)
        predicted = {clients: predict(found, work, clients) for clients in flags.clients}
        rows = []
        for clients, outcome in predicted.items():
            pace = Pace(clients, found.rate, flags.seconds, flags.seed + clients)
            answers = await paced(session, flags.url, bodies, pace)
            p50 = float(np.median([answer.seconds for answer in answers]))
            share = float(np.mean([answer.exit == "cloud" for answer in answers]))
            rows.append(
                {
                    "clients": clients,
                    "requests": len(answers),
                    "p50": {"predicted": outcome.latency["p50"], "measured": p50},
                    "cloud_share": {"predicted": outcome.share["cloud"], "measured": share},
                    "degraded": sum(answer.degraded for answer in answers),
                }
            )
            print(row_of(rows[-1]), flush=True)
    return {"calibration": asdict(found), "rows": rows, "flags": asdict(flags) | {"exits": str(flags.exits)}, **where()}


def where() -> dict[str, str]:
    """Commit, date, machine, versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("simpy", "ray", "numpy"))
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, {versions}"
    return {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "machine": machine}


def error(pair: Mapping[str, float]) -> float:
    """How far the prediction lies off, relative to what was measured."""
    return abs(pair["predicted"] / pair["measured"] - 1) if pair["measured"] else float(pair["predicted"] > 0)


def row_of(row: Mapping[str, Any]) -> str:
    """A line of the page's table."""
    p50, share = row["p50"], row["cloud_share"]
    return (
        f"| {row['clients']} | {row['requests']} | {1000 * p50['predicted']:.2f} | {1000 * p50['measured']:.2f} | "
        f"{error(p50):.1%} | {share['predicted']:.1%} | {share['measured']:.1%} | {error(share):.1%} | "
        f"{row['degraded']} |"
    )


# The page


def compared(found: Mapping[str, Any]) -> str:
    """The section of the comparison."""
    calibration, rows, flags = found["calibration"], found["rows"], found["flags"]
    worst = {name: max(error(row[name]) for row in rows) for name in ("p50", "cloud_share")}
    held = all(value <= BOUND for value in worst.values())
    lines = "\n".join(row_of(row) for row in rows)
    numbers = ", ".join(
        f"{name} {1000 * value:.2f}" for part in ("edge", "cloud") for name, value in calibration[part].items()
    )
    return f"""## Against a running server

`python -m benchmarks.fleet compare`, at commit {found["commit"]}, {found["date"]}; {found["machine"]}; other processes
kept {calibration["others_busy"]:.0%} of the machine busy. Worst error: p50 {worst["p50"]:.1%}, cloud share
{worst["cloud_share"]:.1%}; the bound of {BOUND:.0%} is **{"kept" if held else "not kept"}**.

Clients are paced, not in a closed loop: each sends at random (Poisson, {calibration["rate"]:.2f} requests a second)
whether or not it has its last answer, as a camera does that sees something; a closed loop would measure how fast a
client can be, and has no part in a fleet. Latency counts from the moment when a request was to be sent. The rate is
such that {max(flags["clients"])} clients take {flags["busy"]:.0%} of the processors. Each walks through the test images
in an order of its own. All clients share one edge replica, and this machine's processors with HTTP, proxy and cloud: a
request's processor time, all processes together ({1000 * calibration["processor_s"]:.2f} ms), divided by the number of
processors is what holds the simulated edge's core; the rest of what one client waits holds nothing.

Calibrated at one client, in ms: {numbers}; its p50 was {1000 * calibration["p50_s"]:.2f}.

| clients | requests | p50 predicted, ms | measured | off by | cloud share predicted | measured | off by | degraded |
|---|---|---|---|---|---|---|---|---|
{lines}
"""


def plotted(found: Mapping[str, Any]) -> str:
    """The section of the figure."""
    result, flags = found["result"], found["flags"]
    return f"""## To a million devices

`python -m benchmarks.fleet plot`, at commit {found["commit"]}, {found["date"]}; {found["machine"]}. All of it took
{found["seconds"]:.0f} s, the largest fleet alone {found["seconds_largest"]:.1f} s (wall time). A day of
{flags["exits"]} at {flags["rate"]} images a second of a device on average, most by day; {flags["main_ms"]:g} ms for
the main block, {flags["extension_ms"]:g} for adaptive and extension, {flags["cloud_call_ms"]:g} +
{flags["cloud_image_ms"]:g} n for a call of n images (all four assumed), {flags["max_replicas"]} replicas at most,
joules {result["outcomes"][-1]["joules_source"]}, cost in {result["outcomes"][-1]["cost_unit"]}.

{page.summary(result)}

{page.markdown_table(result["outcomes"])}

![Latency, shares and replicas over the number of devices; replicas over the day](fleet.png)
"""


def write_page() -> None:
    """docs/benchmarks/fleet.md from what was measured and simulated last."""
    sections = {"compare.json": compared, "plot.json": plotted}
    parts = [
        show(json.loads((FOLDER / name).read_text())) for name, show in sections.items() if (FOLDER / name).exists()
    ]
    text = "\n".join(
        ["# The fleet on paper", "", "What is simulated: [../simulation.md](../simulation.md).", "", *parts]
    )
    write_text(text, FOLDER.with_suffix(".md"))


def plot(flags: Plot) -> dict[str, Any]:
    """The simulations and the figure."""
    own = simulate.Flags(
        exits=flags.exits,
        devices=flags.devices,
        main_ms=flags.main_ms,
        extension_ms=flags.extension_ms,
        cloud_image_ms=flags.cloud_image_ms,
        cloud_call_ms=flags.cloud_call_ms,
        arrivals=Arrivals(rate=flags.rate, hours=tuple(float(hour) for hour in OFFICE)),
        scaling=Autoscaling(max_replicas=flags.max_replicas, target_ongoing_requests=0.8),
        hours=24.0,
    )
    table = simulate.read_table(own)
    started = time.monotonic()
    result = simulate.simulate(own, table)
    seconds = time.monotonic() - started
    save_png(page.figure(result), FOLDER.with_suffix(".png"))
    started = time.monotonic()
    work = workload(table.exits(own.split), table.costs, Policy.from_dict(result["policy"]))
    Simulator(simulate.fleet_of(own, table), work, mode="aggregated").at(max(flags.devices))
    largest = time.monotonic() - started
    return {"result": result, "seconds": seconds, "seconds_largest": largest, "flags": asdict(flags), **where()}


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    flags: Compare | Plot = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "plot": Plot}, prog="python -m benchmarks.fleet"
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    if isinstance(flags, Compare):
        try:
            measured = asyncio.run(compare(flags))
        except aiohttp.ClientError as error:
            raise UserError(f"--url {flags.url}: {error}; start a server with `python -m serve_apps`") from error
        write_text(json.dumps(measured, indent=1), FOLDER / "compare.json")
        times = {part: measured["calibration"][part] for part in ("edge", "cloud")}
        write_text(json.dumps(times, indent=1), FOLDER / "times.json")
    else:
        found = plot(flags)
        for outcome in found["result"]["outcomes"]:
            outcome["timeline"] = []  # it is in the figure
        if found["result"]["advice"]:
            found["result"]["advice"]["outcome"]["timeline"] = []
        write_text(json.dumps(found, indent=1), FOLDER / "plot.json")
    write_page()


if __name__ == "__main__":
    main()
