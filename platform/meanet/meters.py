"""Measured joules: NVML's counter on a GPU, RAPL's on a CPU. Where there is neither, the model's number stands, tagged.

A meter counts what its whole board or package takes, whoever causes it and idle power too: measure on a quiet machine.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from meanet.energy import Energy
from meanet.errors import UserError

RAPL_ROOT = Path("/sys/class/powercap")
Device = Literal["cpu", "cuda"]


class Meter(Protocol):
    """A counter of joules."""

    @property
    def name(self) -> str:
        """Stands in the tag: `measured:<name>`."""

    def read(self) -> Any:
        """The counter now."""

    def joules(self, before: Any, after: Any) -> float:
        """Between two readings, J."""


class NvmlMeter:
    """A GPU's own counter since its driver was loaded, millijoules (Volta and later).

    Args:
        gpu: NVML's UUID of the card; None = the first.
        nvml: the module `pynvml` (package nvidia-ml-py).

    Raises:
        UserError: no such module, driver, card or counter; the message says which.
    """

    name = "nvml"

    def __init__(self, gpu: str | None = None, nvml: Any = None) -> None:
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError as error:
            raise UserError("NVML cannot be asked: pip install nvidia-ml-py") from error
        try:
            self._nvml.nvmlInit()
            find = self._nvml.nvmlDeviceGetHandleByUUID if gpu else self._nvml.nvmlDeviceGetHandleByIndex
            self._handle = find(gpu or 0)
            self.read()
        except self._nvml.NVMLError as error:
            raise UserError(f"NVML has no energy counter of GPU {gpu or 0}: {error}") from error

    def read(self) -> int:
        """mJ."""
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def joules(self, before: int, after: int) -> float:
        """Between two readings, J."""
        return (after - before) / 1e3


@dataclass(frozen=True)
class _Zone:
    energy: Path
    """File of the counter, microjoules."""
    range: int
    """Where it starts again from 0."""


class RaplMeter:
    """The CPU packages' counters and their DRAM's, microjoules, which start again from 0 at their range.

    Two readings must lie less than one turn apart (a minute or more at full power).

    Args:
        root: Linux's powercap folder.

    Raises:
        UserError: there is no such counter, or it may not be read.
    """

    name = "rapl"

    def __init__(self, root: Path = RAPL_ROOT) -> None:
        self._zones = [_zone(folder) for folder in sorted(root.glob("intel-rapl:*")) if _counts(folder)]
        if not self._zones:
            raise UserError(f"there is no RAPL counter below {root}: Linux on an Intel or AMD processor has one")
        self.read()

    def read(self) -> list[int]:
        """Of each zone, µJ."""
        return [_integer(zone.energy) for zone in self._zones]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Between two readings, J."""
        turns = zip(self._zones, before, after, strict=True)
        return sum((end - start) % zone.range for zone, start, end in turns) / 1e6


def _counts(folder: Path) -> bool:
    """Packages, and the DRAM beside them; cores and graphics are parts of a package, and psys holds it all again."""
    try:
        name = (folder / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _zone(folder: Path) -> _Zone:
    return _Zone(folder / "energy_uj", _integer(folder / "max_energy_range_uj") + 1)


def _integer(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise UserError(
            f"{path} may not be read: Linux keeps RAPL's counters for root; run as root, or allow it with "
            f"`sudo chmod a+r {path}`"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a counter: {error}") from error


@dataclass(frozen=True)
class Found:
    """A meter, or why there is none."""

    meter: Meter | None
    """None = there is none."""
    words: str
    """For a person."""


def find_meter(device: Device, *, gpu: str | None = None, root: Path = RAPL_ROOT, nvml: Any = None) -> Found:
    """The meter of what computes: NVML of a GPU, RAPL of a CPU. A GPU's counter says nothing of a CPU's work.

    Args:
        device: where the work runs.
        gpu: NVML's UUID of the card; None = the first.
        root: Linux's powercap folder.
        nvml: the module `pynvml`; imported if None.
    """
    try:
        meter: Meter = NvmlMeter(gpu, nvml) if device == "cuda" else RaplMeter(root)
    except UserError as error:
        return Found(None, str(error))
    return Found(meter, "NVML's counter of the GPU" if device == "cuda" else "RAPL's counters of the CPU")


def measured(work: Callable[[], int], meter: Meter | None, modelled: Energy) -> Energy:
    """Joules of one unit of work, an image say.

    Args:
        work: does some, and returns how many units it did.
        meter: counts meanwhile; None = there is none.
        modelled: of one unit, by the model: stands where there is no meter.

    Raises:
        UserError: the counter did not move: there was too little work.
    """
    if meter is None:
        work()
        return modelled
    before, started = meter.read(), time.perf_counter()
    count = work()
    seconds, joules = time.perf_counter() - started, meter.joules(before, meter.read())
    if joules <= 0:
        raise UserError(f"the counter of {meter.name} did not move in {seconds:.3g} s: measure for longer")
    return Energy(joules / count, f"measured:{meter.name}")
