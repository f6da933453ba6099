"""A fleet simulated: exactly where that is quick, else aggregated."""

from dataclasses import replace
from typing import Literal

from meanet.errors import UserError
from meanet.fleet.aggregate import simulate_aggregated
from meanet.fleet.exact import simulate_exactly
from meanet.fleet.model import Fleet
from meanet.fleet.outcome import Outcome, Price
from meanet.fleet.pool import Pools
from meanet.fleet.rates import curve
from meanet.fleet.workload import Workload

Mode = Literal["auto", "exact", "aggregated"]
EXACT_IMAGES = 200_000
"""As many expected images as `auto` simulates exactly: some seconds."""
MOST_EXACT = 20_000_000
"""As many as `exact` takes at most, for its memory's sake."""


class Simulator:
    """Simulates one fleet at many sizes."""

    def __init__(
        self, fleet: Fleet, work: Workload, seed: int = 0, price: Price | None = None, mode: Mode = "auto"
    ) -> None:
        self.fleet, self.work, self.seed = fleet, work, seed
        self._price, self._mode = price or Price(), mode
        self._pools = Pools(fleet, work, seed)

    def at(self, devices: int) -> Outcome:
        """With so many devices.

        Raises:
            UserError: too many for the exact mode; a number that is none of devices.
        """
        fleet = replace(self.fleet, devices=devices)
        expected = devices * curve(fleet, self.seed).total
        if self._mode == "exact" and expected > MOST_EXACT:
            raise UserError(
                f"{devices} devices send {expected:.3g} images in {fleet.horizon_s:g} s, and the exact mode takes "
                f"{MOST_EXACT:.0e} at most: choose the mode aggregated, or a shorter time"
            )
        if self._mode == "exact" or (self._mode == "auto" and expected <= EXACT_IMAGES):
            return simulate_exactly(fleet, self.work, self.seed, self._price)
        return simulate_aggregated(fleet, self.work, self.seed, self._price, self._pools)
