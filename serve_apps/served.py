"""A model version as a replica answers with it: weights, the policy in force, what an answer costs."""

from dataclasses import dataclass, replace

from meanet.energy import CostModel
from meanet.engines import EdgeEngine
from meanet.model_spec import ModelSpec
from meanet.routing import Policy
from meanet.runtime import EdgeRuntime


@dataclass(frozen=True)
class Served:
    """Never changed in place: a request keeps the one that it was admitted under."""

    version: int
    """Of the registered model."""
    model: ModelSpec
    policy: Policy
    """In force: the operating point's, or what an operator put in its place."""
    runtime: EdgeRuntime
    costs: CostModel
    weights: str = ""
    """Digest of the edge's weights and the engine that runs them: equal ones may share it."""
    node: str = ""
    """Ray's id of the node that this replica is on."""

    @staticmethod
    def of(model: ModelSpec, version: int, engine: EdgeEngine | None = None) -> "Served":
        """A model under its own operating point; `engine` runs its blocks, torch over its own networks if not given.

        Raises:
            UserError: it has none, or one that does not fit it.
        """
        return Served(version, model, model.policy, EdgeRuntime(model, engine), model.costs)

    def with_policy(self, policy: Policy) -> "Served":
        """The same weights under another policy."""
        return replace(self, policy=policy)
