"""How busy the day is: one piecewise constant curve for all devices, hours times bursts. Pure arrays."""

from dataclasses import dataclass

import numpy as np

from meanet.fleet.model import Arrivals, Fleet
from meanet.routing import Floats

DAY_S = 86400.0
_STEP_S = 360.0
"""For so long the profile of the hours is taken as constant: it goes from one hour's middle to the next in a line."""


@dataclass(frozen=True)
class Curve:
    """A rate over time, in images a second of a device."""

    times: Floats
    """(M + 1,) where it changes, s from the beginning; the first is 0 and the last the horizon."""
    rates: Floats
    """(M,) between them."""

    def images(self, until: Floats) -> Floats:
        """Expected images of a device from the beginning on."""
        images: Floats = np.interp(until, self.times, self._sums)
        return images

    def mean(self, start: Floats, end: Floats) -> Floats:
        """Average rate between these times."""
        mean: Floats = (self.images(end) - self.images(start)) / (end - start)
        return mean

    def draw(self, sources: int, generator: np.random.Generator) -> Floats:
        """Times of all images of so many devices together, in order: Poisson processes add up to one."""
        count = generator.poisson(self.total * sources)
        times: Floats = np.interp(np.sort(generator.random(count)) * self._sums[-1], self._sums, self.times)
        return times

    @property
    def total(self) -> float:
        """Expected images of a device, all in all."""
        return float(self._sums[-1])

    @property
    def peak(self) -> float:
        """The highest rate."""
        return float(self.rates.max())

    @property
    def _sums(self) -> Floats:
        return np.concatenate(([0.0], np.cumsum(self.rates * np.diff(self.times))))


def curve(fleet: Fleet, seed: int) -> Curve:
    """The rate of each of the fleet's devices; bursts fall where the seed has them fall."""
    arrivals, horizon, start = fleet.arrivals, fleet.horizon_s, 3600 * fleet.start_hour
    steps = np.arange(0.0, horizon, _STEP_S) if len(set(arrivals.hours)) > 1 else np.zeros(1)
    bursts = _bursts(arrivals, horizon, np.random.default_rng((seed, 1)))
    edges = np.concatenate(([horizon], steps, bursts, bursts + arrivals.burst_s))
    times = np.unique(edges[(edges >= 0) & (edges <= horizon)])
    middle = (times[1:] + times[:-1]) / 2
    hours = np.array(arrivals.hours) / np.mean(arrivals.hours)
    profile = np.interp(middle + start, (np.arange(24) + 0.5) * 3600, hours, period=DAY_S)
    inside = (middle[:, None] >= bursts) & (middle[:, None] < bursts + arrivals.burst_s)
    return Curve(times, arrivals.rate * profile * np.where(inside.any(axis=1), arrivals.burst_factor, 1.0))


def _bursts(arrivals: Arrivals, horizon: float, generator: np.random.Generator) -> Floats:
    """When they begin."""
    count = generator.poisson(arrivals.bursts_per_day * horizon / DAY_S)
    return np.sort(generator.random(count)) * horizon
