"""A trained model as a folder: what crosses from training to evaluation, registry and server.

    edge.safetensors     main block and extension path
    cloud.safetensors    cloud network
    model.json           recipe, class split, class names, preprocessing, MACs and bytes moved, digest of the data
    operating_point.json once one was chosen: gate, thresholds, hard classes in use, what it was chosen by

Everything together, so that the parts cannot drift apart. Weights are safetensors and the rest is JSON: loading a model
executes nobody's pickle.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meanet.config import EnergyConfig, Recipe, energy_config
from meanet.data import Splits
from meanet.energy import BytesMoved, CostModel, Macs, cost_model
from meanet.errors import UserError
from meanet.loop import State
from meanet.models import bytes_moved_of, macs_of
from meanet.preprocessing import Preprocessing
from meanet.routing import Policy
from meanet.storage import write_text
from meanet.training import Networks, build_networks, preprocessing_of

FORMAT = 1
EDGE, CLOUD, MODEL, OPERATING_POINT = "edge.safetensors", "cloud.safetensors", "model.json", "operating_point.json"


@dataclass(frozen=True)
class TrainedModel:
    """Networks in evaluation mode and all that belongs to them."""

    recipe: Recipe
    class_names: tuple[str, ...]
    hard_classes: tuple[int, ...]
    """All H that the extension was trained on, hardest first."""
    class_precision: tuple[float, ...]
    """Validation precision of the main exit, by class id."""
    preprocessing: Preprocessing
    macs: Macs
    bytes_moved: BytesMoved
    data_digest: str
    """Of the table that it was trained on."""
    networks: Networks
    operating_point: dict[str, Any] | None = None
    """DESIGN's operating point; None until one was chosen."""

    @property
    def costs(self) -> CostModel:
        """Joules by `energy`'s profiles."""
        return cost_model(self.energy, self.macs, self.bytes_moved)

    @property
    def energy(self) -> EnergyConfig:
        """The profiles that the operating point was chosen under; the recipe's where it does not say."""
        chosen = (self.operating_point or {}).get("energy")
        return self.recipe.energy if chosen is None else energy_config(chosen)

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

    def with_operating_point(self, point: dict[str, Any]) -> "TrainedModel":
        """The same weights under another operating point."""
        return replace(self, operating_point=point)


def from_state(state: State, splits: Splits) -> TrainedModel:
    """The model of a finished training run over these splits."""
    assert state.finished, "an unfinished run has no model"
    recipe = Recipe.from_dict(state.recipe)
    preprocessing = preprocessing_of(recipe, splits)
    networks = build_networks(recipe, preprocessing.image_shape, splits.table.num_classes)
    for name, weights in state.weights.items():
        networks.trained[name].load_state_dict(weights)
    return TrainedModel(
        recipe=recipe,
        class_names=splits.table.class_names,
        hard_classes=tuple(state.hard_classes),
        class_precision=tuple(state.class_precision),
        preprocessing=preprocessing,
        macs=macs_of(networks.meanet, networks.cloud, preprocessing.image_shape),
        bytes_moved=bytes_moved_of(networks.meanet, preprocessing.image_shape),
        data_digest=splits.table.digest,
        networks=_frozen(networks),
    )


def save(model: TrainedModel, folder: Path) -> Path:
    """Write the folder; `model.json` comes last, so that a folder that has it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).unlink(missing_ok=True)
    save_file(_contiguous(model.networks.meanet.state_dict()), folder / EDGE)
    save_file(_contiguous(model.networks.cloud.state_dict()), folder / CLOUD)
    if model.operating_point is None:
        (folder / OPERATING_POINT).unlink(missing_ok=True)
    else:
        write_text(json.dumps(model.operating_point, indent=2), folder / OPERATING_POINT)
    description = {
        "format": FORMAT,
        "recipe": model.recipe.to_dict(),
        "class_names": model.class_names,
        "hard_classes": model.hard_classes,
        "class_precision": model.class_precision,
        "preprocessing": asdict(model.preprocessing),
        "macs": asdict(model.macs),
        "bytes_moved": asdict(model.bytes_moved),
        "data_digest": model.data_digest,
    }
    write_text(json.dumps(description, indent=2), folder / MODEL)
    return folder


def load(folder: Path) -> TrainedModel:
    """Read the folder.

    Raises:
        UserError: it is no model's folder, or not whole.
    """
    description = _read_json(folder / MODEL)
    if description.get("format") != FORMAT:
        raise UserError(f"{folder} has model format {description.get('format')} and this version reads {FORMAT}")
    try:
        recipe = Recipe.from_dict(description["recipe"])
        plain = description["preprocessing"]
        preprocessing = Preprocessing(**{**plain, "mean": tuple(plain["mean"]), "std": tuple(plain["std"])})
        networks = build_networks(recipe, preprocessing.image_shape, len(description["class_names"]))
        networks.meanet.load_state_dict(load_file(folder / EDGE))
        networks.cloud.load_state_dict(load_file(folder / CLOUD))
        moved = description.get("bytes_moved")  # not in models saved before there were such profiles
        has_point = (folder / OPERATING_POINT).exists()
        return TrainedModel(
            recipe=recipe,
            class_names=tuple(description["class_names"]),
            hard_classes=tuple(description["hard_classes"]),
            class_precision=tuple(description["class_precision"]),
            preprocessing=preprocessing,
            macs=Macs(**description["macs"]),
            bytes_moved=BytesMoved(**moved) if moved else bytes_moved_of(networks.meanet, preprocessing.image_shape),
            data_digest=description["data_digest"],
            networks=_frozen(networks),
            operating_point=_read_json(folder / OPERATING_POINT) if has_point else None,
        )
    except UserError:
        raise
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole model ({error}): train or download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
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


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _frozen(networks: Networks) -> Networks:
    for module in (networks.meanet, networks.cloud):
        module.eval().requires_grad_(False)
    return networks
