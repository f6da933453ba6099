"""How a request's time is shared out: what it may wait for the edge's blocks, and what is left for the cloud."""

QUEUE_SHARE = 0.5
"""Of a request's time, what it may wait for the blocks: the rest is for its own pass, the cloud, and errors."""


def longest_wait(deadline_s: float) -> float:
    """Seconds that images may wait for the blocks before more are refused; half a second at most."""
    return QUEUE_SHARE * min(1.0, deadline_s)


def cloud_patience(cloud_budget_s: float, deadline_s: float, reserve_s: float) -> float:
    """Seconds that even a request that has waited as long as it may gives the cloud: a call that ends without an answer
    after them says something of the cloud, before them of its client's haste."""
    return min(cloud_budget_s, max(0.0, (1 - QUEUE_SHARE) * deadline_s - reserve_s))
