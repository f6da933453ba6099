"""The fleet on paper against a running server, and up to a million devices.

    RAY_worker_niceness=0 python -m serve_apps --ready-file ready.json
    python -m benchmarks.fleet compare --url http://127.0.0.1:8000 --ready-file ready.json \\
        --exits outputs/demo/exits.parquet
    python -m benchmarks.fleet plot

compare: calibrated at one client, p50 and cloud share are predicted for 2 to 8 and measured; times.json is what
`jobs.simulate --times` takes. plot: the figure of docs/benchmarks/fleet.md, which both write. The server must run on
this machine, which must be quiet; Ray gives its workers a low priority if nobody says otherwise, so that whatever else
runs takes their processors.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from benchmarks.fleet_compare import Compare, error, measured
from jobs import simulate
from jobs._cli import commit
from meanet.errors import exit_on_user_error
from meanet.fleet import page
from meanet.fleet.model import Arrivals, Autoscaling
from meanet.fleet.run import Simulator
from meanet.fleet.workload import workload
from meanet.plots import save_png
from meanet.routing import Policy
from meanet.storage import write_text

FOLDER = Path("docs/benchmarks/fleet")
BOUND = 0.15
LOUD = 0.1
"""Share of the machine; where other processes take more, the page says that it judges little."""
OFFICE = (1, 1, 1, 1, 1, 2, 4, 8, 12, 14, 15, 15, 14, 15, 15, 14, 12, 10, 8, 6, 4, 3, 2, 1)
"""Hours of the figure's day: an example."""


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


def where() -> dict[str, str]:
    """Commit, date, machine, versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("simpy", "ray", "numpy"))
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, {versions}"
    return {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "machine": machine}


def row_of(row: Mapping[str, Any]) -> str:
    """A line of the page's table."""
    p50, share = row["p50"], row["cloud_share"]
    low, high = (1000 * bound(p50["rounds"]) for bound in (min, max))
    return (
        f"| {row['clients']} | {row['requests']} | {1000 * p50['predicted']:.2f} | {1000 * p50['measured']:.2f} | "
        f"{1000 * p50['by_the_clock']:.2f} | {low:.2f} to {high:.2f} | {error(p50):.1%} | "
        f"{share['predicted']:.1%} | {share['measured']:.1%} | {error(share):.1%} | {row['degraded']} |"
    )


# The page


def compared(found: Mapping[str, Any]) -> str:
    """The section of the comparison."""
    calibration, rows, flags = found["calibration"], found["rows"], found["flags"]
    cost = calibration["cost"]
    predicted = [row for row in rows if row["clients"] > 1]
    worst = {name: max(error(row[name]) for row in predicted) for name in ("p50", "cloud_share")}
    held = all(value <= BOUND for value in worst.values())
    loud = (
        " So much of other processes, which come and go, tells of these as much as of the simulation: it is to be "
        "measured again on a quiet machine."
        if calibration["others_busy"] > LOUD
        else ""
    )
    lines = "\n".join(row_of(row) for row in rows)
    numbers = ", ".join(
        f"{name} {1000 * value:.2f}"
        for part in ("edge", "cloud")
        for name, value in calibration[part].items()
        if name.endswith("_s")
    )
    return f"""## Against a running server

`python -m benchmarks.fleet compare`, at commit {found["commit"]}, {found["date"]}; {found["machine"]}; other processes
kept {calibration["others_busy"]:.0%} of the machine busy meanwhile. Worst error at {predicted[0]["clients"]} to
{predicted[-1]["clients"]} clients: p50 {worst["p50"]:.1%}, cloud share {worst["cloud_share"]:.1%}; the bound of
{BOUND:.0%} is **{"kept" if held else "not kept"}**.{loud}

{flags["rounds"]} rounds of {flags["seconds"]:g} s at each number of clients, one after another. Of each number, the
half of the rounds counts for latency in which other processes took the least of the machine, whatever was measured
then; p50 is the median over these, and "rounds" says how far they lay apart. Such a machine is now faster and now
slower: one client is measured just before several are, and "measured" is what these saw times that client's p50 in
the calibration over its p50 just before; "by the clock" is what they saw. What goes to the cloud does not depend on
that: the share is of all requests of all rounds. Clients are paced, not in a closed loop: each
sends at random (Poisson, {calibration["rate"]:.2f} requests a second) whether or not it has its last answer, as a
camera does that sees something; a closed loop would measure how fast a client can be, and has no part in a fleet.
Latency counts from the moment when a request was to be sent. Each client walks through the test images in an order of
its own, from round to round.

All clients share one edge replica, and this machine's processors with HTTP, proxy and cloud. What holds the simulated
edge's core is a request's processor time, server and client together ({1000 * cost["processor_s"]:.2f} ms), divided by
the number of processors and by the share of them that is left: at rest, server and cluster take {cost["idle"]:.0%}.
What one client waits beside that holds nothing, and varies as it did there (log-normal). Where a request finds the
machine busy, nothing has to wake up for it: then it waits what one client in a closed loop did
({1000 * calibration["awake"]["front_s"]:.2f} ms), which is so with the probability that the core is taken.
The rate is such that {max(flags["clients"])} clients take {flags["busy"]:.0%} of what is left. Other processes are no
part of the simulation.

Calibrated at one client alone, in ms: {numbers}; front_spread {calibration["edge"]["front_spread"]:.2f}.

| clients | requests | p50 predicted, ms | measured | by the clock | rounds | off by | \
cloud predicted | measured | off by | degraded |
|---|---|---|---|---|---|---|---|---|---|---|
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
    table, here = simulate.read_table(own), where()  # before the figure is written into the tree
    started = time.monotonic()
    result = simulate.simulate(own, table)
    seconds = time.monotonic() - started
    save_png(page.figure(result), FOLDER.with_suffix(".png"))
    started = time.monotonic()
    work = workload(table.exits(own.split), table.costs, Policy.from_dict(result["policy"]))
    Simulator(simulate.fleet_of(own, table), work, mode="aggregated").at(max(flags.devices))
    largest = time.monotonic() - started
    return {"result": result, "seconds": seconds, "seconds_largest": largest, "flags": asdict(flags), **here}


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    flags: Compare | Plot = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "plot": Plot}, prog="python -m benchmarks.fleet"
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    if isinstance(flags, Compare):
        compared_ = {**measured(flags), **where()}
        write_text(json.dumps(compared_, indent=1), FOLDER / "compare.json")
        times = {part: compared_["calibration"][part] for part in ("edge", "cloud")}
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
