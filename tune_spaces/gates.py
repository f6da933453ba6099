"""Policies with a threshold a class, over recorded exits: nothing is trained."""

from meanet.per_class import MEASURE, SIZE, level_name
from meanet.routing import MEASURES
from meanet.study import Choice, Domain, FloatRange, IntRange, Params, Space


def gates(num_classes: int, num_hard_classes: int, first: tuple[Params, ...]) -> Space:
    """Measure of complexity, split size in use, and a level a class, 0 (all to the cloud) to 1 (none).

    Args:
        num_classes: C.
        num_hard_classes: the trained H.
        first: where to begin: points of the exact one-threshold front.
    """
    parameters: dict[str, Domain] = {MEASURE: Choice(MEASURES), SIZE: IntRange(0, num_hard_classes)}
    parameters |= {level_name(class_id): FloatRange(0.0, 1.0) for class_id in range(num_classes)}
    return Space("gates", parameters, first)
