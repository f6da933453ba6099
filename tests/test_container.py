"""The image as far as it can be known without building it: Dockerfile, what is sent, the entrypoint's roles."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

from serve_apps.ingress import NODES

DOCKERFILE = ROOT / "Dockerfile"
ENTRYPOINT = ROOT / "container" / "entrypoint.sh"


def hadolint(path: Path) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).parent / "hadolint"
    command = [str(program) if program.exists() else "hadolint", "--no-color", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def steps(tmp_path: Path) -> list[dict[str, Any]]:
    parser = DockerfileParser(path=str(tmp_path))
    parser.content = DOCKERFILE.read_text()
    found: list[dict[str, Any]] = parser.structure
    return found


def values(steps: list[dict[str, Any]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def test_hadolint_finds_nothing() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11-slim-bookworm\n", "python\n", "DL3006"),
        ("WORKDIR /app", "WORKDIR app", "DL3000"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("COPY jobs jobs", "ADD jobs jobs", "DL3020"),
    ],
)
def test_hadolint_finds_what_is_planted(old: str, new: str, rule: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    assert rule in hadolint(tmp_path / "Dockerfile").stdout


def test_the_image_is_not_root_and_can_be_asked_for_its_health(steps: list[dict[str, Any]]) -> None:
    assert values(steps, "USER") == ["1000:1000"]
    assert values(steps, "HEALTHCHECK")[0].endswith('CMD ["meanet", "health"]')
    assert values(steps, "ENTRYPOINT") == ['["meanet"]']
    assert any(value.endswith("container/entrypoint.sh /usr/local/bin/meanet") for value in values(steps, "COPY"))


def test_the_environment_has_token_authentication_and_no_secret(steps: list[dict[str, Any]]) -> None:
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(values(steps, "ENV"))))
    assert environment["RAY_AUTH_MODE"] == "token"
    named = [*environment, *(value.partition("=")[0] for value in values(steps, "ARG"))]
    assert not [name for name in named if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]


def test_the_environment_and_the_page_have_what_every_node_needs_to_serve(steps: list[dict[str, Any]]) -> None:
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(values(steps, "ENV"))))
    ours = ("RAY_SERVE_", "RAY_worker_")
    assert {name: value for name, value in environment.items() if name.startswith(ours)} == NODES
    exports = re.findall(r"^    export (.*?)(?:  .*)?$", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE)
    named = dict(re.findall(r"(\w+)=(\S+)", " ".join(exports)))
    assert {name: value for name, value in named.items() if name.startswith(ours)} == NODES


def test_the_context_is_the_code_and_its_pins_alone() -> None:
    sent = exclude_paths(str(ROOT), (ROOT / ".dockerignore").read_text().split())
    files = {name for name in sent if (ROOT / name).is_file()}
    tops = {name.partition("/")[0] for name in files}
    assert tops - {"Dockerfile", ".dockerignore"} == {
        *("platform", "jobs", "serve_apps", "tune_spaces", "container"),
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE"),
    }
    assert {name for name in files if name.startswith("container")} == {"container/entrypoint.sh"}
    assert not [name for name in files if "__pycache__" in name or "kuberay" in name]


def test_everything_copied_is_sent(steps: list[dict[str, Any]]) -> None:
    sent = set(exclude_paths(str(ROOT), (ROOT / ".dockerignore").read_text().split()))
    for value in values(steps, "COPY"):
        if "--from=" not in value:
            *sources, _ = (word for word in value.split() if not word.startswith("--"))
            assert set(sources) <= sent


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """pip, ray, python and wget that only say how they were called; wget fails for what is in `down`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    say = '#!/bin/sh\necho "$(basename "$0") $* [mode=${RAY_AUTH_MODE-} token=${RAY_AUTH_TOKEN_PATH-}]"\n'
    for name in ("pip", "ray", "python"):
        (folder / name).write_text(say)
    (folder / "wget").write_text(f'#!/bin/sh\nfor last; do :; done\n! grep -qxF "${{last##*/}}" {tmp_path}/down\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    (tmp_path / "down").touch()
    return folder


class Container:
    """The entrypoint with the stand-ins on its path and the image's environment."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder = folder
        path = f"{programs}{os.pathsep}{os.defpath}"
        self.env = {"PATH": path, "TMPDIR": str(folder), "RAY_AUTH_MODE": "token"}

    def __call__(self, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        command = ["/bin/sh", str(ENTRYPOINT), *words]
        return subprocess.run(command, env=self.env | env, capture_output=True, text=True, check=False)

    def token(self, mode: int = 0o600, text: str = "a-token") -> str:
        path = self.folder / "ray-token"
        path.write_text(text)
        path.chmod(mode)
        return str(path)


@pytest.fixture
def container(programs: Path, tmp_path: Path) -> Container:
    return Container(programs, tmp_path)


def test_head_and_worker_start_ray_with_the_token(container: Container) -> None:
    token = container.token()
    head = container("head", "--num-cpus", "0", RAY_AUTH_TOKEN_PATH=token)
    assert head.stdout.startswith("ray start --head --block --port=6379 --dashboard-host=0.0.0.0 --num-cpus 0 ")
    assert f"[mode=token token={token}]" in head.stdout
    edge = '{"edge": 1}'
    worker = container("worker", "--resources", edge, RAY_AUTH_TOKEN_PATH=token, RAY_ADDRESS="head:6379")
    assert worker.stdout.startswith(f"ray start --block --address=head:6379 --resources {edge} ")


def test_a_token_in_the_environment_does_too(container: Container) -> None:
    done = container("head", RAY_AUTH_TOKEN="a-token")
    assert done.returncode == 0
    assert "a-token" not in done.stdout + done.stderr


@pytest.mark.parametrize("role", [("head",), ("worker",), ("serve",), ("job", "train", "digits")])
def test_no_token_no_cluster(role: tuple[str, ...], container: Container) -> None:
    done = container(*role, RAY_ADDRESS="head:6379")
    assert (done.returncode, done.stdout) == (64, "")
    assert "no token in /run/secrets/ray-token" in done.stderr


@pytest.mark.parametrize(("mode", "text", "says"), [(0o644, "a", "others can read"), (0o600, "", "no token in")])
def test_a_token_that_is_none_is_refused(mode: int, text: str, says: str, container: Container) -> None:
    done = container("head", RAY_AUTH_TOKEN_PATH=container.token(mode, text))
    assert done.returncode == 64
    assert says in done.stderr


def test_authentication_cannot_be_turned_off(container: Container) -> None:
    done = container("head", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="a-token")
    assert done.returncode == 64
    assert "RAY_AUTH_MODE is 'disabled'" in done.stderr


def test_a_worker_must_know_its_head(container: Container) -> None:
    done = container("worker", RAY_AUTH_TOKEN_PATH=container.token())
    assert (done.returncode, "RAY_ADDRESS=HOST:6379" in done.stderr) == (64, True)


def test_server_and_job_alone_leave_the_token_to_the_local_ray(container: Container) -> None:
    assert container("serve", "--version", "3").stdout == (
        "python -m serve_apps --host 0.0.0.0 --version 3 [mode= token=]\n"
    )
    assert container("job", "train", "digits", "--seed", "1").stdout == (
        "python -m jobs.train digits --seed 1 [mode= token=]\n"
    )


def test_a_job_on_a_cluster_has_its_token(container: Container) -> None:
    token = container.token()
    done = container("job", "describe", "digits", RAY_ADDRESS="head:6379", RAY_AUTH_TOKEN_PATH=token)
    assert done.stdout == f"python -m jobs.describe digits [mode=token token={token}]\n"


def test_any_other_word_is_a_command(container: Container) -> None:
    assert container("echo", "a  b").stdout == "a  b\n"
    assert container("job").returncode == 64
    assert container().returncode == 64


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("head",), ["gcs_healthz", "local_raylet_healthz"]),
        (("worker",), ["local_raylet_healthz"]),
        (("serve",), ["ready"]),
        (("job", "describe"), []),
    ],
)
def test_health_is_asked_by_role(words: tuple[str, ...], asked: list[str], container: Container) -> None:
    container(*words, RAY_AUTH_TOKEN="a-token", RAY_ADDRESS="head:6379")
    assert container("health").returncode == 0
    for endpoint in ["gcs_healthz", "local_raylet_healthz", "ready"]:
        (container.folder / "down").write_text(f"{endpoint}\n")
        assert (container("health").returncode != 0) == (endpoint in asked)


def test_nothing_started_is_not_healthy(container: Container) -> None:
    assert container("health").returncode == 64


def torch_step(steps: list[dict[str, Any]]) -> str:
    (step,) = (value for value in values(steps, "RUN") if "$TORCH" in value)
    return str(step)


@pytest.mark.parametrize(
    ("torch", "says"),
    [
        ("cpu", "pip install -c constraints.txt --no-deps --index-url https://cpu.example torch torchvision"),
        ("cuda", "pip install -c constraints.txt torch torchvision"),
    ],
)
def test_torch_for_the_cpu_comes_from_an_index_of_its_own(
    torch: str, says: str, steps: list[dict[str, Any]], container: Container
) -> None:
    env = container.env | {"TORCH": torch, "TORCH_INDEX": "https://cpu.example"}
    done = subprocess.run(["/bin/sh", "-c", torch_step(steps)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith(says)
    assert "cpu" in values(steps, "ARG")[0]


def test_another_torch_is_refused(steps: list[dict[str, Any]], container: Container) -> None:
    command = ["/bin/sh", "-c", torch_step(steps)]
    done = subprocess.run(command, env=container.env | {"TORCH": "gpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TORCH is 'gpu'" in done.stderr


def test_the_entrypoint_is_executable_and_plain_shell() -> None:
    assert "COPY --chmod=755 container/entrypoint.sh" in DOCKERFILE.read_text()
    assert subprocess.run(["/bin/sh", "-n", str(ENTRYPOINT)], check=False).returncode == 0
