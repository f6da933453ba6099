"""The board's view as Prometheus metrics, by its own client's text formats."""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve_apps.board import ReplicaState, View, summed_gauges
from serve_apps.tally import Counts, Histogram

BREAKER_STATES = ("closed", "half_open", "open")
_MAX_THRESHOLDS = 2
"""Of a policy that has one a class, none are shown: they would be a thousand series."""


def exposition(view: View, accept: str = "") -> tuple[bytes, str]:
    """Body and content type for a scraper that sends this Accept header."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(view))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Collected(Collector):
    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterable[Metric]:
        """Every metric of the view."""
        yield from _counters(self._view.totals)
        yield from _histograms(self._view.totals)
        yield from _states(list(self._view.states.values()))


def _counters(counts: Counts) -> Iterator[Metric]:
    labelled: tuple[tuple[str, str, str, dict[str, int] | dict[str, float]], ...] = (
        ("meanet_answers", "Images answered, by exit", "exit", counts.answers),
        ("meanet_degraded", "Images that wanted the cloud and had it not, by reason", "reason", counts.degraded),
        ("meanet_refused", "Requests refused before anything was spent on them", "reason", counts.refused),
        ("meanet_cloud_calls", "Calls to the cloud, by outcome", "outcome", counts.cloud_calls),
        ("meanet_upload_seconds", "Seconds to the cloud and back, by source", "source", counts.upload_seconds),
        ("meanet_joules", "Joules of the edge device, modelled", "part", counts.joules),
    )
    for name, text, label, values in labelled:
        family = CounterMetricFamily(name, text, labels=[label])
        for value, number in values.items():
            family.add_metric([value], number)
        yield family
    yield CounterMetricFamily("meanet_upload_bytes", "Bytes sent to the cloud", value=counts.upload_bytes)
    yield CounterMetricFamily("meanet_passes", "Micro-batches through the edge's blocks", value=counts.passes)
    yield CounterMetricFamily("meanet_passed_images", "Images in these micro-batches", value=counts.passed)


def _histograms(counts: Counts) -> Iterator[Metric]:
    entropy = HistogramMetricFamily("meanet_entropy_nats", "Entropy of the main exit, nats")
    entropy.add_metric([], _buckets(counts.entropy), counts.entropy.total)
    yield entropy
    latency = HistogramMetricFamily("meanet_latency_seconds", "Seconds of an image, by place", labels=["place"])
    for place, histogram in (("edge", counts.edge), ("cloud", counts.cloud), ("total", counts.whole)):
        latency.add_metric([place], _buckets(histogram), histogram.total)
    yield latency


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    found, below = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        found.append((bound, float(below)))
    return found


def _states(states: list[ReplicaState]) -> Iterator[Metric]:
    yield GaugeMetricFamily("meanet_replicas", "Edge replicas that report", value=len(states))
    breaker = GaugeMetricFamily("meanet_breaker_state", "Edge replicas, by state of their breaker", labels=["state"])
    found = Counter(state.breaker for state in states)
    for name in BREAKER_STATES:
        breaker.add_metric([name], found[name])
    yield breaker
    info = GaugeMetricFamily(
        "meanet_model_info", "Edge replicas, by what they answer with", labels=["version", "policy", "gate"]
    )
    for key, number in Counter((str(s.version), s.policy["id"], s.policy["gate"]) for s in states).items():
        info.add_metric(list(key), number)
    yield info
    yield _thresholds(states)
    for name, value in summed_gauges(states).items():
        yield GaugeMetricFamily(f"meanet_{name}", "Sum over the edge replicas", value=value)


def _thresholds(states: list[ReplicaState]) -> Metric:
    """Their mean over the replicas of a version and a gate: a budget moves each one's own."""
    family = GaugeMetricFamily(
        "meanet_threshold", "In the gate's unit; +Inf = never to the cloud", labels=["version", "gate", "index"]
    )
    found: dict[tuple[str, str, str], list[float]] = {}
    for state in states:
        thresholds = state.policy["thresholds"]
        for index, threshold in enumerate(thresholds if len(thresholds) <= _MAX_THRESHOLDS else ()):
            key = str(state.version), state.policy["gate"], str(index)
            found.setdefault(key, []).append(float("inf") if threshold is None else threshold)
    for labels, values in found.items():
        family.add_metric(list(labels), sum(values) / len(values))
    return family
