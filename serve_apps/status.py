"""The board's view for the operator's page and for programs: `GET /v1/status`. Plain JSON."""

from collections import Counter
from typing import Any, Literal

from serve_apps.board import View, summed_gauges
from serve_apps.exposition import BREAKER_STATES
from serve_apps.tally import Counts, Histogram

Scope = Literal["all replicas", "this replica"]


def status(view: View, scope: Scope) -> dict[str, Any]:
    """What the replicas do: of the last minute, its seconds one by one, and how they stand now."""
    window, states = view.window, list(view.states.values())
    seconds = sum(step.seconds for step in view.steps)
    served: dict[tuple[int, str], dict[str, Any]] = {}
    for state in states:
        entry = served.setdefault(
            (state.version, state.policy["id"]), {"version": state.version, "policy": state.policy, "replicas": 0}
        )
        entry["replicas"] += 1
    breakers = Counter(state.breaker for state in states)
    return {
        "scope": scope,
        "replicas": len(states),
        "breaker": {name: breakers[name] for name in BREAKER_STATES},
        "served": list(served.values()),
        "gauges": summed_gauges(states),
        "window": {"seconds": seconds, "per_second": window.images / seconds if seconds else 0.0, **_figures(window)},
        "since_start": _figures(view.totals),
        "series": [
            {
                "ago_s": step.ago_s,
                "seconds": step.seconds,
                "answers": dict(step.counts.answers),
                "degraded": sum(step.counts.degraded.values()),
                "refused": sum(step.counts.refused.values()),
            }
            for step in view.steps
        ],
    }


def _figures(counts: Counts) -> dict[str, Any]:
    images = counts.images
    return {
        "images": images,
        "share": {exit_: number / images if images else None for exit_, number in counts.answers.items()},
        "degraded": {kind: number for kind, number in counts.degraded.items() if number},
        "refused": {reason: number for reason, number in counts.refused.items() if number},
        "cloud_calls": {outcome: number for outcome, number in counts.cloud_calls.items() if number},
        "joules_per_image": {part: total / images if images else None for part, total in counts.joules.items()},
        "upload_bytes": counts.upload_bytes,
        "latency_ms": {"edge": _ms(counts.edge), "cloud": _ms(counts.cloud), "total": _ms(counts.whole)},
        "images_per_pass": counts.passed / counts.passes if counts.passes else None,
    }


def _ms(histogram: Histogram) -> dict[str, float | None]:
    found = {name: histogram.quantile(share) for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {name: None if value is None else 1000 * value for name, value in found.items()}
