"""How many replicas there are, and on which nodes: edge and cloud apart from each other."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meanet.errors import UserError
from serve_apps import priority
from serve_apps.rollout import Place

Pin = Literal["auto", "always", "never"]
_SHARE = 0.001
"""Of a node's resource `edge` or `cloud`, for a replica: it marks the node, and a thousand fit."""


class Scaling(BaseModel):
    """As many replicas as the load wants."""

    model_config = ConfigDict(extra="forbid")

    min: int = Field(default=1, ge=1)
    """Replicas at least."""
    max: int = Field(ge=1)
    """And at most."""
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Requests under way at a replica, on average, that are to be reached."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    """How long there must be more before one is added."""
    downscale_delay_s: float = Field(default=60.0, ge=0)
    """And fewer, before one goes."""
    interval_s: float = Field(default=1.0, gt=0)
    """How often replicas report their load."""
    look_back_s: float = Field(default=5.0, gt=0)
    """Over which the load is averaged."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
_FRONT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.front.middlewares"}
"""Of edge replicas."""
Replicas = Annotated[int, Field(ge=1)] | Scaling
"""A fixed number, or a range."""


def most(replicas: Replicas) -> int:
    """How many there may come to be."""
    return replicas if isinstance(replicas, int) else replicas.max


def replicas_of(text: str, flag: str) -> Replicas:
    """`2`, or a range such as `1-4`.

    Raises:
        UserError: it is neither.
    """
    low, dash, high = text.partition("-")
    numbers = [low, high] if dash else [low]
    if not all(number.isascii() and number.isdigit() and int(number) >= 1 for number in numbers):
        raise UserError(f"{flag} is {text}: it must be 1 or more, or a range such as 1-4")
    if not dash:
        return int(low)
    try:
        return Scaling(min=int(low), max=int(high))
    except ValidationError as error:
        raise UserError(f"{flag} is {text}: the first number must not be above the second") from error


def options(
    replicas: Replicas, place: Place, pin: Pin, resources: Mapping[str, float], num_cpus: float
) -> dict[str, Any]:
    """For a deployment's `.options`.

    Args:
        replicas: how many.
        place: whose.
        pin: whether to ask for the custom resource of that name; auto = if the cluster has it.
        resources: of the cluster.
        num_cpus: that a replica reserves.
    """
    variables = {**_ENVIRONMENT, **priority.HOOK, **(_FRONT if place == "edge" else {})}
    actor: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": {"env_vars": variables}}
    if pin == "always" or (pin == "auto" and resources.get(place, 0) > 0):
        actor["resources"] = {place: _SHARE}
    if isinstance(replicas, int):
        return {"num_replicas": replicas, "ray_actor_options": actor}
    return {
        "ray_actor_options": actor,
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_ongoing_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "metrics_interval_s": replicas.interval_s,
            "look_back_period_s": replicas.look_back_s,
        },
    }
