"""A model version as a replica answers with it: weights, the policy in force, what an answer costs."""

from dataclasses import dataclass, replace

from meanet.artifact import TrainedModel
from meanet.energy import CostModel
from meanet.routing import Policy
from meanet.runtime import EdgeRuntime


@dataclass(frozen=True)
class Served:
    """Never changed in place: a request keeps the one that it was admitted under."""

    version: int
    """Of the registered model."""
    model: TrainedModel
    policy: Policy
    """In force: the operating point's, or what an operator put in its place."""
    runtime: EdgeRuntime
    costs: CostModel

    @staticmethod
    def of(model: TrainedModel, version: int) -> "Served":
        """A loaded model under its own operating point.

        Raises:
            UserError: it has none, or one that does not fit it.
        """
        return Served(version, model, model.policy, EdgeRuntime(model), model.costs)

    def with_policy(self, policy: Policy) -> "Served":
        """The same weights under another policy."""
        return replace(self, policy=policy)
