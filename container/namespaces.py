"""Root folders that stand in for images, and commands in them: chroot in mount, process and network namespaces."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What python:X-slim installs beside Debian's minimal system, and the libraries that its Python links to.
_PACKAGES = (
    "ca-certificates,netbase,tzdata,libbz2-1.0,libcrypt1,libexpat1,libffi8,libgdbm6,liblzma5,libncursesw6,"
    "libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g"
)
_TOOLS = ("debootstrap", "unshare", "nsenter", "chroot", "ip")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_SHM = "/dev/shm"  # noqa: S108

Inside = Callable[[list[str], Mapping[str, str]], "subprocess.CompletedProcess[str]"]


class CannotError(Exception):
    """This machine does not allow it; the message says what is missing."""


@dataclass
class Place:
    """Where a command runs: root folder, environment (nothing else is handed on), folder and user:group by number."""

    root: Path
    env: dict[str, str]
    workdir: str
    user: str


def need() -> None:
    """Raises CannotError if something is missing that the rest needs."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        raise CannotError(f"{', '.join(missing)} not found: install debootstrap, util-linux and iproute2")
    if os.geteuid():
        raise CannotError("this needs root, for chroot and namespaces")
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], check=False).returncode:
        raise CannotError("this machine allows no namespaces")


def make_base(root: Path, debian: str) -> None:
    """Debian's minimal system with this interpreter's Python in /usr/local, and only pip beside it."""
    command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", debian, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotError(f"debootstrap failed: {(done.stdout + done.stderr)[-500:]}")
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    local, python = root / "usr/local", f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = Path(sys.base_prefix)
    leave = shutil.ignore_patterns("site-packages", "test", "__pycache__", "config-*", "*.a")
    (local / "lib").mkdir(parents=True, exist_ok=True)
    shutil.copytree(prefix / "lib" / python, local / "lib" / python, symlinks=True, ignore=leave)
    (local / "lib" / python / "site-packages").mkdir()
    for library in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy(library, local / "lib", follow_symlinks=False)
    shutil.copy(prefix / "bin" / python, local / "bin" / python)
    (local / "bin/python").symlink_to(python)
    (local / "bin/python3").symlink_to(python)
    place = Place(root, {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, "/", "0:0")
    run(place, ["/bin/sh", "-c", "ldconfig && python -m ensurepip && ln -s pip3 /usr/local/bin/pip"], {})


@contextlib.contextmanager
def pip_settings(folder: Path) -> Iterator[dict[str, Path]]:
    """This machine's pip settings as files to show to the steps that install: nothing of them stays in the image, nor,
    for an index may have credentials, in the folder; nobody else can read them there while the block runs."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.replace(":env:..", ":env:."), re.MULTILINE))
    conf = folder / "pip.conf"
    text = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items())
    paths = {part.removeprefix("file://") for value in found.values() for part in value.split()}
    shown = {_mount_point(path): Path(_mount_point(path)) for path in paths if path.startswith("/")}
    conf.unlink(missing_ok=True)  # of a build that was killed
    conf.touch(mode=0o600, exist_ok=False)
    try:
        conf.write_text(text)
        yield {"/etc/pip.conf": conf, "/etc/resolv.conf": Path("/etc/resolv.conf")} | {
            inside: path for inside, path in shown.items() if path.exists()
        }
    finally:
        conf.unlink()


def _mount_point(path: str) -> str:
    """An index's files lie beside its pages: the folder above is shown."""
    return str(Path(path).parent) if path.endswith("/simple") else path


def _command(place: Place, command: list[str], shown: Mapping[str, Path], network: bool) -> list[str]:
    """The words that run a command in a place; mounts vanish with it."""
    root = shlex.quote(str(place.root))
    lines = ["set -e", f"mount -t proc proc {root}/proc", f"mount -t tmpfs -o mode=755 tmpfs {root}/dev"]
    lines += [f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}" for name in _DEVICES]
    lines += [f"mkdir {root}{_SHM} && mount -t tmpfs -o mode=1777 tmpfs {root}{_SHM}"]
    for inside, path in shown.items():
        target, source = shlex.quote(f"{place.root}{inside}"), shlex.quote(str(path))
        make = f"mkdir -p {target}" if path.is_dir() else f"mkdir -p $(dirname {target}) && touch {target}"
        lines += [f"{make} && mount --bind {source} {target}"]
    if not network:
        lines += ["ip link set lo up"]
    lines += [f"exec {shlex.join(_chroot(place, command))}"]
    spaces = ["--mount", "--pid", "--ipc", "--fork", "--kill-child", *([] if network else ["--net"])]
    return ["unshare", *spaces, "--", "/bin/sh", "-c", "\n".join(lines)]


def _chroot(place: Place, command: list[str]) -> list[str]:
    env = [f"{name}={value}" for name, value in place.env.items()]
    return [
        *["chroot", f"--userspec={place.user}", "--groups=", str(place.root), "/usr/bin/env", "-i", *env],
        *["/bin/sh", "-c", 'cd "$0" && exec "$@"', place.workdir, *command],
    ]


def run(place: Place, command: list[str], shown: Mapping[str, Path]) -> None:
    """Run a command in a place, with this machine's network and some files shown there.

    Raises:
        CannotError: it failed; the message has the end of what it printed.
    """
    before = {inside for inside in shown if not Path(f"{place.root}{inside}").exists()}
    done = subprocess.run(_command(place, command, shown, network=True), capture_output=True, text=True, check=False)
    for inside in before:  # what was only made to be mounted on
        target = Path(f"{place.root}{inside}")
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)
    if done.returncode:
        raise CannotError(f"exit code {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")


def outcome(place: Place, command: list[str]) -> "subprocess.CompletedProcess[str]":
    """What a command did in a place without a network."""
    return subprocess.run(_command(place, command, {}, network=False), capture_output=True, text=True, check=False)


@contextlib.contextmanager
def started(place: Place, command: list[str], shown: Mapping[str, Path], log: Path) -> Iterator[Inside]:
    """A command running in a place without a network while the block runs; yields what runs others beside it."""
    with log.open("w") as output:
        process = subprocess.Popen(
            _command(place, command, shown, network=False), stdout=output, stderr=subprocess.STDOUT
        )

    def inside(beside: list[str], env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        if process.poll() is not None:
            raise CannotError(f"{shlex.join(command)} has ended:\n{log.read_text()[-1500:]}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if not children:  # not yet forked
            return subprocess.CompletedProcess(beside, 1, "", "")
        enter = ["nsenter", f"--target={children[0]}", "--mount", "--pid", "--ipc", "--net"]
        words = _chroot(Place(place.root, place.env | dict(env), place.workdir, place.user), beside)
        return subprocess.run([*enter, "--", *words], capture_output=True, text=True, check=False)

    try:
        yield inside
    finally:
        process.kill()  # unshare takes the whole process namespace with it
        process.wait()


def size_mb(root: Path) -> float:
    """Megabytes (10^6) of a folder's files, as they lie on the disk."""
    listed = subprocess.run(
        ["du", "-s", "-x", "--block-size=1000000", str(root)], capture_output=True, text=True, check=True
    )
    return float(listed.stdout.split()[0])
