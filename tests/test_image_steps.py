"""The script that runs the Dockerfile's steps: how it reads them, with stand-ins for base image and chroot."""

import contextlib
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

MINIMAL = "FROM python:3.11-slim-bookworm\n"


pytestmark = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image's Python is 3.11")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "container"))
    return importlib.import_module("steps")


class Recorded:
    """What was to be run, in place of chroot; a wheel and its needs appear as the first stage would make them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[str]]] = []
        self.fail = ""

    def __call__(self, place: Any, command: list[str], shown: dict[str, Path]) -> None:
        self.calls.append((place, command))
        if self.fail and self.fail in command[-1]:
            raise OSError("exit code 1")
        if "pip wheel" in command[-1]:
            (place.root / "wheels").mkdir()
            (place.root / "wheels" / "meanet-0.whl").touch()
        if "requirements.txt" in command[-1] and "tomllib" in command[-1]:
            (place.root / "src" / "requirements.txt").write_text("numpy\n")


@pytest.fixture
def ran(steps: Any, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    def base(root: Path, debian: str) -> None:
        assert debian == "bookworm"
        (root / "etc").mkdir(parents=True)
        (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nmeanet:x:1000:1000::/home/meanet:/bin/sh\n")

    recorded = Recorded()
    monkeypatch.setattr(steps.namespaces, "make_base", base)
    monkeypatch.setattr(steps.namespaces, "run", recorded)
    monkeypatch.setattr(steps.namespaces, "pip_settings", lambda folder: contextlib.nullcontext({}))
    return recorded


def build(steps: Any, folder: Path, text: str | None = None, **build_args: str) -> Any:
    path = ROOT / "Dockerfile"
    if text is not None:
        path = folder / "Dockerfile"
        path.write_text(MINIMAL + text)
    return steps.Build(folder, build_args, lambda line: None).run(path)


def test_the_dockerfile_is_run_step_by_step(steps: Any, ran: Recorded, tmp_path: Path) -> None:
    stage = build(steps, tmp_path, TORCH="cuda")
    assert (stage.user, stage.workdir, stage.entrypoint) == ("1000:1000", "/app", ["meanet"])
    assert stage.health == ["meanet", "health"]
    assert stage.env["RAY_AUTH_MODE"] == "token"
    assert "TORCH" not in stage.env
    torch = next(place for place, command in ran.calls if "$TORCH" in command[-1])
    assert torch.env["TORCH"] == "cuda"
    assert (torch.user, torch.workdir) == ("0:0", "/app")
    assert stage.place().env["HOME"] == "/home/meanet"


def test_what_is_copied_lies_where_it_belongs(steps: Any, ran: Recorded, tmp_path: Path) -> None:
    stage = build(steps, tmp_path)
    assert (stage.root / "app" / "requirements.txt").read_text() == "numpy\n"
    assert (stage.root / "wheels" / "meanet-0.whl").exists()
    entry = stage.root / "usr" / "local" / "bin" / "meanet"
    assert entry.read_text() == (ROOT / "container" / "entrypoint.sh").read_text()
    assert entry.stat().st_mode & 0o777 == 0o755
    first = tmp_path / "stage0" / "src"
    assert (first / "platform" / "meanet" / "routing.py").exists()
    assert not (first / "tests").exists()
    assert not (stage.root / "app" / "platform").exists()


def test_variables_are_put_in(steps: Any, ran: Recorded, tmp_path: Path) -> None:
    text = 'ARG WHO=you\nENV A=1 B="two $WHO"\nENV C=${A}3\nWORKDIR /srv\nWORKDIR $A\nRUN true\n'
    stage = build(steps, tmp_path, text, WHO="me")
    assert (stage.env["B"], stage.env["C"], stage.workdir) == ("two me", "13", "/srv/1")
    assert (stage.root / "srv" / "1").is_dir()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RUN broken\n", "line 2: RUN broken failed: exit code 1"),
        ("VOLUME /data\n", "line 2: VOLUME is not known"),
        ("COPY --link LICENSE /x\n", "COPY"),
        ("COPY tests /x\n", "line 2: COPY tests /x failed"),
        ("FROM debian:12\n", "debian:12 cannot be stood in for"),
    ],
)
def test_what_fails_is_named_with_its_line(text: str, says: str, steps: Any, ran: Recorded, tmp_path: Path) -> None:
    ran.fail = "broken"
    with pytest.raises(steps.StepError, match=says):
        build(steps, tmp_path, text)


def test_an_unknown_build_argument_is_refused(steps: Any, ran: Recorded, tmp_path: Path) -> None:
    with pytest.raises(steps.StepError, match="--build-arg CUDA: the Dockerfile has only"):
        build(steps, tmp_path, CUDA="1")
    assert ran.calls == []


@pytest.mark.parametrize("fails", [False, True])
def test_pip_settings_are_shown_and_not_left(
    steps: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    """While the steps run, and to nobody else: an index may have credentials."""
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:secret@index.example/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "pip.conf").write_text("of a build that was killed")
    seen: list[str] = []

    def run(place: Any, command: list[str], shown: dict[str, Path]) -> None:
        conf = shown["/etc/pip.conf"]
        assert conf.stat().st_mode & 0o777 == 0o600
        assert all(path.exists() for inside, path in shown.items() if inside != "/etc/resolv.conf")
        seen.append(conf.read_text())
        if fails:
            raise OSError("exit code 1")

    def base(root: Path, debian: str) -> None:
        (root / "etc").mkdir(parents=True)
        (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")

    monkeypatch.setattr(steps.namespaces, "make_base", base)
    monkeypatch.setattr(steps.namespaces, "run", run)
    with pytest.raises(steps.StepError) if fails else contextlib.nullcontext():
        build(steps, tmp_path, "RUN true\n")
    (text,) = seen
    assert text.startswith("[global]\n")
    assert "index-url = https://user:secret@index.example/simple" in text
    assert not list(tmp_path.rglob("pip.conf"))


def test_what_a_machine_lacks_is_named(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "debootstrap" else f"/usr/bin/{name}")
    with pytest.raises(steps.namespaces.CannotError, match="debootstrap not found: install debootstrap"):
        steps.namespaces.need()
