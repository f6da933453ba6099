"""What the exact search of `jobs.sweep` varies: everything that moves a gate and needs no training."""

from dataclasses import dataclass

from meanet.config import Gate
from meanet.routing import GATES


@dataclass(frozen=True)
class PolicySpace:
    """Every distinct threshold of each gate, at each split size."""

    gates: tuple[Gate, ...]
    """Complexities of the main exit to compare with a threshold."""
    split_sizes: tuple[int, ...] | None = None
    """Numbers of hard classes in use; None = 1 to the trained H."""


def all_gates() -> PolicySpace:
    """Each gate of the exit rule, each split size."""
    return PolicySpace(GATES)


def paper() -> PolicySpace:
    """The paper's gate alone: the main exit's entropy, each split size."""
    return PolicySpace(("main_entropy",))


SPACES = {space.__name__: space for space in (all_gates, paper)}
