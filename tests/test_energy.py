"""What computing and sending cost: profiles and their sources, tails, bytes moved."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_thresholds import COSTS, exits
from torch import nn

from meanet.config import EnergyConfig, Recipe
from meanet.energy import BytesMoved, Macs, cost_model, tail_joules
from meanet.errors import UserError
from meanet.models.costs import count_bytes
from meanet.profile_files import available, built_in, embed, parse
from meanet.profiles import PerMacDevice
from meanet.recipes import digits
from meanet.replay import replay
from meanet.routing import Policy

MACS = Macs(main=10, adaptive=2, extension=3, cloud=100)
MOVED = BytesMoved(main=1000, adaptive=200, extension=300)
OWN = """
sources: {bench: my own wattmeter, guess: a guess}
devices:
  board:
    kind: timed
    watts: {value: 4, source: bench}
    seconds:
      main: {value: 1e-3, source: bench}
      adaptive: {value: 0.002, source: bench}
      extension: {value: 0.003, source: bench}
  chip:
    kind: per_mac
    joules_per_mac: {value: 2.0e-12, source: guess}
    macs_per_second: {value: 1.0e+9, source: guess}
links:
  satellite:
    upload_mbps: {value: 2, source: guess}
    alpha_mw_per_mbps: {value: 0, source: guess}
    beta_mw: {value: 5000, source: guess}
    rtt_seconds: {value: 0.6, source: guess}
"""


def energy(**fields: Any) -> EnergyConfig:
    return EnergyConfig(**fields)


def test_wifi_costs_what_the_formula_says() -> None:
    """MEANet's set: Huang et al., MobiSys 2012, at 18.88 Mbps."""
    wifi, lte = built_in().link("wifi"), built_in().link("lte")
    assert wifi.watts == pytest.approx(5.479, abs=1e-3)
    assert wifi.joules_per_byte / 8 == pytest.approx(290.2e-9, rel=1e-3)
    assert 32 * 32 * 3 * wifi.joules_per_byte == pytest.approx(7.13e-3, rel=1e-3)
    assert 224 * 224 * 3 * wifi.joules_per_byte == pytest.approx(349.5e-3, rel=1e-3)
    assert wifi.seconds(18.88e6 / 8) == pytest.approx(1.0)
    assert lte.watts == pytest.approx(0.43839 * 5.85 + 1.28804)


@pytest.mark.parametrize(
    ("link", "nanojoules_per_bit"), [("4g", 80.21), ("5g_low_band", 29.15), ("5g_mmwave", 9.42), ("wired", 3.0)]
)
def test_other_links_cost_what_their_sources_say(link: str, nanojoules_per_bit: float) -> None:
    """A slope of x mW/Mbps is x nJ a bit where there is no base power; 300 mW at 100 Mbps are 3."""
    assert built_in().link(link).joules_per_byte / 8 == pytest.approx(nanojoules_per_bit * 1e-9)


def test_compute_costs_joules_per_mac() -> None:
    costs = cost_model(energy(), MACS)
    assert costs.device.joules_per_mac == 4.6e-12
    assert costs.main_joules == 10 * 4.6e-12
    assert costs.extension_joules == pytest.approx(5 * 4.6e-12)
    assert costs.tag == "modelled:horowitz_45nm+wifi"


def test_memory_costs_joules_per_byte_moved() -> None:
    """640 pJ for 32 bits."""
    costs = cost_model(energy(device="horowitz_45nm_dram"), MACS, MOVED)
    assert costs.main_joules == pytest.approx(10 * 4.6e-12 + 1000 / 4 * 640e-12)
    assert costs.extension_joules == pytest.approx(5 * 4.6e-12 + 500 / 4 * 640e-12)
    with pytest.raises(UserError, match=r"'horowitz_45nm_dram'.*evaluate again"):
        cost_model(energy(device="horowitz_45nm_dram"), MACS)


def test_every_built_in_number_has_its_source() -> None:
    for profile in (*built_in().devices.values(), *built_in().links.values()):
        for field in dataclasses.fields(profile):
            value = getattr(profile, field.name)
            if isinstance(value, float) and value != field.default:
                assert profile.sources[field.name].strip(), f"{profile.name}.{field.name}"
        assert len(profile.sources) >= 1


@pytest.mark.parametrize(("field", "names"), [("device", "horowitz_45nm"), ("link", "wifi, lte, 3g")])
def test_unknown_profiles_list_the_known(field: str, names: str) -> None:
    with pytest.raises(UserError, match=f"'abacus'.*{names}"):
        cost_model(dataclasses.replace(energy(), **{field: "abacus"}), MACS)


