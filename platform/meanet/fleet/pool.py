"""One edge replica at a steady rate, image by image: what the aggregated simulation draws its images from. Pure arrays.

Edge replicas do not touch each other before the cloud, and what holds for one holds for all that are as busy.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from meanet.deadlines import longest_wait
from meanet.fleet.model import Fleet
from meanet.fleet.workload import Workload
from meanet.routing import Bools, Floats, Ints

_IMAGES = 20_000
_STEP = 1.05
"""Rates this close share a pool."""


@dataclass(frozen=True)
class Pool:
    """M images through one edge replica."""

    rows: Ints
    """(M,) which recorded sample each is."""
    waits: Floats
    """(M,) from arrival until the edge's blocks are done, s; 0 where refused."""
    refused: Bools
    """(M,)."""
    call_images: Ints
    """(M,) how many images of the same batch want the cloud."""
    call_bytes: Floats
    """(M,) what they are together."""
    calls_per_image: float
    """Calls to the cloud."""
    service_s: float
    """Of a cloud replica for a call, on average."""
    variation: float
    """Of that: variance / mean**2."""

    @property
    def has_calls(self) -> bool:
        """Whether anything goes to the cloud."""
        return self.calls_per_image > 0


class Pools:
    """Those of one fleet, each simulated when it is first asked for."""

    def __init__(self, fleet: Fleet, work: Workload, seed: int) -> None:
        self._fleet, self._work, self._seed = fleet, work, seed
        self._known: dict[int, Pool] = {}

    def at(self, rate: float) -> Pool:
        """What an edge replica does at about this many images a second."""
        step = round(math.log(max(rate, 1e-9), _STEP))
        if step not in self._known:
            self._known[step] = pool(self._fleet, self._work, _STEP**step, np.random.default_rng((self._seed, 3)))
        return self._known[step]


def pool(fleet: Fleet, work: Workload, rate: float, generator: np.random.Generator) -> Pool:
    """Images at so many a second, the devices of one edge replica together."""
    recorded = len(work.gone)
    rounds = max(1, -(-_IMAGES // recorded))
    rows = np.concatenate([generator.permutation(recorded) for _ in range(rounds)])
    arrived = np.cumsum(generator.exponential(1 / rate, len(rows)))
    drawn = work.take(rows)
    ended, batch = _through(fleet, arrived.tolist(), drawn.extended.tolist())
    refused = batch < 0
    calls = drawn.gone & ~refused
    sizes = np.bincount(batch[calls], minlength=len(rows) + 1)
    num_bytes = np.bincount(batch[calls], drawn.num_bytes[calls], minlength=len(rows) + 1)
    own = sizes[sizes > 0]
    service = fleet.cloud.call_s + fleet.cloud.image_s * own
    mean = float(service.mean()) if len(own) else 0.0
    return Pool(
        rows=rows,
        waits=np.where(refused, 0.0, ended - arrived),
        refused=refused,
        call_images=np.where(calls, sizes[batch], 0),
        call_bytes=np.where(calls, num_bytes[batch], 0.0),
        calls_per_image=len(own) / len(rows),
        service_s=mean,
        variation=float(service.var()) / mean**2 if len(own) else 0.0,
    )


def _through(fleet: Fleet, arrived: list[float], extended: list[bool]) -> tuple[Floats, Ints]:
    """(M,) when each image's batch is done, and which batch that is; -1 where it is refused."""
    edge, limits = fleet.edge, fleet.limits
    ended, batches = np.zeros(len(arrived)), np.full(len(arrived), -1, dtype=np.int64)
    queue: deque[int] = deque()
    free, number, image = 0.0, 0, 0
    most = min(limits.max_queued, longest_wait(limits.deadline_s) / edge.main_s)
    while image < len(arrived) or queue:
        start = free if queue else max(free, arrived[image])
        while image < len(arrived) and arrived[image] <= start:
            if len(queue) < max(1.0, most):
                queue.append(image)
            image += 1
        taken = [queue.popleft() for _ in range(min(len(queue), edge.max_batch))]
        free = start + edge.service(len(taken), sum(extended[i] for i in taken))
        ended[taken], batches[taken] = free, number
        number += 1
    return ended, batches
