"""The policies that a cascade is compared with, and the energy model's published figures."""

import dataclasses

import numpy as np
import pytest
from test_thresholds import COSTS, exits

from meanet.config import EnergyConfig
from meanet.energy import DEVICES, LINKS, Macs, cost_model
from meanet.errors import UserError
from meanet.policies import authors_threshold, baselines, best_threshold, oracle, routing_efficiency
from meanet.routing import Exit, Policy, read_main
from meanet.thresholds import replay


@pytest.mark.parametrize(
    ("mean_right", "mean_wrong", "std_wrong", "published"), [(0.4366, 1.276, 0.674, 1.0), (0.588, 1.308, 0.666, 1.1)]
)
def test_authors_formula_gives_the_authors_thresholds(
    mean_right: float, mean_wrong: float, std_wrong: float, published: float
) -> None:
    """ResNet-32 B and A of the released code."""
    assert best_threshold(mean_right, mean_wrong, std_wrong) == pytest.approx(published, abs=0.05)


def test_authors_threshold_uses_the_entropies_of_right_and_wrong_answers() -> None:
    recorded = exits(11, 500)
    main = read_main(recorded.main_logits, Policy())
    right = main.pred == recorded.labels
    expected = best_threshold(main.entropy[right].mean(), main.entropy[~right].mean(), main.entropy[~right].std())
    assert authors_threshold(recorded) == pytest.approx(expected)


def test_baselines_are_what_their_names_say() -> None:
    recorded = exits(12, 400)
    found = baselines(recorded, COSTS, authors=1.0)
    assert found["main_only"].share == {"main": 1.0, "extension": 0.0, "cloud": 0.0}
    assert found["edge_only"].share["cloud"] == 0.0 < found["edge_only"].share["extension"]
    cloud = found["cloud_only"]
    assert (cloud.share["cloud"], cloud.macs_edge, cloud.joules["edge_compute"]) == (1.0, 0.0, 0.0)
    assert cloud.accuracy == (recorded.cloud_pred == recorded.labels).mean()
    assert cloud.bytes_uploaded == recorded.upload_bytes.mean()
    assert found["oracle"].accuracy == max(outcome.accuracy for outcome in found.values())


def test_oracle_takes_the_cheapest_exit_that_is_right() -> None:
    recorded = exits(13, 300)
    routed = oracle(recorded)
    main = read_main(recorded.main_logits, Policy())
    assert (routed.exit[main.pred == recorded.labels] == Exit.MAIN).all()
    sent = routed.exit == Exit.CLOUD
    assert (recorded.cloud_pred[sent] == recorded.labels[sent]).all()


def test_routing_efficiency_of_a_perfect_of_random_and_of_no_gate() -> None:
    recorded = exits(14, 4000, num_classes=4, num_hard=2)
    wrong = read_main(recorded.main_logits, Policy()).pred != recorded.labels
    gain = wrong & (recorded.cloud_pred == recorded.labels)
    keep = np.argmax(recorded.main_logits, axis=1)
    logits = np.where(gain[:, None], 0.0, -50.0) * np.ones_like(recorded.main_logits)
    logits[np.arange(len(keep)), keep] = np.where(gain, 0.1, 50.0)
    perfect = dataclasses.replace(recorded, main_logits=logits.astype(np.float32))
    assert routing_efficiency(perfect, Policy(thresholds=(0.5,))) == pytest.approx(1.0)
    assert routing_efficiency(recorded, Policy()) is None
    assert routing_efficiency(recorded, Policy(thresholds=(-1.0,))) is None
    shuffled = dataclasses.replace(
        recorded,
        labels=np.random.default_rng(0).integers(0, 4, 4000),
        cloud_pred=np.random.default_rng(1).integers(0, 4, 4000),
    )
    assert abs(routing_efficiency(shuffled, Policy(thresholds=(0.8,))) or 0.0) < 0.15


def test_wifi_costs_what_the_formula_says() -> None:
    """MEANet's set: Huang et al., MobiSys 2012, at 18.88 Mbps."""
    wifi = LINKS["wifi"]
    assert wifi.watts == pytest.approx(5.479, abs=1e-3)
    assert wifi.joules_per_byte / 8 == pytest.approx(290.2e-9, rel=1e-3)
    assert 32 * 32 * 3 * wifi.joules_per_byte == pytest.approx(7.13e-3, rel=1e-3)
    assert 224 * 224 * 3 * wifi.joules_per_byte == pytest.approx(349.5e-3, rel=1e-3)
    assert wifi.seconds(18.88e6 / 8) == pytest.approx(1.0)
    assert LINKS["lte"].watts == pytest.approx(0.43839 * 5.85 + 1.28804)


def test_compute_costs_joules_per_mac() -> None:
    assert DEVICES["horowitz_45nm"].joules_per_mac == 4.6e-12
    costs = cost_model(EnergyConfig(), Macs(main=10, adaptive=2, extension=3, cloud=100))
    assert costs.main_joules == pytest.approx(46e-12)
    assert costs.extension_joules == pytest.approx(23e-12)
    assert costs.tag == "modelled:horowitz_45nm+wifi"


@pytest.mark.parametrize(("field", "names"), [("device", "horowitz_45nm"), ("link", "wifi, lte, 3g")])
def test_unknown_profiles_list_the_known(field: str, names: str) -> None:
    with pytest.raises(UserError, match=f"'abacus'.*{names}"):
        cost_model(dataclasses.replace(EnergyConfig(), **{field: "abacus"}), Macs(1, 1, 1, 1))


def test_outcome_adds_up() -> None:
    recorded = exits(15, 200)
    outcome = replay(recorded, COSTS, Policy(thresholds=(0.9,), hard_classes=recorded.hard_classes))
    assert sum(outcome.share.values()) == pytest.approx(1)
    blocks = outcome.share["extension"] * (COSTS.macs.adaptive + COSTS.macs.extension)
    assert outcome.macs_edge == pytest.approx(COSTS.macs.main + blocks)
    assert outcome.joules["edge_compute"] == pytest.approx(outcome.macs_edge * 4.6e-12)
    assert outcome.joules["upload"] == pytest.approx(outcome.bytes_uploaded * COSTS.link.joules_per_byte)
