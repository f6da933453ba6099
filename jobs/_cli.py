"""What every command shares: a recipe as the first word, typed flags over its config, the environment read once."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from meanet.config import Recipe
from meanet.errors import UserError
from meanet.profile_files import embed
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
    dashboard: str | None = None
    """RAY_DASHBOARD_ADDRESS or RAY_API_SERVER_ADDRESS, Ray's names: where Serve is deployed and jobs are submitted."""
    has_store: bool = False
    """Whether MLFLOW_TRACKING_URI is set."""

    @staticmethod
    def read() -> "Environment":
        """Read the environment, and quieten the libraries that talk over the progress."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        store = os.environ.get("MLFLOW_TRACKING_URI")
        dashboard = os.environ.get("RAY_DASHBOARD_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS") or None
        return Environment(store_uri(store), os.environ.get("RAY_ADDRESS") or None, dashboard, bool(store))


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # results alone belong there
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed study loses no more of Tune's own record
}


def parse(command: str, flags: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """Flags of a command without a recipe."""
    return tyro.cli(flags, prog=f"python -m jobs.{command}", args=arguments)


def parse_recipe(
    command: str,
    flags: type[Flags],
    arguments: Sequence[str] | None = None,
    before: Mapping[str, Collection[str]] | None = None,
) -> Flags:
    """Flags of `command RECIPE`: `flags` has a field `recipe` whose defaults are the named recipe's.

    Args:
        command: the job's name.
        flags: what it takes.
        arguments: the words after the command; the process's own if None.
        before: words that stand before the recipe: field of `flags` -> what it may be.

    Raises:
        UserError: one of the first words is missing or unknown; a file of profiles that cannot be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = {**(before or {}), "recipe": RECIPES}
    names = " ".join(name.upper() for name in asked)
    if not words or words[0] in ("-h", "--help"):
        lists = "\n\n".join(f"{name}: {', '.join(sorted(known))}" for name, known in asked.items())
        print(
            f"usage: python -m jobs.{command} {names} [flags]\n\n{lists}\n\n"
            f"python -m jobs.{command} {names} --help lists the flags, with that recipe's values."
        )
        if words:
            sys.exit(0)
    first: dict[str, Any] = {}
    for name, known in asked.items():
        first[name] = _first_word(words[len(first) :], name, known)
    build: Any = flags
    shown = " ".join(first.values())
    first["recipe"] = recipe(first["recipe"])
    default: Flags = build(**first)
    parsed = tyro.cli(flags, default=default, prog=f"python -m jobs.{command} {shown}", args=words[len(first) :])
    chosen: Any = parsed
    own = first["recipe"].name
    if chosen.recipe.name != own:
        raise UserError(f"--name is {chosen.recipe.name!r}: a recipe's name is its own, {own!r}; drop the flag")
    energy = embed(chosen.recipe.energy)
    whole: Flags = dataclasses.replace(chosen, recipe=dataclasses.replace(chosen.recipe, energy=energy))
    return whole


def _first_word(words: Sequence[str], name: str, known: Collection[str]) -> str:
    choices = ", ".join(sorted(known))
    if not words:
        raise UserError(f"no {name} given: choose one of {choices}")
    if words[0].startswith("-"):
        raise UserError(f"{words[0]!r} stands where the {name} belongs: give the {name} first, one of {choices}")
    if words[0] not in known:
        raise UserError(f"unknown {name} {words[0]!r}: choose one of {choices}")
    return words[0]


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
