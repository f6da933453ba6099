"""Measured joules where a meter exists, modelled elsewhere, never mixed: a test for each tag, and `jobs.measure`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from untrained import Call

from jobs import describe, measure
from meanet.artifact import TrainedModel
from meanet.config import EnergyConfig
from meanet.energy import Energy, Macs, cost_model
from meanet.errors import UserError
from meanet.meters import Found, NvmlMeter, RaplMeter, find_meter, measured
from meanet.profile_files import available
from meanet.profiles import TimedDevice

MACS = Macs(main=10, adaptive=2, extension=3, cloud=100)


def rapl(root: Path, zones: dict[str, tuple[str, int, int]]) -> Path:
    """A powercap folder: zone -> name, counter and range, µJ."""
    for zone, (name, counter, largest) in zones.items():
        (root / zone).mkdir(parents=True, exist_ok=True)
        (root / zone / "name").write_text(f"{name}\n")
        (root / zone / "energy_uj").write_text(f"{counter}\n")
        (root / zone / "max_energy_range_uj").write_text(f"{largest}\n")
    return root


ZONES = {
    "intel-rapl:0": ("package-0", 1_000_000, 10**9 - 1),
    "intel-rapl:0:0": ("core", 5, 10**9 - 1),
    "intel-rapl:0:1": ("dram", 999_999_000, 10**9 - 1),
    "intel-rapl:1": ("psys", 7, 10**9 - 1),
}
"""One package with its cores and DRAM, and the platform's counter, which holds it all again."""


class FakeNvml:
    """What `meanet.meters` asks of pynvml."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, *readings: int) -> None:
        self.readings = list(readings)
        self.asked: list[Any] = []

    def nvmlInit(self) -> None:  # noqa: N802
        """Nothing to do."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, _handle: object) -> int:  # noqa: N802
        if not self.readings:
            raise self.NVMLError("Not Supported")
        return self.readings.pop(0)


def test_tag_of_a_gpus_counter() -> None:
    nvml = FakeNvml(0, 1_000, 7_000)  # asked once to see that it answers, then before and after; mJ
    found = measured(lambda: 3, NvmlMeter(nvml=nvml), Energy(99.0, "modelled:x"))
    assert found == Energy(2.0, "measured:nvml")
    assert nvml.asked == [0]


def test_tag_of_a_cpus_counters(tmp_path: Path) -> None:
    """Package and DRAM, the DRAM's counter past its range and round again."""
    root = rapl(tmp_path, ZONES)

    def work() -> int:
        rapl(root, {"intel-rapl:0": ("package-0", 4_000_000, 10**9 - 1)})
        rapl(root, {"intel-rapl:0:0": ("core", 900, 10**9 - 1), "intel-rapl:0:1": ("dram", 999_000, 10**9 - 1)})
        return 4

    found = measured(work, RaplMeter(root), Energy(99.0, "modelled:x"))
    assert found.source == "measured:rapl"
    assert found.joules == pytest.approx((3.0 + 1.0) / 4)


def test_tag_of_the_model_where_there_is_no_meter(tmp_path: Path) -> None:
    costs = cost_model(EnergyConfig(link="lte"), MACS)
    found = find_meter("cpu", root=tmp_path / "none")
    assert found.meter is None
    assert "no RAPL counter" in found.words
    ran = []

    def work() -> int:
        ran.append(1)
        return 1

    assert measured(work, found.meter, Energy(0.5, costs.tag)) == Energy(0.5, "modelled:horowitz_45nm+lte")
    assert ran == [1]


def test_two_tags_never_add_up() -> None:
    one, other = Energy(1.0, "measured:rapl"), Energy(2.0, "modelled:horowitz_45nm+wifi")
    assert one + Energy(2.5, "measured:rapl") == Energy(3.5, "measured:rapl")
    assert Energy.total([other, other, other]) == Energy(6.0, other.source)
    for parts in ([one, other], [other, one], [one, Energy(1.0, "measured:nvml")]):
        with pytest.raises(UserError, match=r"have no sum.*side by side"):
            Energy.total(parts)
        with pytest.raises(UserError, match="have no sum"):
            _ = parts[0] + parts[1]


def test_counters_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = rapl(tmp_path, ZONES)
    counter = root / "intel-rapl:0" / "energy_uj"
    counter.write_text("many\n")
    with pytest.raises(UserError, match=r"intel-rapl:0/energy_uj cannot be read as a counter"):
        RaplMeter(root)
    original = Path.read_text

    def guarded(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == counter:
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)  # a test that runs as root may read everything
    found = find_meter("cpu", root=root)
    assert found.meter is None
    assert "may not be read" in found.words
    assert f"sudo chmod a+r {counter}" in found.words


