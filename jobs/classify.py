"""Ask a running server about a model's test images: `python -m jobs.classify outputs/digits --url http://127.0.0.1:8000`.

Every answer is compared with the exits table under the folder's operating point; the result says, too, which nodes
gave them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import tyro

from jobs import _cli, _server
from jobs.register import read_operating_point
from jobs.train import load_splits
from meanet import artifact
from meanet.errors import UserError, exit_on_user_error
from meanet.evaluation import ExitsTable


@dataclass(frozen=True)
class Flags:
    """Send test images over HTTP and compare the answers with the exits table."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's or a study's folder: it holds model/, exits.parquet and operating_point.json."""
    url: str = "http://127.0.0.1:8000"
    """The server's."""
    images: int | None = None
    """How many of the test split, its first ones; all if not given."""
    patience_s: float = 30.0
    """How long images that were answered without the cloud though they wanted it are sent again, s."""
    max_degraded: float = 0.05
    """Share of images that may have been answered so all the same, 0..1."""
    json: bool = False
    """Print the result as JSON."""


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    _cli.Environment.read()
    flags = _cli.parse("classify", Flags)
    if flags.images is not None and flags.images < 1:
        raise UserError(f"--images is {flags.images}: it must be 1 or more")
    if not 0 <= flags.patience_s < math.inf:
        raise UserError(f"--patience-s is {flags.patience_s}: it must be 0 or more seconds")
    model = artifact.load(flags.folder / "model")
    table = ExitsTable.read(flags.folder / "exits.parquet")
    point = read_operating_point(flags.folder / "operating_point.json")
    try:
        result = _server.classify_all(
            flags.url, load_splits(model.recipe), table, point, flags.images, patience_s=flags.patience_s
        )
    except httpx.HTTPError as error:
        raise UserError(f"{flags.url} does not answer ({error}): start the server, or correct --url") from error
    if result["mismatches"]:
        raise UserError(f"{result['mismatches']} answers over HTTP differ from the exits table: {result['examples']}")
    if result["degraded"] > flags.max_degraded * result["images"]:
        raise UserError(
            f"{result['degraded']} of {result['images']} images went without the cloud, however often they were sent "
            f"within {flags.patience_s:g} s: {result['reasons']}"
        )
    if flags.json:
        print(json.dumps(result))
        return
    print(f"{result['images']} test images: accuracy {result['accuracy']:.2%}, exits {result['exits']}")
    print(f"{result['degraded']} degraded, {result['asked_again']} sent again; p50 {result['p50_ms']} ms")
    for place, nodes in result["nodes"].items():
        print(f"{place}: " + ", ".join(f"{count} answers of node {node}" for node, count in nodes.items()))


if __name__ == "__main__":
    main()
