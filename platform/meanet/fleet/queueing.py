"""How long a call waits for one of k replicas, in closed form: M/M/k with a patience that ends (Barrer, Operations
Research 5, 1957), its time scale corrected for service that is not exponential (Allen & Cunneen). Pure.

Calls that wait longer than the patience leave, so that there is a steady state under any load. The virtual wait v has
an atom at 0 and, in units where that is 1, the density lambda * B * exp(-(k mu - lambda) v) up to the patience, and
falls as exp(-k mu v) beyond; B is Erlang's loss formula for k - 1 servers.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, pdtr

from meanet.routing import Bools, Floats


@dataclass(frozen=True)
class Load:
    """What comes to a cloud."""

    rate: float
    """Calls a second."""
    service_s: float
    """Of a call, on average."""
    variation: float
    """Of the service times: variance / mean**2."""
    replicas: int
    """k."""
    patience_s: float
    """What a call waits for a replica at most."""


@dataclass(frozen=True)
class Waiting:
    """The law of the wait."""

    at_once: float
    """Probability of no wait."""
    leaves: float
    """Probability of waiting in vain, for the whole patience."""
    decay: float
    """1/s: how the density of waits between falls (or, overloaded, rises)."""
    load: Load
    """Of what."""

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Floats, Bools]:
        """(size,) seconds, and which leave."""
        where = generator.random(size)
        waits = np.where(where < self.at_once, 0.0, self._between(generator.random(size)))
        leaves = where >= 1 - self.leaves
        return np.where(leaves, self.load.patience_s, waits), leaves

    def _between(self, uniform: Floats) -> Floats:
        """Quantiles of the exponential that is cut off at the patience."""
        x = self.decay * self.load.patience_s
        if abs(x) < 1e-9:
            return uniform * self.load.patience_s
        if x > 0:
            return -np.log1p(uniform * math.expm1(-x)) / self.decay
        return self.load.patience_s + np.log1p(uniform * math.expm1(x)) / -self.decay

    def within(self, seconds: float) -> float:
        """Probability of getting a replica after so long or sooner."""
        patience = self.load.patience_s
        if seconds < 0:
            return 0.0
        if seconds >= patience:
            return 1 - self.leaves
        x = self.decay * patience
        if abs(x) < 1e-9:
            part = seconds / patience
        elif x > 0:
            part = math.expm1(-self.decay * seconds) / math.expm1(-x)
        else:  # both in units of exp(-x), which keeps them finite
            part = (math.exp(x - self.decay * seconds) - math.exp(x)) / -math.expm1(x)
        return self.at_once + (1 - self.at_once - self.leaves) * part

    @property
    def mean_wait(self) -> float:
        """Of all calls, those included that leave, s."""
        patience, x = self.load.patience_s, self.decay * self.load.patience_s
        if abs(x) < 1e-6:
            between = patience / 2
        elif x > 500:
            between = 1 / self.decay
        elif x < -500:
            between = patience + 1 / self.decay
        else:
            between = 1 / self.decay - patience / math.expm1(x)
        return (1 - self.at_once - self.leaves) * between + self.leaves * patience

    @property
    def utilisation(self) -> float:
        """Of the replicas, 0..1."""
        return min(1.0, self.load.rate * (1 - self.leaves) * self.load.service_s / self.load.replicas)

    @property
    def ongoing(self) -> float:
        """Calls that wait or run, on average (Little's law)."""
        running = (1 - self.leaves) * self.load.service_s
        return self.load.rate * (self.mean_wait + running)


def erlang_b(servers: int, offered: float) -> float:
    """Probability that all servers are busy where nobody waits (M/G/k/k)."""
    below = float(pdtr(servers, offered))
    if below < 1e-280:
        return 1 - servers / offered
    return math.exp(servers * math.log(offered) - offered - float(gammaln(servers + 1))) / below


def waiting(load: Load) -> Waiting:
    """The law of the wait under a load."""
    if load.rate <= 0:
        return Waiting(1.0, 0.0, 1.0, load)
    if load.patience_s <= 0:
        return Waiting(0.0, 1.0, 1.0, load)
    capacity = load.replicas / load.service_s
    spread = (1 + load.variation) / 2
    decay = (capacity - load.rate) / spread
    x = decay * load.patience_s
    density = load.rate / spread * erlang_b(load.replicas - 1, load.rate * load.service_s)
    # All three in units of exp(scale), which keeps them finite in deep overload.
    scale = max(0.0, -x)
    nothing = math.exp(-scale)
    if abs(x) < 1e-9:
        between = density * load.patience_s
    else:
        between = density * (math.exp(-scale) - math.exp(-x - scale)) / decay
    beyond = density * math.exp(-x - scale) * spread / capacity
    total = nothing + between + beyond
    return Waiting(nothing / total, beyond / total, decay, load)
