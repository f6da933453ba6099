"""What the exact search of `jobs.sweep` varies: everything that moves a gate and needs no training."""

from meanet.operating_point import PolicySpace
from meanet.routing import MEASURES


def all_gates() -> PolicySpace:
    """Each gate that can be enumerated, raw and temperature-scaled, each split size, none among them."""
    return PolicySpace((*MEASURES, "two_gate"), scaled=True)


def one_gate() -> PolicySpace:
    """Each measure of complexity with one threshold, logits as they are, each split size, none among them."""
    return PolicySpace(MEASURES)


def early_gates() -> PolicySpace:
    """What is known when only the main block ran, with the extension block in use: few policies, for few images.

    The more policies are compared on a few hundred images, the more the best of them owes to chance.
    """
    return PolicySpace(("main_entropy", "max_softmax", "margin"), smallest_split=1)


def paper() -> PolicySpace:
    """The paper's gate alone: the main exit's entropy, each split size from one class on."""
    return PolicySpace(("main_entropy",), smallest_split=1)


SPACES = {space.__name__: space for space in (all_gates, one_gate, early_gates, paper)}
