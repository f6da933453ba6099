"""A simulated fleet as a figure and a self-contained page."""

import html
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from matplotlib.figure import Figure

from meanet import plots

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MEANet fleet: $exits</title>
<style>$style</style></head><body>
<h1>A fleet on paper: <code>$exits</code></h1>
<p>$summary</p>
$table
<p class="note">Latency from arrival to answer. Joules are the device's, $source. Cost: $unit. Exact: every image and
call an event; aggregated: the calls as one stream.</p>
<div>$plot</div>
<h2>The fleet</h2><pre>$fleet</pre>
</body></html>
""")

COLUMNS = (
    "devices",
    "mode",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "mJ an image",
    "J a device-hour",
    "cloud",
    "degraded",
    "refused",
    "replicas",
    "at most",
    "busy",
    "cost an hour",
)


def rows(outcomes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each number of devices, as `COLUMNS` has them."""
    return [_row(found) for found in outcomes]


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    latency, share = found["latency"], found["share"]
    per_hour = found["cost"] / found["replica_hours"] * found["replicas_mean"] if found["replica_hours"] else 0.0
    return (
        f"{found['devices']:,}",
        found["mode"],
        *(f"{1000 * latency[name]:.1f}" if latency else "-" for name in ("p50", "p90", "p99")),
        f"{1000 * sum(found['joules'].values()):.3g}",
        f"{found['joules_device_hour']:.3g}",
        *(f"{share[name]:.1%}" for name in ("cloud", "degraded", "refused")),
        f"{found['replicas_mean']:.1f}",
        str(found["replicas_max"]),
        f"{found['utilisation']:.0%}",
        f"{per_hour:.4g}",
    )


def text_table(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The rows as lines for a terminal."""
    lines = [COLUMNS, *rows(outcomes)]
    widths = [max(len(line[column]) for line in lines) + 2 for column in range(len(COLUMNS))]
    return "\n".join("".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown_table(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a document."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(outcomes)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(result: Mapping[str, Any]) -> str:
    """Where the cloud becomes the bottleneck and what would move it, in sentences."""
    narrow, advice = result["bottleneck"], result["advice"]
    most = result["outcomes"][-1]["devices"]
    if narrow is None:
        return f"The cloud is no bottleneck at up to {most:,} devices."
    said = f"The cloud keeps up with {narrow['devices']:,} devices; with more, {narrow['reason']}."
    if advice is None:
        return f"{said} No threshold of this gate makes {most:,} devices fit."
    before, after, policy = advice["before"], advice["after"], advice["policy"]
    thresholds = " ".join("never" if value is None else f"{value:.6g}" for value in policy["thresholds"])
    return (
        f"{said} For {most:,} devices to fit, take {policy['gate']} at {thresholds}: the cloud share falls from "
        f"{before['cloud_share']:.1%} to {after['cloud_share']:.1%}, accuracy goes from {before['accuracy']:.2%} to "
        f"{after['accuracy']:.2%} and energy from {1000 * before['joules']:.4g} to {1000 * after['joules']:.4g} mJ an "
        f"image; simulated, {advice['outcome']['share']['degraded']:.2%} of the answers are degraded."
    )


def figure(result: Mapping[str, Any]) -> Figure:
    """Latency, shares, and replicas and cost over the number of devices; replicas over time of the largest fleet."""
    outcomes = result["outcomes"]
    devices = [found["devices"] for found in outcomes]
    drawn = Figure(figsize=(11, 7), layout="constrained")
    panels: Any = drawn.subplots(2, 2)
    (latency, shares), (replicas, over_time) = panels
    for name in ("p50", "p90", "p99"):
        latency.plot(devices, [1000 * found["latency"].get(name, float("nan")) for found in outcomes], "o-", label=name)
    latency.set(title="Latency", ylabel="ms", yscale="log")
    for name in ("cloud", "degraded", "refused"):
        shares.plot(devices, [found["share"][name] for found in outcomes], "o-", label=name)
    shares.set(title="Share of the images", ylim=(0, None))
    replicas.plot(devices, [found["replicas_mean"] for found in outcomes], "o-", label="on average")
    replicas.plot(devices, [found["replicas_max"] for found in outcomes], "o-", label="at most")
    replicas.set(title="Replicas of the cloud", yscale="log")
    for axes in (latency, shares, replicas):
        axes.set(xscale="log", xlabel="devices")
        if result["bottleneck"] and result["bottleneck"]["devices"]:
            axes.axvline(result["bottleneck"]["devices"], color="black", ls="--", lw=1, label="fits at most")
        axes.legend(fontsize=8)
    _over_time(over_time, outcomes[-1])
    return drawn


def _over_time(axes: Any, found: Mapping[str, Any]) -> None:
    hours = [moment["start_s"] / 3600 for moment in found["timeline"]]
    axes.step(hours, [moment["paid"] for moment in found["timeline"]], where="post", label="replicas")
    axes.set(title=f"{found['devices']:,} devices over time", xlabel="hours", ylabel="replicas", ylim=(0, None))
    rate = axes.twinx()
    rate.plot(hours, [moment["images_per_second"] for moment in found["timeline"]], color="#9aa5b1", lw=1)
    rate.set(ylabel="images a second (grey)", ylim=(0, None))


def page(result: Mapping[str, Any], fleet: str) -> str:
    """The page; `fleet` describes what was simulated."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    lines = [
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in rows(result["outcomes"])
    ]
    return _PAGE.substitute(
        style=plots.STYLE,
        exits=html.escape(str(result["exits"])),
        summary=html.escape(summary(result)),
        table=f"<table><tr>{heads}</tr>{''.join(lines)}</table>",
        source=html.escape(result["outcomes"][-1]["joules_source"]),
        unit=html.escape(result["outcomes"][-1]["cost_unit"]),
        plot=plots.svg(figure(result)),
        fleet=html.escape(fleet),
    )
