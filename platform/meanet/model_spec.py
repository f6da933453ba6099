"""What a trained model is, apart from its weights: read from its folder without torch.

    model.json           recipe, class split, class names, preprocessing, MACs and bytes moved, digest of the data, and
                         what an image costs by the profiles that it names
    operating_point.json once one was chosen: gate, thresholds, hard classes in use, what it was chosen by

`EdgeSpec` is what a device needs to answer, and takes nothing but numpy and Pillow; `ModelSpec` is all of it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from meanet.config import EnergyConfig, Recipe, energy_config
from meanet.energy import BytesMoved, CostModel, ImageJoules, Macs, cost_model
from meanet.errors import UserError
from meanet.preprocessing import Preprocessing
from meanet.routing import Policy

FORMAT = 1
MODEL, OPERATING_POINT = "model.json", "operating_point.json"
EDGE, CLOUD = "edge.safetensors", "cloud.safetensors"


@dataclass(frozen=True, kw_only=True)
class EdgeSpec:
    """What answering takes beside the networks."""

    class_names: tuple[str, ...]
    """By class id."""
    hard_classes: tuple[int, ...]
    """All H that the extension was trained on, hardest first."""
    preprocessing: Preprocessing
    """Of the images that the networks take."""
    operating_point: dict[str, Any] | None = None
    """DESIGN's operating point; None until one was chosen."""

    @property
    def policy(self) -> Policy:
        """The operating point's policy.

        Raises:
            UserError: none was chosen yet.
        """
        if self.operating_point is None:
            raise UserError("this model has no operating point yet: run jobs.sweep on its exits table")
        policy = Policy.from_dict(self.operating_point)
        policy.check_classes(len(self.class_names))
        if policy.hard_classes != self.hard_classes[: len(policy.hard_classes)]:
            raise UserError(
                f"the operating point's hard classes {list(policy.hard_classes)} are not the first of the trained "
                f"{list(self.hard_classes)}: choose it on this model's own exits table"
            )
        return policy

    def with_operating_point(self, point: dict[str, Any]) -> Self:
        """The same model under another operating point."""
        return replace(self, operating_point=point)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(EdgeSpec):
    """All that belongs to a model but its networks."""

    recipe: Recipe
    """What trained it."""
    class_precision: tuple[float, ...]
    """Validation precision of the main exit, by class id."""
    macs: Macs
    """Of each block."""
    bytes_moved: BytesMoved | None
    """Of the edge's blocks; None in models saved before there were profiles that ask."""
    data_digest: str
    """Of the table that it was trained on."""

    @property
    def costs(self) -> CostModel:
        """Joules by `energy`'s profiles."""
        return cost_model(self.energy, self.macs, self.bytes_moved)

    @property
    def energy(self) -> EnergyConfig:
        """The profiles that the operating point was chosen under; the recipe's where it does not say."""
        chosen = (self.operating_point or {}).get("energy")
        return self.recipe.energy if chosen is None else energy_config(chosen)


def read_edge(folder: Path) -> EdgeSpec:
    """What a device needs of a model's folder.

    Raises:
        UserError: it is no model's folder, or not whole.
    """
    plain = _describe(folder)
    try:
        return EdgeSpec(**_edge_fields(plain, folder))
    except (KeyError, TypeError) as error:
        raise not_whole(folder, error) from error


def read_joules(folder: Path) -> ImageJoules | None:
    """What an image costs by the profiles of the operating point; None where the folder was written before it said so,
    or the operating point is from elsewhere and was chosen by other profiles.

    Raises:
        UserError: it is no model's folder, or not whole.
    """
    plain, point = _describe(folder), folder / OPERATING_POINT
    if "joules" not in plain:
        return None
    try:
        joules = ImageJoules(**plain["joules"])
    except TypeError as error:
        raise not_whole(folder, error) from error
    chosen_by = read_json(point).get("expected", {}).get("joules_source") if point.exists() else None
    return joules if chosen_by in (None, joules.source) else None


def read(folder: Path) -> ModelSpec:
    """All that a model's folder says.

    Raises:
        UserError: it is no model's folder, or not whole.
    """
    plain = _describe(folder)
    try:
        moved = plain.get("bytes_moved")
        return ModelSpec(
            **_edge_fields(plain, folder),
            recipe=Recipe.from_dict(plain["recipe"]),
            class_precision=tuple(plain["class_precision"]),
            macs=Macs(**plain["macs"]),
            bytes_moved=BytesMoved(**moved) if moved else None,
            data_digest=plain["data_digest"],
        )
    except (KeyError, TypeError) as error:
        raise not_whole(folder, error) from error


def not_whole(folder: Path, error: Exception) -> UserError:
    """A folder that lacks something."""
    return UserError(f"{folder} is not a whole model ({error}): train or download it again")


def _describe(folder: Path) -> dict[str, Any]:
    plain = read_json(folder / MODEL)
    if plain.get("format") != FORMAT:
        raise UserError(f"{folder} has model format {plain.get('format')} and this version reads {FORMAT}")
    return plain


def _edge_fields(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    taken = plain["preprocessing"]
    has_point = (folder / OPERATING_POINT).exists()
    return {
        "class_names": tuple(plain["class_names"]),
        "hard_classes": tuple(plain["hard_classes"]),
        "preprocessing": Preprocessing(**{**taken, "mean": tuple(taken["mean"]), "std": tuple(taken["std"])}),
        "operating_point": read_json(folder / OPERATING_POINT) if has_point else None,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        UserError: there is none.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: give a trained model's folder, or train one with jobs.train"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): train or download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: train or download the model again")
    return content