def test_own_profiles_stand_beside_the_built_in_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    costs = cost_model(energy(profiles=str(path), device="board", link="satellite", cloud_seconds=0.05), MACS)
    assert costs.tag == costs.latency_source == "modelled:board+satellite"
    assert costs.main_joules == pytest.approx(4e-3)
    assert costs.extension_joules == pytest.approx(4 * 5e-3)
    assert costs.upload_joules(1000) == pytest.approx(5 * 8000 / 2e6)
    assert (costs.main_seconds, costs.extension_seconds) == pytest.approx((1e-3, 5e-3))
    np.testing.assert_allclose(costs.cloud_seconds(np.array([0, 1000])), [0.65, 0.65 + 8000 / 2e6])
    chip = cost_model(energy(profiles=str(path), device="chip"), MACS)
    assert (chip.main_seconds, chip.extension_seconds) == pytest.approx((10e-9, 5e-9))
    plain = cost_model(energy(), MACS)
    assert (plain.main_seconds, plain.extension_seconds) == (0.0, 0.0)
    assert plain.latency_source == "modelled:wifi without compute"


def test_own_profiles_travel_with_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    recipe = dataclasses.replace(digits(), energy=embed(energy(profiles=str(path), device="board")))
    path.unlink()
    there = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert there == recipe
    assert cost_model(there.energy, MACS).main_joules == pytest.approx(4e-3)
    assert embed(there.energy) == there.energy
    other = dataclasses.replace(recipe, energy=dataclasses.replace(recipe.energy, profiles=OWN.replace("4,", "5,")))
    assert other.digest() != recipe.digest()


def test_recipes_stored_before_there_were_own_profiles_are_read() -> None:
    plain = digits().to_dict()
    plain["energy"] = {"device": "horowitz_45nm", "link": "lte", "payload": "png"}
    assert Recipe.from_dict(plain).energy == energy(link="lte")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("devices: [", "is no YAML"),
        ("- 1", r"own\.yaml is \[1\]"),
        ("", "neither devices nor links"),
        ("gadgets: {}", "unknown field 'gadgets'.*devices"),
        (OWN.replace("kind: timed", "kind: tuned"), r"devices\.board has kind 'tuned'.*per_mac, timed"),
        (OWN.replace("watts: {value: 4, source: bench}", ""), r"devices\.board lacks watts"),
        (OWN.replace("watts:", "wats:"), r"devices\.board has an unknown field 'wats'.*watts"),
        (OWN.replace("value: 4,", "value: -4,"), r"devices\.board\.watts has the value -4.*0 or more"),
        (OWN.replace("value: 4,", "value: .nan,"), r"devices\.board\.watts has the value nan"),
        (OWN.replace("value: 4,", "value: true,"), r"devices\.board\.watts has the value True"),
        (OWN.replace("value: 4,", "value: four,"), r"devices\.board\.watts has the value 'four'"),
        (OWN.replace("value: 1.0e+9", "value: 0"), r"macs_per_second has the value 0: give a number above 0"),
        (OWN.replace("watts: {value: 4, source: bench}", "watts: 4"), r"watts is 4: give it as \{value"),
        (OWN.replace("{value: 4, source: bench}", "{value: 4, source: hearsay}"), "source 'hearsay'.*bench, guess"),
        (OWN.replace("my own wattmeter", ""), r"sources\.bench is None"),
        (OWN.replace("  board:", "  horowitz_45nm:"), "device 'horowitz_45nm' exists already"),
        (OWN.replace("  satellite:", "  lte:"), "link 'lte' exists already"),
        (OWN.replace("  chip:", "  board:"), "'board' is given twice"),
        (OWN.replace("  chip:", "  my chip+:"), r"the name 'my chip\+'"),
    ],
)
def test_mistakes_in_own_profiles_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        available(str(path))


def test_files_of_profiles_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml does not exist"):
        embed(energy(profiles=str(tmp_path / "gone.yaml")))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UserError, match="cannot be read"):
            cost_model(energy(profiles=str(path)), MACS)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"payload": "gif"}, "'gif'.*jpeg90"),
        ({"payload": "jpeg0"}, "'jpeg0'"),
        ({"payload": "jpeg101"}, "'jpeg101'"),
        ({"payload": "jpeg"}, "'jpeg'"),
        ({"uploads_per_second": 0.0}, "uploads_per_second is 0.0"),
        ({"uploads_per_second": float("nan")}, "uploads_per_second is nan"),
        ({"cloud_seconds": -1.0}, "cloud_seconds is -1.0"),
    ],
)
def test_senseless_energy_configs_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        energy(**fields)


