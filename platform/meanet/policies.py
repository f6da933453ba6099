"""The policies that a cascade is compared with: single exits, others' gates, random routing, an oracle."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from meanet.energy import CostModel
from meanet.replay import Exits, Outcome, outcome, replay
from meanet.routing import Exit, Policy, Routed, read_main, route

CORRECT_WEIGHT = 0.7
"""w of the authors' formula: both of their published thresholds follow from it."""


def authors_threshold(exits: Exits) -> float:
    """Threshold by the authors' formula on the main exit's entropy, nats (MEANet's released code).

    Entropy is taken as Exponential(m_c) of right answers and Normal(m_w, s_w) of wrong ones; the threshold maximises
    w * (1 - exp(-t / m_c)) - (1 - w) * Phi((t - m_w) / s_w) over t in 0.1..1.9.
    """
    main = read_main(exits.main_logits, Policy())
    right = main.pred == exits.labels
    finite = np.isfinite(main.entropy)
    mean_right = float(main.entropy[right & finite].mean()) if (right & finite).any() else 1.0
    wrong = main.entropy[~right & finite]
    mean_wrong, std_wrong = (float(wrong.mean()), float(wrong.std())) if len(wrong) else (1.0, 1.0)
    return best_threshold(mean_right, mean_wrong, max(std_wrong, 1e-6))


def best_threshold(mean_right: float, mean_wrong: float, std_wrong: float) -> float:
    """The authors' formula on its three moments, each in nats."""
    grid = np.linspace(0.1, 1.9, 181)
    gain = CORRECT_WEIGHT * (1 - np.exp(-grid / mean_right))
    wrong = NormalDist(mean_wrong, std_wrong)
    loss = (1 - CORRECT_WEIGHT) * np.array([wrong.cdf(threshold) for threshold in grid])
    return float(grid[np.argmax(gain - loss)])


def sedna_threshold(num_classes: int) -> float:
    """Sedna's cross-entropy filter as an entropy threshold, nats: to the cloud if 1 - entropy / ln C < 0.5.

    Source: KubeEdge Sedna's joint inference, https://github.com/kubeedge/sedna
    """
    return 0.5 * math.log(num_classes)


def baselines(exits: Exits, costs: CostModel, authors: float) -> dict[str, Outcome]:
    """The report's policies other than the operating point, over one split.

    Args:
        exits: the split to report on.
        costs: joules.
        authors: the authors' threshold, found on validation.
    """
    cloud = _all_to_cloud(exits)

    def gate(threshold: float) -> Outcome:
        return replay(exits, costs, Policy(thresholds=(threshold,), hard_classes=exits.hard_classes))

    return {
        "main_only": replay(exits, costs, Policy()),
        "edge_only": replay(exits, costs, Policy(hard_classes=exits.hard_classes)),
        "cloud_only": outcome(exits, costs, cloud, main_runs=False),
        "authors_threshold": gate(authors),
        "sedna_filter": gate(sedna_threshold(exits.main_logits.shape[1])),
        "oracle": outcome(exits, costs, oracle(exits)),
    }


def _all_to_cloud(exits: Exits) -> Routed:
    count = exits.num_samples
    return Routed(np.full(count, int(Exit.CLOUD)), exits.cloud_pred, np.zeros(count, dtype=bool))


def random_routing(exits: Exits, costs: CostModel, policy: Policy, cloud_share: float) -> Outcome:
    """What to expect where that share of the samples, any of them, goes to the cloud, and `policy` has the others.

    Exact, by linearity, rather than one draw.
    """
    edge = replay(exits, costs, policy.with_request(edge_only=True))
    cloud = outcome(exits, costs, _all_to_cloud(exits))

    def mix(kept: float, sent: float) -> float:
        return (1 - cloud_share) * kept + cloud_share * sent

    return replace(
        edge,
        accuracy=mix(edge.accuracy, cloud.accuracy),
        accuracy_hard_classes=mix(edge.accuracy_hard_classes, cloud.accuracy_hard_classes),
        share={name: mix(edge.share[name], cloud.share[name]) for name in edge.share},
        macs_edge=mix(edge.macs_edge, cloud.macs_edge),
        bytes_uploaded=mix(edge.bytes_uploaded, cloud.bytes_uploaded),
        seconds=mix(edge.seconds, cloud.seconds),
        joules={name: mix(edge.joules[name], cloud.joules[name]) for name in edge.joules},
    )


def oracle(exits: Exits) -> Routed:
    """Each sample by the cheapest exit that is right, and by the main exit where none is."""
    main = route(exits.main_logits, exits.extension_logits, exits.cloud_pred, Policy())
    edge = route(exits.main_logits, exits.extension_logits, exits.cloud_pred, Policy(hard_classes=exits.hard_classes))
    main_right, edge_right = main.pred == exits.labels, edge.pred == exits.labels
    cloud_right = exits.cloud_pred == exits.labels
    choice = np.select([main_right, edge_right, cloud_right], [Exit.MAIN, Exit.EXTENSION, Exit.CLOUD], Exit.MAIN)
    pred = np.choose(choice, [main.pred, edge.pred, exits.cloud_pred])
    return Routed(choice.astype(np.int64), pred, choice == Exit.EXTENSION)


def routing_efficiency(exits: Exits, policy: Policy) -> float | None:
    """(gate - random) / (oracle - random) in accuracy, all at the policy's own cloud share.

    Random sends that share whatever the sample; the oracle sends first those that only the cloud gets right.
    None where the share leaves nothing to choose (no sample or every sample goes).
    """
    routed = route(exits.main_logits, exits.extension_logits, exits.cloud_pred, policy)
    edge = route(exits.main_logits, exits.extension_logits, exits.cloud_pred, policy.with_request(edge_only=True))
    edge_right, cloud_right = edge.pred == exits.labels, exits.cloud_pred == exits.labels
    gain = cloud_right.astype(float) - edge_right
    sent = int((routed.exit == Exit.CLOUD).sum())
    random = edge_right.mean() + sent / exits.num_samples * gain.mean()
    best = edge_right.mean() + np.sort(gain)[::-1][:sent].sum() / exits.num_samples
    if best - random < 1e-12:
        return None
    return float(((routed.pred == exits.labels).mean() - random) / (best - random))
