"""The cloud's calls as one stream, a slot of time at a stroke: what a million devices take minutes for.

Many devices' calls together are a Poisson stream, whatever each one does (Palm and Khinchin), so that of all devices
only what one edge replica does (`pool`), the law of the wait for a replica (`queueing`) and the share of edge replicas
whose breaker is open are carried from slot to slot. A slot is an interval of the autoscaler; what goes on inside one is
taken as steady, which holds where the cloud's budget is short beside it. From each slot a sample of images is drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from meanet.errors import UserError
from meanet.fleet.model import Fleet
from meanet.fleet.outcome import Images, Moment, Outcome, Price, Status, outcome
from meanet.fleet.pool import Pool, Pools
from meanet.fleet.queueing import Load, Waiting, erlang_b, waiting
from meanet.fleet.rates import curve
from meanet.fleet.scaling import Autoscaler, Replicas, first_replicas
from meanet.fleet.workload import Workload
from meanet.routing import Floats

_SAMPLE = 300_000
"""Images drawn over all slots, about."""
_FEWEST = 100
"""Images drawn of a slot at least."""
_NEVER = 1e-7


def simulate_aggregated(
    fleet: Fleet, work: Workload, seed: int = 0, price: Price | None = None, pools: Pools | None = None
) -> Outcome:
    """Simulate slot by slot; the time it takes does not grow with the number of devices.

    Args:
        fleet: what to simulate.
        work: what its images do.
        seed: of all that is drawn.
        price: of a replica.
        pools: those of a fleet that differs in nothing but the number of devices and replicas, to save time.

    Raises:
        UserError: the autoscaler's interval is too short for a slot.
    """
    slot, budget = fleet.scaling.interval_s, fleet.limits.cloud_budget_s
    if slot < 2 * budget:
        raise UserError(
            f"scaling.interval_s is {slot} and limits.cloud_budget_s {budget}: the aggregated simulation takes an "
            "interval as steady and needs it to be twice the budget at least; take a longer one, or the exact mode"
        )
    return _Slots(fleet, work, seed, pools or Pools(fleet, work, seed)).run(price or Price())


T = TypeVar("T")


def _agreement(at: Callable[[float], tuple[float, T]]) -> tuple[float, T]:
    """The probability that brings itself about, by halving: the more of it, the less follows."""
    found, steady = at(0.0)
    if found < _NEVER:
        return found, steady
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        found, steady = at(middle)
        low, high = (middle, high) if found > middle else (low, middle)
    return found, steady


@dataclass(frozen=True)
class _Steady:
    """What a slot comes to."""

    fails: float
    """Probability that a call does."""
    breakers: Floats
    """(failures + 1,) share of edge replicas after so many failures in a row; the last: open."""
    law: Waiting
    """Of the wait for a replica."""
    busy: float
    """Probability that too many calls of an edge replica are under way."""


class _Slots:
    def __init__(self, fleet: Fleet, work: Workload, seed: int, pools: Pools) -> None:
        self.fleet, self.work, self.pools = fleet, work, pools
        self.generator = np.random.default_rng((seed, 2))
        self._fronts = np.random.default_rng((seed, 4))
        self.curve = curve(fleet, seed)
        link, cloud = fleet.link, fleet.cloud
        self._fixed_s = link.rtt_seconds / 2 + cloud.network_s
        self.sources = fleet.devices / fleet.edges

    def run(self, price: Price) -> Outcome:
        rule, horizon = self.fleet.scaling, self.fleet.horizon_s
        starts = np.arange(0, horizon, rule.interval_s)
        ends = np.minimum(starts + rule.interval_s, horizon)
        rates = self.curve.mean(starts, ends)
        sample = max(_FEWEST, _SAMPLE // len(starts))
        first = first_replicas(self.fleet, rates[0] * self.fleet.devices, self.work.cloud_share)
        replicas, scaler = Replicas(rule, first), Autoscaler(rule, first)
        breakers: Floats = np.zeros(self.fleet.limits.breaker_failures + 1)
        breakers[0] = 1.0
        parts, timeline = [], []
        for start, end, rate in zip(starts.tolist(), ends.tolist(), rates.tolist(), strict=True):
            replicas.pass_time(start)
            expected = rate * self.fleet.devices * (end - start)
            count = int(self.generator.poisson(expected))
            come = self.pools.at(rate * self.sources)
            actual = count / (end - start) / self.fleet.edges  # images a second of an edge replica
            steady = self.settle(come, actual, breakers, replicas.ready, end - start)
            breakers = steady.breakers
            if count:
                parts.append(self.draw(come, steady, actual, min(sample, count), count))
            ready = replicas.ready
            replicas.want(end, scaler.decide(end, steady.law.ongoing))
            offered = rate * self.fleet.devices * come.calls_per_image * come.service_s / rule.max_replicas
            timeline.append(
                Moment(
                    start,
                    end - start,
                    count / (end - start),
                    ready,
                    replicas.paid,
                    steady.law.utilisation,
                    offered,
                )
            )
        if not parts:
            raise UserError(f"no image came in {horizon:g} s at {self.curve.peak:g} a second: simulate for longer")
        return outcome(self.fleet, self.work, Images.join(parts), timeline, mode="aggregated", price=price)

    def settle(self, come: Pool, rate: float, breakers: Floats, replicas: int, seconds: float) -> _Steady:
        """Load, failures and breakers that agree with each other; more failures mean less load."""
        calls = rate * come.calls_per_image

        def at(fails: float) -> tuple[float, _Steady]:
            after = self._pass_breakers(breakers, calls, fails, seconds)
            is_open = float(after[-1])

            def with_busy(busy: float) -> tuple[float, Waiting]:
                made = calls * (1 - is_open) * (1 - busy) + self._probes(calls) * is_open
                law = self._law(come, made * self.fleet.edges, replicas)
                return self._busy(come, law, calls * (1 - is_open)), law

            busy, law = _agreement(with_busy)
            found = self._fails(come, law)
            return found, _Steady(found, after, law, busy)

        _, steady = _agreement(at)
        return steady

    def _pass_breakers(self, breakers: Floats, calls: float, fails: float, seconds: float) -> Floats:
        """The shares after a slot (backward Euler): a failure more, back to none, open, or closed by a probe."""
        if fails == 0 and breakers[0] == 1:
            return breakers
        count = len(breakers)
        flow: Floats = np.zeros((count, count))  # [to, from]
        for state in range(count - 1):
            flow[state + 1, state] += calls * fails
            flow[0, state] += calls * (1 - fails)
        flow[0, -1] += self._probes(calls) * (1 - fails)
        leaving = np.diag(flow.sum(axis=0))
        after: Floats = np.asarray(np.linalg.solve(np.eye(count) - seconds * (flow - leaving), breakers), np.float64)
        return after

    def _probes(self, calls: float) -> float:
        """Probes a second of an edge replica whose breaker is open: the first call after a while."""
        return 1 / (self.fleet.limits.breaker_open_s + 1 / calls) if calls > 0 else 0.0

    def _law(self, come: Pool, calls: float, replicas: int) -> Waiting:
        upload = self.work.mean_bytes / self.fleet.link.bytes_per_second + self._fixed_s
        patience = self.fleet.limits.cloud_budget_s - upload
        return waiting(Load(calls if come.has_calls else 0.0, come.service_s, come.variation, replicas, patience))

    def _fails(self, come: Pool, law: Waiting) -> float:
        left = law.load.patience_s - come.service_s - self.fleet.link.rtt_seconds / 2
        return 1 - law.within(left) if come.has_calls else 0.0

    def _busy(self, come: Pool, law: Waiting, calls: float) -> float:
        upload = self.fleet.limits.cloud_budget_s - law.load.patience_s
        under_way = calls * (upload + law.mean_wait + come.service_s)
        return erlang_b(self.fleet.limits.max_cloud_calls, under_way) if under_way > 0 else 0.0

    def draw(self, come: Pool, steady: _Steady, rate: float, size: int, count: int) -> Images:
        """A sample of the slot's images."""
        fleet, generator = self.fleet, self.generator
        chosen = generator.integers(0, len(come.rows), size)
        rows, gone = come.rows[chosen], come.call_images[chosen] > 0
        drawn = self.work.take(rows)
        is_open = steady.breakers[-1]
        luck = generator.random(size)
        asked = gone & (luck >= is_open) & (generator.random(size) >= steady.busy)
        calls = rate * come.calls_per_image
        probed = gone & (luck < is_open * self._probes(calls) / max(calls, 1e-12))
        waits, leaves = steady.law.draw(size, generator)
        link_s = come.call_bytes[chosen] / fleet.link.bytes_per_second + self._fixed_s
        service = fleet.cloud.call_s + fleet.cloud.image_s * come.call_images[chosen]
        cloud_s = link_s + waits + service + fleet.link.rtt_seconds / 2
        budget = np.minimum(
            fleet.limits.cloud_budget_s, fleet.limits.deadline_s - fleet.limits.reserve_s - come.waits[chosen]
        )
        late = leaves | (cloud_s > budget)
        alone = gone & (~asked | late)
        status = np.where(alone, Status.DEGRADED, drawn.kinds)
        status = np.where(come.refused[chosen], Status.REFUSED, status).astype(np.int8)
        more = fleet.edge.extension_s * (drawn.extended_alone & ~drawn.extended)
        seconds = come.waits[chosen] + fleet.edge.fronts(size, self._fronts)
        seconds += np.where(asked, np.where(late, np.maximum(budget, 0.0), cloud_s), 0.0) + np.where(alone, more, 0.0)
        seconds[status == Status.REFUSED] = np.nan
        sent = (asked & (budget > 0)) | probed
        return Images(rows, seconds, status, sent, np.full(size, count / size))
