"""A trained model as a folder: what crosses from training to evaluation, registry and server.

    edge.safetensors     main block and extension path
    cloud.safetensors    cloud network
    model.json           recipe, class split, class names, preprocessing, MACs and bytes moved, digest of the data
    operating_point.json once one was chosen: gate, thresholds, hard classes in use, what it was chosen by
    engines.json         once its networks were exported, with their ONNX files (`meanet.engines`)

Everything together, so that the parts cannot drift apart. Weights are safetensors and the rest is JSON: loading a model
executes nobody's pickle.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meanet import model_spec
from meanet.config import Recipe
from meanet.data import Splits
from meanet.energy import BytesMoved
from meanet.engines import EXPORTED
from meanet.errors import UserError
from meanet.loop import State
from meanet.model_spec import CLOUD, EDGE, FORMAT, MODEL, OPERATING_POINT, ModelSpec
from meanet.models import bytes_moved_of, macs_of
from meanet.storage import write_text
from meanet.training import Networks, build_networks, preprocessing_of


@dataclass(frozen=True, kw_only=True)
class TrainedModel(ModelSpec):
    """Networks in evaluation mode and all that belongs to them."""

    bytes_moved: BytesMoved
    networks: Networks
    """With their weights."""


def from_state(state: State, splits: Splits, recipe: Recipe | None = None) -> TrainedModel:
    """The model of a finished training run over these splits; `recipe` where it is at hand (to rebuild it from the
    state takes pydantic)."""
    assert state.finished, "an unfinished run has no model"
    recipe = recipe or Recipe.from_dict(state.recipe)
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
    for name in (MODEL, EXPORTED):  # what was exported was of other weights
        (folder / name).unlink(missing_ok=True)
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
        "joules": asdict(model.costs.image_joules),
    }
    write_text(json.dumps(description, indent=2), folder / MODEL)
    return folder


def load(folder: Path) -> TrainedModel:
    """Read the folder.

    Raises:
        UserError: it is no model's folder, or not whole.
    """
    spec = model_spec.read(folder)
    shape = spec.preprocessing.image_shape
    try:
        networks = build_networks(spec.recipe, shape, len(spec.class_names))
        networks.meanet.load_state_dict(load_file(folder / EDGE))
        networks.cloud.load_state_dict(load_file(folder / CLOUD))
    except UserError:
        raise
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise model_spec.not_whole(folder, error) from error
    known = {field.name: getattr(spec, field.name) for field in fields(spec)}
    known["bytes_moved"] = spec.bytes_moved or bytes_moved_of(networks.meanet, shape)
    return TrainedModel(**known, networks=_frozen(networks))


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _frozen(networks: Networks) -> Networks:
    for module in (networks.meanet, networks.cloud):
        module.eval().requires_grad_(False)
    return networks