def test_isolated_upload_pays_the_whole_tail() -> None:
    none, isolated = (cost_model(energy(link="lte", tail=tail), MACS) for tail in ("none", "isolated"))
    assert isolated.upload_joules(1000) - none.upload_joules(1000) == pytest.approx(12.76)
    np.testing.assert_allclose(isolated.upload_joules(np.array([0, 1000])), [12.76, 12.76 + none.upload_joules(1000)])
    assert isolated.tag == "modelled:horowitz_45nm+lte+isolated"
    assert cost_model(energy(link="wired", tail="isolated"), MACS).upload_joules(0) == 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_amortised_tail_is_what_random_uploads_pay_on_average(rate: float) -> None:
    lte = built_in().link("lte")
    assert lte.tail_seconds is not None
    gaps = np.random.default_rng(0).exponential(1 / rate, 200_000)
    up = np.minimum(gaps, lte.tail_seconds).mean() / lte.tail_seconds
    assert tail_joules(lte, "amortised", rate) == pytest.approx(12.76 * up, rel=0.01)


def test_amortised_tail_lies_between_isolated_and_none() -> None:
    lte, wired = built_in().link("lte"), built_in().link("wired")
    assert tail_joules(lte, "amortised", 1e-9) == pytest.approx(12.76)
    assert tail_joules(lte, "amortised", 1e9) == pytest.approx(0, abs=1e-6)
    assert tail_joules(wired, "amortised", 1.0) == 0.0
    assert cost_model(energy(link="lte", tail="amortised"), MACS).tag.endswith("+lte+amortised@1/s")


@pytest.mark.parametrize(
    ("tail", "says"),
    [("isolated", "'5g_mmwave' has no isolated_joules, which"), ("amortised", "isolated_joules and no tail_seconds")],
)
def test_links_without_these_figures_refuse_a_tail(tail: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"{says}.*{tail}.*tail none"):
        cost_model(energy(link="5g_mmwave", tail=tail), MACS)


def test_compute_joules_are_those_of_a_replay() -> None:
    recorded = exits(15, 200)
    found = replay(recorded, COSTS, Policy(thresholds=(0.9,), hard_classes=recorded.hard_classes))
    share = found.share["extension"]
    assert found.joules["edge_compute"] == pytest.approx(4.6e-12 * (10**6 + share * (10**5 + 10**7)))
    assert COSTS.compute_joules(main_runs=False, extended_share=0.0) == 0.0


def test_bytes_moved_equal_a_count_by_hand() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )
    by_hand = 3 * 8 * 8 + 4 * 4 * 4 + (3 * 4 * 9 + 4) + 2 * 4 + 64 + 10 + 64 * 10 + 10
    assert count_bytes(layers, torch.zeros(1, 3, 8, 8)) == 4 * by_hand
    assert layers.training
    assert not any(layer._forward_hooks for layer in layers)


def test_stored_text_of_profiles_is_checked_like_a_file() -> None:
    with pytest.raises(UserError, match="the recipe's own profiles"):
        available("devices:\n  x: 1\n")
    chip = parse(OWN, "here").device("chip")
    assert isinstance(chip, PerMacDevice)
    assert chip.macs_per_second == 1e9
    assert chip.sources == {"joules_per_mac": "a guess", "macs_per_second": "a guess"}


def test_the_docs_example_and_table_are_true() -> None:
    text = (ROOT / "docs" / "energy.md").read_text()
    example = re.search(r"(    sources:\n(?:    .*\n)+)", text)
    assert example is not None
    own = available(textwrap.dedent(example[1]))
    costs = own.device("my_board").joules(MACS, None)
    assert costs.main == pytest.approx(3.5 * 0.0021)
    assert own.link("satellite").rtt_seconds == 0.6
    rows = re.findall(
        r"^\| `(\w+)`(?: \(default\))? \| ([\d.]+)[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \| ([^|]+)\|", text, re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(built_in().links)
    for name, mbps, microjoules, isolated in rows:
        link = built_in().link(name)
        assert link.upload_mbps == float(mbps)
        assert 1e9 * link.joules_per_byte == pytest.approx(float(microjoules), abs=0.06)
        known = None if isolated.strip() == "not known" else float(isolated)
        assert link.isolated_joules == known
