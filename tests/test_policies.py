"""The policies that a cascade is compared with."""

import dataclasses
import math

import numpy as np
import pytest
from test_thresholds import COSTS, exits

from meanet.policies import (
    authors_threshold,
    baselines,
    best_threshold,
    oracle,
    random_routing,
    routing_efficiency,
)
from meanet.replay import outcome, replay
from meanet.routing import Exit, Policy, Routed, read_main, route


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
    assert found["oracle"].accuracy == max(one.accuracy for one in found.values())


def test_sedna_sends_what_is_less_than_half_sure() -> None:
    recorded = exits(16, 500)
    main = read_main(recorded.main_logits, Policy())
    sent = 1 - main.entropy / math.log(recorded.main_logits.shape[1]) < 0.5
    found = baselines(recorded, COSTS, authors=1.0)["sedna_filter"]
    assert 0 < sent.mean() < 1
    assert found.share["cloud"] == pytest.approx(sent.mean())


def test_random_routing_is_the_mean_of_many_draws() -> None:
    recorded = exits(17, 300)
    policy = Policy(thresholds=(0.7,), hard_classes=recorded.hard_classes)
    expected = random_routing(recorded, COSTS, policy, 0.4)
    edge = route(
        recorded.main_logits, recorded.extension_logits, recorded.cloud_pred, policy.with_request(edge_only=True)
    )
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(400):
        sent = generator.permutation(300) < 120
        exit_ = np.where(sent, int(Exit.CLOUD), edge.exit)
        pred = np.where(sent, recorded.cloud_pred, edge.pred)
        drawn.append(outcome(recorded, COSTS, Routed(exit_, pred, edge.extended & ~sent)))
    assert expected.share["cloud"] == pytest.approx(0.4)
    assert np.mean([one.accuracy for one in drawn]) == pytest.approx(expected.accuracy, abs=0.003)
    assert np.mean([one.accuracy_hard_classes for one in drawn]) == pytest.approx(
        expected.accuracy_hard_classes, abs=0.004
    )
    assert np.mean([one.total_joules for one in drawn]) == pytest.approx(expected.total_joules, rel=0.01)


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


def test_outcome_adds_up() -> None:
    recorded = exits(15, 200)
    found = replay(recorded, COSTS, Policy(thresholds=(0.9,), hard_classes=recorded.hard_classes))
    assert sum(found.share.values()) == pytest.approx(1)
    blocks = found.share["extension"] * (COSTS.macs.adaptive + COSTS.macs.extension)
    assert found.macs_edge == pytest.approx(COSTS.macs.main + blocks)
    assert found.joules["edge_compute"] == pytest.approx(found.macs_edge * 4.6e-12)
    assert found.joules["upload"] == pytest.approx(found.bytes_uploaded * COSTS.link.joules_per_byte)
