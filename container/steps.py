"""The Dockerfile's steps in a clean environment, where no Docker engine runs: `make image-steps`.

    python container/steps.py --build-arg TORCH=cuda

Each stage is a root folder of its own: Debian's minimal system by debootstrap, with this interpreter's Python in
/usr/local, in place of the base image. RUN, COPY, ENV, ARG, WORKDIR and USER act on it, each RUN by chroot in
namespaces of its own. At the end the image's entrypoint starts a head, as the image's user and without a network, and
the image's health check must find it healthy. Needs root on Linux, debootstrap, and a network for the packages.
"""

import argparse
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import namespaces
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from namespaces import Place

CONTEXT = Path(__file__).parent.parent
_BASE = re.compile(r"python:(?P<python>\d+\.\d+)-slim-(?P<debian>\w+)$")
_TOKEN = "/run/secrets/ray-token"  # noqa: S105
_HEALTHY_WITHIN_S = 180


class StepError(Exception):
    """A step of the Dockerfile failed, or cannot be run here; the message says which."""


@dataclass
class Stage:
    """One FROM: its root folder, and what its instructions have set."""

    root: Path
    name: str
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """$NAME and ${NAME} by ENV and ARG."""
        known = self.args | self.env
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)

    def inside(self, path: str) -> Path:
        """Where a path of the stage lies on this machine; relative ones from WORKDIR."""
        return self.root / os.path.join(self.workdir, path).lstrip("/")

    def place(self, user: str | None = None) -> Place:
        """Where this stage's commands run."""
        return Place(self.root, self.env | {"HOME": self._home(user or self.user)}, self.workdir, user or self.user)

    def _home(self, user: str) -> str:
        lines = (self.root / "etc/passwd").read_text().splitlines()
        homes = {line.split(":")[2]: line.split(":")[5] for line in lines}
        return homes.get(user.partition(":")[0], "/")


class Build:
    """Runs the instructions one after the other.

    Args:
        folder: where roots are made.
        build_args: as `docker build --build-arg` has them.
        say: gets one line a step.
    """

    def __init__(self, folder: Path, build_args: dict[str, str], say: Callable[[str], None]) -> None:
        self.folder, self.build_args, self.say = folder, build_args, say
        self.stages: list[Stage] = []
        self.settings: dict[str, Path] = {}

    def run(self, dockerfile: Path) -> Stage:
        """The last stage, when every step has been run.

        Raises:
            StepError: a step failed, or is one that this script does not know.
        """
        with tempfile.TemporaryDirectory() as scratch:  # the parser writes beside what it reads
            parser = DockerfileParser(path=scratch)
            parser.content = dockerfile.read_text()
            steps: list[dict[str, Any]] = parser.structure
        declared = {value.split("=")[0] for value in (s["value"] for s in steps if s["instruction"] == "ARG")}
        if unknown := set(self.build_args) - declared:
            raise StepError(f"--build-arg {', '.join(sorted(unknown))}: the Dockerfile has only {sorted(declared)}")
        with namespaces.pip_settings(self.folder) as self.settings:
            for step in steps:
                self._step(step["startline"] + 1, step["instruction"], step["value"])
        return self.stages[-1]

    def _step(self, line: int, instruction: str, value: str) -> None:
        if instruction == "COMMENT":
            return
        act = getattr(self, f"_{instruction.lower()}", None)
        if act is None:
            raise StepError(f"line {line}: {instruction} is not known to this script")
        self.say(f"{line:4} {instruction} {value[:100]}")
        started = time.monotonic()
        try:
            act(value)
        except (StepError, namespaces.CannotError, subprocess.CalledProcessError, OSError) as error:
            raise StepError(f"line {line}: {instruction} {value[:60]} failed: {error}") from error
        if instruction in ("FROM", "RUN"):
            self.say(f"     {time.monotonic() - started:.0f} s")

    @property
    def _stage(self) -> Stage:
        return self.stages[-1]

    def _from(self, value: str) -> None:
        image, _, name = value.partition(" AS ")
        root = self.folder / f"stage{len(self.stages)}"
        base = next((stage.root for stage in self.stages if stage.name == image), None) or self._base(image)
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base), str(root)], check=True)
        self.stages.append(Stage(root, name or image))

    def _base(self, image: str) -> Path:
        named = _BASE.match(image)
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if not named or named["python"] != here:
            raise StepError(f"{image} cannot be stood in for: this script makes python:{here}-slim-DEBIAN")
        root = self.folder / "base"
        if not root.exists():
            namespaces.make_base(root, named["debian"])
        return root

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self._stage.args[name] = self.build_args.get(name, self._stage.expand(default))

    def _env(self, value: str) -> None:
        for name, text in re.findall(r'(\w+)=("[^"]*"|\S+)', value):
            self._stage.env[name] = self._stage.expand(text.strip('"'))

    def _workdir(self, value: str) -> None:
        stage = self._stage
        stage.workdir = os.path.join(stage.workdir, stage.expand(value))
        stage.inside("").mkdir(parents=True, exist_ok=True)

    def _user(self, value: str) -> None:
        self._stage.user = self._stage.expand(value)

    def _run(self, value: str) -> None:
        stage = self._stage
        place = stage.place()
        place.env = stage.args | place.env  # an ARG is seen by RUN, and is no part of the image
        namespaces.run(place, ["/bin/sh", "-c", value], self.settings)

    def _copy(self, value: str) -> None:
        stage, words = self._stage, value.split()
        flags = dict(word[2:].split("=") if "=" in word else (word[2:], "") for word in words if word.startswith("--"))
        *sources, target = (stage.expand(word) for word in words if not word.startswith("--"))
        if unknown := set(flags) - {"from", "chmod"}:
            raise StepError(f"COPY --{', --'.join(sorted(unknown))} is not known to this script")
        origin = next((s.root for s in self.stages if s.name == flags.get("from")), None) or self._context()
        where = stage.inside(target)
        for source in sources:
            found = origin / source.lstrip("/")
            if found.is_dir():
                shutil.copytree(found, where, symlinks=True, dirs_exist_ok=True)
                continue
            path = where / found.name if target.endswith(("/", ".")) or where.is_dir() else where
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, path)
            if "chmod" in flags:
                path.chmod(int(flags["chmod"], 8))

    def _context(self) -> Path:
        """What .dockerignore lets through, and nothing else."""
        sent = self.folder / "context"
        if not sent.exists():
            patterns = (CONTEXT / ".dockerignore").read_text().split()
            for name in exclude_paths(str(CONTEXT), patterns):
                source, target = CONTEXT / name, sent / name
                if source.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, target)
        return sent

    def _entrypoint(self, value: str) -> None:
        self._stage.entrypoint = re.findall(r'"([^"]*)"', value)

    def _healthcheck(self, value: str) -> None:
        self._stage.health = re.findall(r'"([^"]*)"', value.partition("CMD")[2])

    def _nothing(self, value: str) -> None:
        """CMD and EXPOSE: told to an engine, and no step."""

    _cmd = _expose = _nothing


