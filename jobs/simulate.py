"""A fleet of devices on paper: `python -m jobs.simulate outputs/digits/exits.parquet --times times.json`.

Latency, joules, cloud replicas and cost over the number of devices; where the cloud becomes the bottleneck, and what
threshold would move it. No network runs. docs/simulation.md has what is simulated, and how well.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jobs import _cli, _progress
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable
from meanet.fleet import advice, page
from meanet.fleet.model import Arrivals, Autoscaling, CloudTimes, EdgeTimes, Fleet, Limits, Link
from meanet.fleet.outcome import Outcome, Price
from meanet.fleet.run import Mode, Simulator
from meanet.fleet.workload import workload
from meanet.operating_point import search
from meanet.profile_files import embed
from meanet.routing import Policy
from meanet.storage import write_text
from tune_spaces.policies import SPACES


@dataclass(frozen=True)
class Flags:
    """Simulate N devices that share an autoscaled cloud."""

    exits: Annotated[str, tyro.conf.Positional]
    """The exits table: a path or s3:// URI."""
    devices: tuple[int, ...] = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
    """Numbers of devices."""
    operating_point: Path | None = None
    """JSON as jobs.sweep writes it; the one beside the table, or else the recipe's own search, if not given."""
    split: str = "test"
    """Whose images are drawn: test or validation."""
    times: Path | None = None
    """JSON of measured times, {"edge": {...}, "cloud": {...}}, as benchmarks.fleet compare writes it; flags win."""
    main_ms: float | None = None
    """Main block on the device, an image; by the device's profile, where that has a speed, if not given."""
    extension_ms: float | None = None
    """Adaptive and extension block, an image; by the device's profile, if not given."""
    edge_batch_ms: float | None = None
    """Of each batch on the device, whatever its size."""
    front_ms: float | None = None
    """Of a request, without holding the device's core."""
    cloud_image_ms: float | None = None
    """The cloud network, an image; the recipe's energy.cloud_seconds, where that is above 0, if not given."""
    cloud_call_ms: float | None = None
    """Of each call to the cloud, whatever its size."""
    cloud_network_ms: float | None = None
    """Of each call, beside the link's upload and round trip and without holding a replica."""
    device: str | None = None
    """Device profile; the recipe's own if not given."""
    link: str | None = None
    """Link profile; the recipe's own if not given."""
    payload: str | None = None
    """What is sent: png, raw or jpegQ; the recipe's own if not given."""
    profiles: str | None = None
    """A YAML file with further profiles."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    """When images come."""
    scaling: Autoscaling = field(default_factory=Autoscaling)
    """Of the cloud."""
    limits: Limits = field(default_factory=Limits)
    """Of an edge replica."""
    price: Price = field(default_factory=Price)
    """Of a replica of the cloud."""
    hours: float = 1.0
    """How long is simulated."""
    start_hour: float = 0.0
    """Time of day at the beginning, 0..24."""
    sources_per_edge: int = 1
    """Devices that share an edge replica."""
    idle_watts: float = 0.0
    """What a device draws whatever it does, W; for joules a device-hour."""
    warm: bool = True
    """Begin with the replicas that the first load wants, not with the fewest."""
    mode: Mode = "auto"
    """exact: every event (20 million images at most); aggregated: slot by slot; auto: exact where that is quick."""
    seed: int = 0
    """Of all that is drawn."""
    output: Path | None = None
    """The page; `fleet.html` beside a local exits table if not given."""
    json: bool = False
    """Print the result as JSON."""


_ENERGY = ("device", "link", "payload", "profiles")


def read_table(flags: Flags) -> ExitsTable:
    """The table under the profiles that the flags name."""
    if flags.split not in ("test", "validation"):
        raise UserError(f"--split {flags.split!r}: choose test or validation")
    table = ExitsTable.read(flags.exits)
    given = {name: value for name in _ENERGY if (value := getattr(flags, name)) is not None}
    table.energy = embed(dataclasses.replace(table.energy, **given))
    return table


def policy_of(flags: Flags, table: ExitsTable) -> Policy:
    """The operating point that is simulated.

    Raises:
        UserError: the file named is missing or no operating point.
    """
    beside = None if "://" in flags.exits else Path(flags.exits).with_name("operating_point.json")
    path = flags.operating_point or (beside if beside and beside.exists() else None)
    if path is None:
        _progress.say("note: no operating point given and none beside the table; searching the recipe's own")
        space = SPACES["early_gates"]()
        sizes = space.sizes(len(table.hard_classes))
        return Policy.from_dict(search(table, table.operating_point, space.gates, sizes).chosen)
    try:
        policy = Policy.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--operating-point {path} cannot be read ({error}): write one with jobs.sweep") from error
    check_is_of(policy, table, str(path))
    return policy


def check_is_of(policy: Policy, table: ExitsTable, source: str) -> None:
    """That an operating point, from where `source` says, is of the table's model.

    Raises:
        UserError: it is of another one.
    """
    if policy.hard_classes != table.hard_classes[: len(policy.hard_classes)]:
        raise UserError(
            f"{source} is of another model: its hard classes {policy.hard_classes} are not the first of the table's "
            f"{table.hard_classes}; give the one that was found on this table"
        )


def edge_times(flags: Flags, table: ExitsTable, measured: dict[str, float]) -> EdgeTimes:
    """Flags, then measured times, then the device's profile.

    Raises:
        UserError: none of them tells.
    """
    costs = table.costs
    has_speed = costs.device.block_seconds(costs.macs) is not None
    profile = {"main_s": costs.main_seconds, "extension_s": costs.extension_seconds} if has_speed else {}
    flag = {
        "main_s": flags.main_ms,
        "extension_s": flags.extension_ms,
        "batch_s": flags.edge_batch_ms,
        "front_s": flags.front_ms,
    }
    known: dict[str, Any] = profile | measured | _seconds(flag)
    missing = [name for name in ("main_s", "extension_s") if name not in known]
    if missing:
        raise UserError(
            f"device {table.energy.device!r} has no speed: give --main-ms and --extension-ms, or --times, or a "
            "--device that has one (`python -m jobs.measure` writes its profile)"
        )
    return EdgeTimes(**known)


def cloud_times(flags: Flags, table: ExitsTable, measured: dict[str, float]) -> CloudTimes:
    """Flags, then measured times, then the recipe's own.

    Raises:
        UserError: none of them tells.
    """
    own = {"image_s": table.energy.cloud_seconds} if table.energy.cloud_seconds > 0 else {}
    flag = {"image_s": flags.cloud_image_ms, "call_s": flags.cloud_call_ms, "network_s": flags.cloud_network_ms}
    known = own | measured | _seconds(flag)
    if "image_s" not in known:
        raise UserError("nothing says how long the cloud takes for an image: give --cloud-image-ms, or --times")
    return CloudTimes(**known)


def _seconds(milliseconds: dict[str, float | None]) -> dict[str, float]:
    return {name: value / 1000 for name, value in milliseconds.items() if value is not None}


def read_times(path: Path | None) -> dict[str, dict[str, float]]:
    """Measured times of edge and cloud.

    Raises:
        UserError: no such file, no JSON, or a name that is none of the times.
    """
    if path is None:
        return {"edge": {}, "cloud": {}}
    try:
        content = json.loads(path.read_text())
        found = {part: {name: float(value) for name, value in content[part].items()} for part in ("edge", "cloud")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'--times {path} cannot be read ({error!r}): it takes {{"edge": {{"main_s": ...}}, "cloud": '
            '{"image_s": ...}}, as `python -m benchmarks.fleet compare` writes it'
        ) from error
    for part, kind in (("edge", EdgeTimes), ("cloud", CloudTimes)):
        names = {item.name for item in dataclasses.fields(kind)}
        unknown = sorted(set(found[part]) - names)
        if unknown:
            raise UserError(f"--times {path}: {part} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    return found


def fleet_of(flags: Flags, table: ExitsTable) -> Fleet:
    """What is simulated, at one device."""
    measured, link = read_times(flags.times), table.costs.link
    return Fleet(
        devices=1,
        edge=edge_times(flags, table, measured["edge"]),
        cloud=cloud_times(flags, table, measured["cloud"]),
        link=Link(link.upload_mbps * 1e6 / 8, link.rtt_seconds),
        arrivals=flags.arrivals,
        scaling=flags.scaling,
        limits=flags.limits,
        sources_per_edge=flags.sources_per_edge,
        horizon_s=3600 * flags.hours,
        start_hour=flags.start_hour,
        idle_watts=flags.idle_watts,
        warm=flags.warm,
    )


def simulate(flags: Flags, table: ExitsTable) -> dict[str, Any]:
    """Every number of devices, the bottleneck and the advice."""
    sizes = advice.devices_of(flags.devices)
    policy, fleet = policy_of(flags, table), fleet_of(flags, table)
    work = workload(table.exits(flags.split), table.costs, policy)
    simulator = Simulator(fleet, work, flags.seed, flags.price, flags.mode)
    outcomes: list[Outcome] = []
    for devices in sizes:
        outcomes.append(simulator.at(devices))
        _progress.say(f"  {devices:,} devices simulated, {outcomes[-1].mode}")
    narrow = advice.bottleneck(simulator, sizes[-1])
    found = None
    if narrow is not None:
        _progress.say(f"  {narrow.devices:,} devices fit; looking for a threshold under which {sizes[-1]:,} do")
        adviser = advice.Adviser(table, policy, flags.split, flags.seed, flags.price, flags.mode)
        found = adviser.advise(dataclasses.replace(fleet, devices=sizes[-1]))
    return {
        "exits": flags.exits,
        "policy": policy.to_dict(),
        "fleet": asdict(fleet),
        "outcomes": [outcome.to_dict() for outcome in outcomes],
        "bottleneck": asdict(narrow) if narrow else None,
        "advice": found.to_dict() if found else None,
    }


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse("simulate", Flags)
    result = simulate(flags, read_table(flags))
    output = flags.output or (None if "://" in flags.exits else Path(flags.exits).with_name("fleet.html"))
    if output:
        described = {name: value for name, value in result["fleet"].items() if name != "devices"}
        write_text(page.page(result, json.dumps({"policy": result["policy"], **described}, indent=2)), output)
    if flags.json:
        print(json.dumps(result))
        return
    print(page.text_table(result["outcomes"]))
    print(page.summary(result))
    print(f"joules {result['outcomes'][-1]['joules_source']}; cost in {flags.price.unit}")
    if output:
        print(f"page: {output}")


if __name__ == "__main__":
    main()
