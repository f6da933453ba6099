"""What an operator puts in place of the operating point's policy, within what the model was trained for."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from meanet.config import Gate
from meanet.errors import UserError
from meanet.model_spec import ModelSpec
from meanet.routing import Policy


@dataclass(frozen=True)
class PolicyWish:
    """What is not given stays as the operating point has it."""

    version: int
    """Of the model, whose thresholds these are: another version starts with its own operating point."""
    gate: Gate | None = None
    """Which complexity is compared; with another gate, thresholds in its unit must be given."""
    thresholds: tuple[float | None, ...] | None = None
    """Null = never to the cloud."""
    num_hard_classes: int | None = None
    """How many of the trained hard classes are in use, the hardest first."""
    edge_only: bool | None = None
    """Nothing goes to the cloud."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """Back from `to_dict`."""
        given = plain.get("thresholds")
        return cls(**{**plain, "thresholds": None if given is None else tuple(given)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def applied_to(self, model: ModelSpec) -> Policy:
        """The policy that comes of it.

        Raises:
            UserError: it does not fit the model.
        """
        policy = model.policy
        if self.gate is not None and self.gate != policy.gate and self.thresholds is None:
            raise UserError(f"gate {self.gate} instead of {policy.gate}: give its thresholds, too, in its own unit")
        trained = model.hard_classes
        count = len(policy.hard_classes) if self.num_hard_classes is None else self.num_hard_classes
        if not 0 <= count <= len(trained):
            raise UserError(
                f"num_hard_classes is {count}: this model's extension was trained on {len(trained)} classes"
            )
        gate = self.gate or policy.gate
        changed = replace(
            policy,
            gate=gate,
            thresholds=policy.thresholds if self.thresholds is None else self.thresholds,
            hard_classes=trained[:count],
            edge_only=bool(self.edge_only),
            measures=policy.measures if gate == policy.gate else (),
        )
        changed.check_classes(len(model.class_names))
        return changed
