"""What a recipe's networks cost: `python -m jobs.describe cifar100_resnet32_b` (no data is read)."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from jobs import _cli
from meanet.config import Recipe
from meanet.energy import BytesMoved, CostModel, Macs, cost_model, tail_joules
from meanet.errors import UserError, exit_on_user_error
from meanet.models.costs import BlockCost, block_costs
from meanet.recipes import nominal
from meanet.training import build_networks


@dataclass(frozen=True)
class Flags:
    """MACs, parameters, bytes moved and training memory by block, and joules and seconds by exit."""

    recipe: _cli.RecipeFlags
    """The recipe's own fields."""
    image_shape: tuple[int, int, int] | None = None
    """Channels, height and width; those of the data set that the recipe is named after if not given."""
    num_classes: int | None = None
    """Classes; those of that data set if not given."""
    image_bytes: int | None = None
    """Size of an upload; the raw pixels if not given."""
    json: bool = False
    """Print the result as JSON."""


def describe(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int, image_bytes: int) -> dict[str, Any]:
    """Blocks and exits of a recipe, as `--json` prints them.

    Raises:
        UserError: the networks do not fit the images, or a profile does not exist.
    """
    networks = build_networks(recipe, image_shape, num_classes)
    blocks = block_costs(networks.meanet, networks.cloud, image_shape, recipe.precision, recipe.main.batch_size)
    moved = BytesMoved(**{name: blocks[name].moved_bytes for name in ("main", "adaptive", "extension")})
    costs = cost_model(recipe.energy, Macs(**{name: block.macs for name, block in blocks.items()}), moved)
    return {
        "recipe": recipe.name,
        "image_shape": image_shape,
        "num_classes": num_classes,
        "num_hard_classes": recipe.split.size(num_classes),
        "batch_size": recipe.main.batch_size,
        "precision": recipe.precision,
        "image_bytes": image_bytes,
        "blocks": {name: asdict(block) for name, block in blocks.items()},
        "exits": _exits(costs, image_bytes),
        "joules_source": costs.tag,
        "tail": {"counted": costs.tail, "joules": tail_joules(costs.link, costs.tail, costs.uploads_per_second)},
        "seconds": _seconds(costs, image_bytes),
        "seconds_source": costs.latency_source,
        "sources": {"device": dict(costs.device.sources), "link": dict(costs.link.sources)},
    }


def _exits(costs: CostModel, image_bytes: int) -> dict[str, dict[str, float]]:
    """Joules of the device, an image, that each exit costs."""
    upload = float(costs.upload_joules(image_bytes))
    main, further = costs.main_joules, costs.extension_joules
    return {
        "main": {"edge_compute": main, "upload": 0.0},
        "extension": {"edge_compute": main + further, "upload": 0.0},
        "cloud": {"edge_compute": main, "upload": upload},
        "cloud_only": {"edge_compute": 0.0, "upload": upload},
    }


def _seconds(costs: CostModel, image_bytes: int) -> dict[str, float]:
    """From the image to the answer, by exit, with no queue anywhere."""
    main, cloud = costs.main_seconds, float(costs.cloud_seconds(image_bytes))
    return {"main": main, "extension": main + costs.extension_seconds, "cloud": main + cloud, "cloud_only": cloud}


def _show(found: dict[str, Any]) -> None:
    print(f"{found['recipe']}: images {tuple(found['image_shape'])}, {found['num_classes']} classes, ", end="")
    print(f"{found['num_hard_classes']} of them hard, {found['precision']}\n")
    training = f"training, batch {found['batch_size']}"
    print(f"{'block':<12}{'MACs':>12}{'parameters':>12}{'moved':>15}{'activations':>16}{training:>22}")
    blocks = {name: BlockCost(**block) for name, block in found["blocks"].items()}
    for name, block in blocks.items():
        moved, kept = block.moved_bytes / 2**10, block.activation_bytes / 2**10
        print(
            f"{name:<12}{block.macs / 1e6:>10.2f} M{block.params / 1e6:>10.4f} M"
            f"{moved:>9.0f} KiB/im{kept:>10.0f} KiB/im{block.training_bytes / 2**20:>18.1f} MiB"
        )
    print(f"\n{'exit':<12}{'compute':>14}{'upload':>14}{'sum':>14}{'ms':>12}   µJ an image, {found['joules_source']}")
    for name, joules in found["exits"].items():
        compute, upload = (1e6 * joules[key] for key in ("edge_compute", "upload"))
        milliseconds = 1e3 * found["seconds"][name]
        print(f"{name:<12}{compute:>14.2f}{upload:>14.2f}{compute + upload:>14.2f}{milliseconds:>12.3f}")
    _show_sources(found)


def _show_sources(found: dict[str, Any]) -> None:
    tail = found["tail"]
    print(f"\ntime: {found['seconds_source']}", end="; ")
    print(f"the radio's tail: {tail['counted']}, {1e6 * tail['joules']:.2f} µJ an upload")
    print(f"an upload is {found['image_bytes']} bytes; another size: --image-bytes")
    for what in ("device", "link"):
        for source in dict.fromkeys(found["sources"][what].values()):
            print(f"{what}: {source}")


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse_recipe("describe", Flags)
    shape, classes = nominal(flags.recipe.name)
    shape = flags.image_shape or shape
    classes = flags.num_classes or classes
    size = flags.image_bytes if flags.image_bytes is not None else shape[0] * shape[1] * shape[2]
    if min(*shape, classes, size + 1) < 1:
        raise UserError(f"images {shape}, {classes} classes, {size} bytes: none of these may be negative or 0")
    found = describe(flags.recipe, shape, classes, size)
    if flags.json:
        print(json.dumps(found))
    else:
        _show(found)


if __name__ == "__main__":
    main()
