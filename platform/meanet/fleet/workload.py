"""What images do under a policy, from recorded exits: who wants the cloud, what is sent, what it costs. Pure arrays.

Shape letters: N recorded samples; a simulation draws its images from them at random, with replacement.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meanet.energy import CostModel
from meanet.replay import Exits, Replayer
from meanet.routing import Bools, Exit, Floats, Policy


@dataclass(frozen=True)
class Workload:
    """N samples under one policy."""

    gone: Bools
    """(N,) the cloud is wanted."""
    extended: Bools
    """(N,) adaptive and extension block run before that is decided."""
    extended_alone: Bools
    """(N,) they run if the edge must answer by itself."""
    num_bytes: Floats
    """(N,) of an upload."""
    upload_joules: Floats
    """(N,) of an upload, J."""
    right: Bools
    """(N,) the answer is right, the cloud's where it is wanted."""
    right_alone: Bools
    """(N,) the edge's own is."""
    main_joules: float
    """J."""
    extension_joules: float
    """J where adaptive and extension block run."""
    source: str
    """Of the joules."""

    @property
    def cloud_share(self) -> float:
        """Of the images, that want the cloud."""
        return float(self.gone.mean())

    @property
    def mean_bytes(self) -> float:
        """Of an upload; 0 where there are none."""
        return float(self.num_bytes[self.gone].mean()) if self.gone.any() else 0.0

    @property
    def kinds(self) -> NDArray[np.int8]:
        """(N,) `Exit` values."""
        kinds = np.where(self.extended, Exit.EXTENSION, Exit.MAIN)
        return np.where(self.gone, Exit.CLOUD, kinds).astype(np.int8)

    def joules(self, sent: Bools, degraded: Bools) -> Floats:
        """(N,) J, where these were sent and these were answered by the edge though the cloud was wanted."""
        ran = self.extended | degraded & self.extended_alone
        return np.asarray(self.main_joules + self.extension_joules * ran + self.upload_joules * sent)

    def take(self, rows: NDArray[np.int64]) -> "Workload":
        """These samples."""
        values: dict[str, Any] = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **values)


def workload(exits: Exits, costs: CostModel, policy: Policy) -> Workload:
    """Recorded exits under a policy."""
    replayer = Replayer(exits, costs)
    routed = replayer.route(policy)
    alone = replayer.route(policy.with_request(edge_only=True))
    return Workload(
        gone=routed.exit == Exit.CLOUD,
        extended=routed.extended,
        extended_alone=alone.extended,
        num_bytes=exits.upload_bytes.astype(np.float64),
        upload_joules=np.broadcast_to(costs.upload_joules(exits.upload_bytes), exits.labels.shape),
        right=routed.pred == exits.labels,
        right_alone=alone.pred == exits.labels,
        main_joules=costs.main_joules,
        extension_joules=costs.extension_joules,
        source=costs.tag,
    )