def test_cards_without_a_counter_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    found = find_meter("cuda", gpu="GPU-1234", nvml=nvml)
    assert found.meter is None
    assert "no energy counter of GPU GPU-1234: Not Supported" in found.words
    assert nvml.asked == ["GPU-1234"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in find_meter("cuda").words


def test_counter_that_does_not_move_is_said() -> None:
    with pytest.raises(UserError, match="nvml did not move"):
        measured(lambda: 1, NvmlMeter(nvml=FakeNvml(5, 5, 5)), Energy(1.0, "modelled:x"))


def no_meter(_device: str, **_: Any) -> Found:
    return Found(None, "none in this test")


QUICK = ("--seconds", "0.05", "--device", "cpu")


def test_measure_without_a_meter_says_that_joules_are_modelled(
    call: Call, run_folder: Path, untrained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "find_meter", no_meter)
    found = json.loads(call(measure, str(run_folder), *QUICK, "--batch-size", "4", "--json").out)
    assert found["joules_source"] == "modelled:horowitz_45nm+wifi"
    assert found["joules"] == vars(untrained.costs.block_joules)
    assert found["joules_edge"] == pytest.approx(untrained.costs.main_joules + untrained.costs.extension_joules)
    assert all(0 < seconds < 1 for seconds in found["seconds"].values())
    assert all(images > 0 and images % 4 == 0 for images in found["images"].values())
    assert (found["watts"], found["meter"]) == (None, "none in this test")
    assert "modelled:horowitz_45nm+wifi" in call(measure, str(run_folder), *QUICK).out


class Ticking:
    """A counter that gains 2 J at each reading."""

    name = "rapl"
    now = 0.0

    def read(self) -> float:
        self.now += 2.0
        return self.now

    def joules(self, before: float, after: float) -> float:
        return after - before


def test_measure_with_a_meter_says_so(call: Call, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "find_meter", lambda _device, **_: Found(Ticking(), "a counter"))
    words = ("--write-profile", "metered.yaml", "--name", "metered")
    found = json.loads(call(measure, str(run_folder), *QUICK, *words, "--json").out)
    assert found["joules_source"] == "measured:rapl"
    for name, joules in found["joules"].items():
        assert joules == pytest.approx(2.0 / found["images"][name])
    assert found["watts"] == pytest.approx(6.0 / sum(found["wall_seconds"].values())), "2 J for each of three blocks"
    device = available(str(run_folder.parent / "metered.yaml")).device("metered")
    assert isinstance(device, TimedDevice)
    assert device.sources["watts"].startswith("measured:rapl")


def test_measured_profile_is_one_that_other_commands_read(
    call: Call, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "find_meter", no_meter)
    words = ("--watts", "3.5", "--write-profile", "my.yaml", "--name", "my_board")
    found = json.loads(call(measure, str(run_folder), *QUICK, *words, "--json").out)
    assert found["joules_source"] == "modelled:3.5 W x measured seconds"
    assert found["joules"]["main"] == pytest.approx(3.5 * found["seconds"]["main"])
    flags = ("--energy.profiles", "my.yaml", "--energy.device", "my_board")
    described = json.loads(call(describe, "digits", *flags, "--json").out)
    assert described["joules_source"] == described["seconds_source"] == "modelled:my_board+wifi"
    assert described["exits"]["main"]["edge_compute"] == pytest.approx(3.5 * found["seconds"]["main"])
    assert described["seconds"]["extension"] == pytest.approx(sum(found["seconds"].values()))
    assert described["sources"]["device"]["watts"] == "given with --watts"
    again = call(measure, str(run_folder), *QUICK, *words)
    assert (again.code, "my.yaml exists" in again.err) == (1, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--write-profile", "p.yaml", "--name", "x"), "no meter here (none in this test)"),
        (("--write-profile", "p.yaml"), "give --write-profile FILE and --name NAME"),
        (("--write-profile", "p.yaml", "--name", "horowitz_45nm", "--watts", "1"), "exists already"),
        (("--write-profile", "p.yaml", "--name", "a b", "--watts", "1"), "the name 'a b'"),
        (("--watts", "-1"), "--watts is -1.0"),
        (("--seconds", "0"), "--seconds is 0.0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--write-profile", "/proc/none/p.yaml", "--name", "x", "--watts", "1"), "cannot be written"),
    ],
)
def test_measures_flags_are_checked_first(
    call: Call, run_folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr(measure, "find_meter", no_meter)
    done = call(measure, str(run_folder), "--device", "cpu", *words)
    assert done.code == 1
    assert says in done.err
    assert not (run_folder.parent / "p.yaml").exists()
    gone = call(measure, "nowhere")
    assert (gone.code, "nowhere/model/model.json does not exist" in gone.err) == (1, True)


def test_describe_shows_tail_memory_and_sources(call: Call) -> None:
    words = ("digits", "--energy.link", "lte", "--energy.tail", "isolated", "--energy.device", "horowitz_45nm_dram")
    found = json.loads(call(describe, *words, "--json").out)
    assert found["tail"] == {"counted": "isolated", "joules": 12.76}
    assert found["exits"]["cloud"]["upload"] > 12.76
    main = found["blocks"]["main"]
    assert found["exits"]["main"]["edge_compute"] == pytest.approx(
        4.6e-12 * main["macs"] + 1.6e-10 * main["moved_bytes"]
    )
    assert found["seconds_source"] == "modelled:lte without compute"
    assert found["seconds"]["cloud"] == pytest.approx(64 * 8 / 5.85e6)
    assert "Horowitz" in found["sources"]["device"]["joules_per_mac"]
    shown = call(describe, *words).out
    assert "isolated, 12760000.00 µJ an upload" in shown
    assert "Han et al." in shown


def test_help_of_measure(call: Call) -> None:
    done = call(measure, "--help")
    assert done.code == 0
    assert all(flag in done.out for flag in ("--json", "--watts", "--write-profile", "--seconds"))
