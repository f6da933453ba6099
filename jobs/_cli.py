"""What every command shares: a recipe as the first word, typed flags over its config, the environment read once."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from meanet.config import Recipe
from meanet.errors import UserError
from meanet.profiles import embed
from meanet.recipes import RECIPES, recipe
from meanet.tracking import store_uri

Flags = TypeVar("Flags")
RecipeFlags = Annotated[Recipe, tyro.conf.arg(name="")]
"""A field of this type offers every field of the recipe as a flag of its own: `--main.epochs 3`."""


@dataclass(frozen=True)
class Environment:
    """What a job takes from its surroundings, read here and nowhere else."""

    tracking_uri: str
    """MLFLOW_TRACKING_URI, or the embedded store."""
    ray_address: str | None
    """RAY_ADDRESS: the cluster to join; None starts a local one."""

    @staticmethod
    def read() -> "Environment":
        """Read the environment, and quieten the libraries that talk over the progress."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        return Environment(store_uri(os.environ.get("MLFLOW_TRACKING_URI")), os.environ.get("RAY_ADDRESS") or None)


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def parse(command: str, flags: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """Flags of a command without a recipe."""
    return tyro.cli(flags, prog=f"python -m jobs.{command}", args=arguments)


def parse_recipe(command: str, flags: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """Flags of `command RECIPE`: `flags` has a field `recipe` whose defaults are the named recipe's.

    Raises:
        UserError: no recipe, or an unknown one; a file of profiles that cannot be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    known = ", ".join(sorted(RECIPES))
    if not words or words[0] in ("-h", "--help"):
        print(
            f"usage: python -m jobs.{command} RECIPE [flags]\n\nrecipes: {known}\n\n"
            f"python -m jobs.{command} RECIPE --help lists the flags, with that recipe's values."
        )
        if words:
            sys.exit(0)
        raise UserError(f"no recipe given: choose one of {known}")
    if words[0].startswith("-"):
        raise UserError(f"the first word is {words[0]!r}: give the recipe first, one of {known}")
    build: Any = flags
    default: Flags = build(recipe=recipe(words[0]))
    parsed = tyro.cli(flags, default=default, prog=f"python -m jobs.{command} {words[0]}", args=words[1:])
    chosen: Any = parsed
    if chosen.recipe.name != words[0]:
        raise UserError(f"--name is {chosen.recipe.name!r}: a recipe's name is its own, {words[0]!r}; drop the flag")
    energy = embed(chosen.recipe.energy)
    whole: Flags = dataclasses.replace(chosen, recipe=dataclasses.replace(chosen.recipe, energy=energy))
    return whole


def commit() -> str:
    """The checkout's commit, `-dirty` where it has changes; `unknown` outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