def check(stage: Stage, folder: Path, say: Callable[[str], None]) -> None:
    """A head by the image's entrypoint, in namespaces without a network, and its health check.

    Raises:
        StepError: it starts without a token, is not found healthy in time, or answers those who have no token.
    """
    if stage.user.partition(":")[0] in ("0", "root"):
        raise StepError("the image's user is root")
    refused = namespaces.outcome(stage.place(), [*stage.entrypoint, "head"])
    if refused.returncode == 0 or "token" not in refused.stderr:
        raise StepError(f"a head without a token was not refused: {refused.stderr[-300:]}")
    say(f"without a token: {refused.stderr.strip()[:110]}...")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.chown(token, *(int(part) for part in stage.user.split(":")))
    log = folder / "head.log"
    with namespaces.started(stage.place(), [*stage.entrypoint, "head", "--num-cpus=1"], {_TOKEN: token}, log) as inside:
        started = time.monotonic()
        while inside(stage.health, {}).returncode:
            if time.monotonic() - started > _HEALTHY_WITHIN_S:
                raise StepError(f"the head is not healthy after {_HEALTHY_WITHIN_S} s:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        say(f"head healthy after {time.monotonic() - started:.0f} s, as user {stage.user}")
        listing = ["ray", "list", "nodes", "--address", "http://127.0.0.1:8265"]
        if inside(listing, {"RAY_AUTH_TOKEN": "no-such-token"}).returncode == 0:
            raise StepError("the head answers one who has another token")
        with_token = inside(listing, {"RAY_AUTH_TOKEN_PATH": _TOKEN})
        if with_token.returncode or "ALIVE" not in with_token.stdout:
            raise StepError(f"the head does not answer one who has its token: {with_token.stderr[-300:]}")
        say("its dashboard answers who has the token, and no other")
        if token.read_text() in log.read_text():
            raise StepError("the token stands in the head's log")
    described = namespaces.outcome(stage.place(), [*stage.entrypoint, "job", "describe", "digits", "--json"])
    if described.returncode or '"blocks"' not in described.stdout:
        raise StepError(f"job describe digits failed: {described.stderr[-500:]}")
    say("job describe digits: answered")


def main() -> None:
    """Build, check, and say what was not possible."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    parser.add_argument(
        "--folder", type=Path, help="where to make the roots, and to leave them (default: a temporary one)"
    )
    flags = parser.parse_args()
    build_args = dict(item.split("=", 1) for item in flags.build_arg)
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="meanet-image-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        namespaces.need()
        stage = Build(folder, build_args, lambda line: print(line, flush=True)).run(CONTEXT / "Dockerfile")
        print(f"image: {namespaces.size_mb(stage.root):.0f} MB unpacked", flush=True)
        check(stage, folder, lambda line: print(line, flush=True))
    except (StepError, namespaces.CannotError) as error:
        sys.exit(f"image-steps: {error}")
    finally:
        if not flags.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"image-steps: every step ran in {time.monotonic() - started:.0f} s\n"
        "not as in an engine: the base image is stood in for by debootstrap and this Python; no layers are made, no "
        "caches kept, no limits on memory or processes set"
    )


if __name__ == "__main__":
    main()
