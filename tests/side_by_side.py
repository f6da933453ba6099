"""Trains the same recipe with its phases side by side and in a row, on a local Ray of four logical CPUs: not a test.

    python tests/side_by_side.py FOLDER

Leaves states and events there, as `parallel.pt` and `row.pt`.
"""

import dataclasses
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from meanet import cluster, data
from meanet.loop import PHASES
from meanet.recipes import digits

EPOCHS = 6


def main() -> None:
    folder, recipe = Path(sys.argv[1]), digits()
    for phase in PHASES:
        shorter = dataclasses.replace(getattr(recipe, phase), epochs=EPOCHS)
        recipe = dataclasses.replace(recipe, **{phase: shorter})  # type: ignore[arg-type]
    splits = data.divide(data.load(recipe.data), recipe.data, recipe.seed)
    with cluster.ray_cluster(None, num_cpus=4):
        for name, parallel in (("parallel", True), ("row", False)):
            events: list[dict[str, Any]] = []
            for _ in range(2):  # the second time there is nothing left to train
                state = cluster.train(
                    recipe,
                    splits,
                    storage=str(folder / name),
                    name="run",
                    num_workers=1,
                    on_event=events.append,
                    parallel=parallel,
                )
            torch.save({"state": asdict(state), "events": events}, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
