"""Time a trained model's blocks here, and meter their joules: `python -m jobs.measure outputs/digits`.

python -m jobs.measure outputs/digits --watts 3.5 --write-profile my.yaml --name my_board
python -m jobs.describe digits --energy.profiles my.yaml --energy.device my_board
"""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from jobs import _cli
from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.energy import Energy
from meanet.errors import UserError, exit_on_user_error
from meanet.meters import Device, Meter, find_meter, measured
from meanet.models.costs import joined_shape
from meanet.profile_files import available, parse, timed_device
from meanet.profiles import Blocks
from meanet.storage import writable_directory, write_text

BLOCKS = ("main", "adaptive", "extension")
_WARM_UP = 3
"""Calls of each block before the clock starts."""


@dataclass(frozen=True)
class Flags:
    """Seconds and joules an image of the edge's blocks, on this machine."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, with its model/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""
    batch_size: int = 1
    """Images a call."""
    seconds: float = 2.0
    """How long to run each block."""
    threads: int = 1
    """Of the CPU; a server's replica computes on one."""
    watts: float | None = None
    """Power while computing, by a meter of your own; the machine's counter if not given."""
    write_profile: Path | None = None
    """Write a YAML file with this device, for --energy.profiles."""
    name: str | None = None
    """The device's name in that file."""
    json: bool = False
    """Print the result as JSON."""


@dataclass
class _Timed:
    """What was seen of one block."""

    images: int = 0
    total: float = 0.0
    """Wall time, s."""
    each: float = 0.0
    """Median of the calls, s per image."""
    energy: Energy | None = None
    """Per image."""


def blocks_of(model: TrainedModel, batch_size: int, device: Device) -> dict[str, Callable[[], Any]]:
    """One call of each of the edge's blocks on random images of the model's shape."""
    meanet = model.networks.meanet.to(device)
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, int, int]) -> Tensor:
        return torch.randn((batch_size, *shape), generator=generator).to(device)

    images, joined = random(model.preprocessing.image_shape), random(joined_shape(meanet))
    return {
        "main": lambda: meanet.main(images),
        "adaptive": lambda: meanet.path.adaptive(images),
        "extension": lambda: meanet.path.extension(joined),
    }


@torch.inference_mode()
def _time(call: Callable[[], Any], flags: Flags, device: Device, meter: Meter | None, modelled: Energy) -> _Timed:
    timed = _Timed()
    calls: list[float] = []

    def once() -> float:
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def work() -> int:
        started = time.perf_counter()
        while not calls or time.perf_counter() - started < flags.seconds:
            calls.append(once())
        timed.total, timed.images = time.perf_counter() - started, len(calls) * flags.batch_size
        return timed.images

    for _ in range(_WARM_UP):
        once()
    timed.energy = measured(work, meter, modelled)
    timed.each = median(calls) / flags.batch_size
    if meter is None and flags.watts is not None:
        timed.energy = Energy(flags.watts * timed.each, modelled.source)
    return timed


def measure(model: TrainedModel, flags: Flags) -> dict[str, Any]:
    """Seconds and joules of each block, as `--json` prints them.

    Raises:
        UserError: there is no such device; the meter did not move.
    """
    device = _device(flags.device)
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}" if device == "cuda" else None
    found = find_meter(device, gpu=gpu)
    torch.set_num_threads(flags.threads)
    costs = model.costs
    tag = costs.tag if flags.watts is None else f"modelled:{flags.watts:g} W x measured seconds"
    timed = {
        name: _time(call, flags, device, found.meter, Energy(getattr(costs.block_joules, name), tag))
        for name, call in blocks_of(model, flags.batch_size, device).items()
    }
    energies = {name: each.energy for name, each in timed.items() if each.energy}
    spent = sum(each.total for each in timed.values())
    metered = sum(energies[name].joules * each.images for name, each in timed.items()) if found.meter else 0.0
    return {
        "model": str(flags.folder),
        "device": device,
        "batch_size": flags.batch_size,
        "threads": flags.threads,
        "images": {name: each.images for name, each in timed.items()},
        "seconds": {name: each.each for name, each in timed.items()},
        "wall_seconds": {name: each.total for name, each in timed.items()},
        "joules": {name: energy.joules for name, energy in energies.items()},
        "joules_edge": Energy.total(energies.values()).joules,
        "joules_source": next(iter(energies.values())).source,
        "watts": flags.watts if flags.watts is not None else metered / spent if found.meter else None,
        "meter": found.words,
    }


def _device(asked: str) -> Device:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device is cuda and there is no GPU that torch can use: choose cpu")
    return "cuda" if asked == "cuda" or (asked == "auto" and there) else "cpu"


def check(flags: Flags) -> None:
    """What can be known before anything is timed.

    Raises:
        UserError: a senseless flag; a profile that could not be written.
    """
    for name in ("batch_size", "seconds", "threads", "watts"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    if (flags.write_profile is None) != (flags.name is None):
        raise UserError("a profile needs both a file and a name: give --write-profile FILE and --name NAME, or neither")
    if flags.write_profile is None or flags.name is None:
        return
    if flags.write_profile.exists():
        raise UserError(f"{flags.write_profile} exists: choose another file with --write-profile, or remove it")
    if flags.name in available().devices:
        raise UserError(f"--name is {flags.name!r}, which exists already: give yours another name")
    parse(timed_device(flags.name, 1.0, Blocks(1.0, 1.0, 1.0), "-", "-"), "--name")
    found = find_meter(_device(flags.device))
    if flags.watts is None and found.meter is None:
        raise UserError(f"there is no meter here ({found.words}), so a profile needs your own: give --watts W")
    writable_directory(flags.write_profile.absolute().parent, "--write-profile")


def write_profile(path: Path, name: str, found: dict[str, Any], given: bool) -> None:
    """Write what was measured as a device that --energy.profiles reads."""
    machine = torch.cuda.get_device_name(0) if found["device"] == "cuda" else platform.machine()
    how = (
        f"jobs.measure, {time.strftime('%Y-%m-%d')}: median of the calls at batch {found['batch_size']}, "
        f"{found['device']} ({machine}), {found['threads']} thread(s), torch {torch.__version__}"
    )
    power = "given with --watts" if given else f"{found['joules_source']}, joules over wall seconds of the same calls"
    seconds = Blocks(**found["seconds"])
    write_text(timed_device(name, found["watts"], seconds, watts_source=power, seconds_source=how), path)


def _show(found: dict[str, Any]) -> None:
    print(f"{found['model']} on {found['device']}, {found['batch_size']} image(s) a call, meter: {found['meter']}\n")
    print(f"{'block':<12}{'images':>10}{'ms':>12}{'uJ':>14}   an image, {found['joules_source']}")
    for name in BLOCKS:
        images, seconds, joules = (found[key][name] for key in ("images", "seconds", "joules"))
        print(f"{name:<12}{images:>10}{1e3 * seconds:>12.4f}{1e6 * joules:>14.3f}")


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse("measure", Flags)
    check(flags)
    found = measure(artifact.load(flags.folder / "model"), flags)
    if flags.write_profile and flags.name:
        write_profile(flags.write_profile, flags.name, found, given=flags.watts is not None)
        found["profile"] = str(flags.write_profile)
    if flags.json:
        print(json.dumps(found))
        return
    _show(found)
    if flags.write_profile:
        print(f"\nwritten; next: --energy.profiles {flags.write_profile} --energy.device {flags.name}")


if __name__ == "__main__":
    main()
