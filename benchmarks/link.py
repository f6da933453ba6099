"""Upload seconds of a deployed edge over a shaped link, against the energy model's: `python -m benchmarks.link`.

An edge node and a cloud node of one Ray cluster stand in network namespaces (`benchmarks.link_net`); what leaves the
edge is shaped to the model's rates of WiFi, LTE and 3G. The application is deployed as `python -m serve_apps` does it;
photographs of a megabyte and more are asked one at a time, and each answer says what its way to the cloud took and what
the model makes of it. As root; writes docs/benchmarks/link.md and exits 1 where a median is more than 15% off.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import tyro
from PIL import Image

from benchmarks import link_net
from benchmarks.link_net import Link
from jobs import _cli, _processes
from jobs._ray_nodes import serve_variables

LINKS = {"wifi": 18.88, "lte": 5.85, "3g": 1.1}
"""Profile of the model -> its rate, Mbit/s."""
BOUND = 0.15
"""How far the measured seconds may be off the model's."""
_START_S = 240.0
_ALL = "0.0.0.0"  # noqa: S104  # each replica listens at this host, on its own node
_AGENTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
_CLASSES = ("china", "flower")


@dataclass(frozen=True)
class Flags:
    """Measure and write the page."""

    repeats: int = 3
    """Of each body at each rate."""
    folder: Path | None = None
    """Where registry and logs lie, for the next time too; a temporary one if not given."""
    output: Path = Path("docs/benchmarks/link.md")
    """The page."""


@dataclass(frozen=True)
class Upload:
    """One body's way."""

    num_bytes: int
    measured: float
    """Seconds, by the edge."""
    modelled: float
    """Seconds, by the served model's link."""
    joules: float
    """Of the upload, modelled."""

    @property
    def ratio(self) -> float:
        """Measured to modelled."""
        return self.measured / self.modelled


@dataclass(frozen=True)
class Measured:
    """At one rate."""

    link: str
    mbps: float
    uploads: Sequence[Upload]
    bare: float
    """A TCP connection's seconds for the first body, to the model's."""

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(one.ratio for one in self.uploads)

    @property
    def kept(self) -> bool:
        """Whether it is within the bound."""
        return abs(self.ratio - 1) <= BOUND


def photographs() -> dict[str, Image.Image]:
    """The two that scikit-learn brings, 640x427."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in _CLASSES}


def bodies() -> list[bytes]:
    """The photographs as a camera of more pixels would have them: PNG and JPEG files of 1 to 1.6 MB."""
    found = []
    for name, scale, kind in (("flower", 2.2, "PNG"), ("china", 4, "JPEG"), ("china", 2, "PNG"), ("flower", 3, "PNG")):
        photograph, file = photographs()[name], io.BytesIO()
        size = round(photograph.width * scale), round(photograph.height * scale)
        photograph.resize(size, Image.Resampling.BICUBIC).save(file, kind, quality=97)
        found.append(file.getvalue())
    return found


def register(folder: Path, tracking_uri: str) -> dict[str, int]:
    """Train on small pieces of the photographs, and register a version a link; profile -> version."""
    from meanet import artifact, data
    from meanet.config import DataConfig
    from meanet.loop import SingleProcess
    from meanet.recipes import digits
    from meanet.routing import Policy
    from meanet.tracking import Tracker
    from meanet.training import Trainer

    generator = np.random.default_rng(0)
    for name, photograph in photographs().items():
        (folder / name).mkdir(parents=True)
        for number in range(150):
            left, top = (int(generator.integers(0, side - 64)) for side in photograph.size)
            photograph.crop((left, top, left + 64, top + 64)).save(folder / name / f"{number:03d}.png")
    whole = digits()
    phases = {
        name: dataclasses.replace(getattr(whole, name), epochs=2, batch_size=32)
        for name in ("main", "extension", "cloud")
    }
    config = DataConfig(source=f"folder:{folder}", image_size=32, channels=3, validation_fraction=0.3)
    split = dataclasses.replace(whole.split, num_hard_classes=1)
    recipe = dataclasses.replace(whole, data=config, split=split, **phases)
    splits = data.divide(data.load(config), config, recipe.seed)
    state = Trainer(recipe, splits, SingleProcess()).run()
    model, tracker, versions = artifact.from_state(state, splits), Tracker(tracking_uri), {}
    policy = Policy(thresholds=(0.0,), hard_classes=model.hard_classes)
    for name in LINKS:
        energy = dataclasses.asdict(dataclasses.replace(recipe.energy, link=name))
        point = model.with_operating_point({**policy.to_dict(), "energy": energy})
        versions[name] = tracker.register(point, tracker.start_run(name, {}, {}))
    return versions


@dataclass(frozen=True)
class Served:
    """The application, deployed over the link."""

    link: Link
    client: httpx.Client
    versions: dict[str, int]
    nodes: dict[str, str]
    """`edge` and `cloud` -> Ray's id of the node."""

    def switch(self, profile: str) -> None:
        """Shape the link to a profile's rate, and serve the version whose model has that profile.

        Raises:
            httpx.HTTPStatusError: it is refused.
        """
        self.link.shape(1000.0)  # the version is no part of what is measured
        asked = {"version": self.versions[profile]}
        self.client.put("/v1/version", params={"wait_s": 50}, json=asked).raise_for_status()
        deadline = time.monotonic() + 120
        while self.client.get("/healthz").json()["model_version"] != self.versions[profile]:
            assert time.monotonic() < deadline, "the version is rolled out"
            time.sleep(0.2)
        self.link.shape(LINKS[profile])

    def ask(self, body: bytes) -> Upload:
        """Ask for an image that is complex by its threshold: its very bytes go up.

        Raises:
            AssertionError: the cloud's node did not answer.
        """
        reply = self.client.post("/v1/classify", params={"threshold": -1}, content=body).raise_for_status()
        answer = reply.json()
        assert (answer["exit"], answer["degraded"]) == ("cloud", False), answer
        assert answer["served_by"] == self.nodes, "edge and cloud answer from their own namespaces"
        ms = answer["ms"]
        return Upload(len(body), 0.001 * ms["upload"], 0.001 * ms["upload_modelled"], answer["joules"]["upload"])


@contextlib.contextmanager
def deployed(folder: Path) -> Iterator[Served]:
    """Head, edge and cloud node, and the application on them; all ended by their ids.

    Raises:
        UserError: a part does not come up.
    """
    tracking_uri, mark = f"sqlite:///{folder}/mlflow.db", secrets.token_hex(8)
    known = folder / "versions.json"
    if not known.exists():
        known.write_text(json.dumps(register(folder / "images", tracking_uri)))
    versions: dict[str, int] = json.loads(known.read_text())
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(link_net.shaped_link())
        temporary = Path(tempfile.mkdtemp(prefix="mnl-", dir="/tmp"))  # a short path, for sockets lie in it
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        environment, token = _environment(temporary, folder, tracking_uri), secrets.token_hex(16)
        parts: list[_processes.Part] = []
        stack.callback(lambda: _processes.end(reversed(parts), mark, 3))
        port, dashboard, client_server, http = _processes.free_ports(4)
        for place, address in (("head", link.root), ("edge", link.edge), ("cloud", link.cloud)):
            words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
            words += ["--node-ip-address", address, "--temp-dir", str(temporary / place), "--num-cpus", "2"]
            words += ["--object-store-memory", str(150 * 2**20)]
            for agent, number in zip(_AGENTS, _processes.free_ports(len(_AGENTS)), strict=True):
                words += [f"--{agent}-port", str(number)]
            if place == "head":
                words += ["--head", "--port", str(port), "--dashboard-host", address]
                words += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(client_server)]
            else:
                words = [*link.inside(place), *words, "--address", f"{link.root}:{port}"]
                words += ["--resources", json.dumps({place: 1})]
            parts.append(_processes.begin(place, words, environment, mark, folder / f"{place}.log"))
            if place == "head":
                _processes.wait_until(lambda: _answers(link.root, port), parts[-1], mark, _START_S)
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        words = [sys.executable, "-m", "serve_apps", "--host", _ALL, "--port", str(http), "--follow-s", "0"]
        words += ["--version", str(versions["wifi"]), "--ready-file", str(ready)]
        environment |= {"RAY_ADDRESS": f"{link.root}:{port}", "MEANET_TOKEN": token}
        _until_both_have_joined(environment, mark, parts[0])
        parts.append(_processes.begin("serve", words, environment, mark, folder / "serve.log"))
        _processes.wait_until(ready.exists, parts[-1], mark, _START_S)
        url = f"http://{link.root}:{http}"  # replicas listen at the same host, each on its own node
        headers = {"Authorization": f"Bearer {token}"}
        client = stack.enter_context(httpx.Client(base_url=url, timeout=90, headers=headers))
        patient = {"deadline_s": 55.0, "cloud_budget_s": 50.0}
        client.put("/v1/settings", params={"wait_s": 30}, json=patient).raise_for_status()
        answer = client.post("/v1/classify", params={"threshold": -1}, content=bodies()[0]).raise_for_status().json()
        yield Served(link, client, versions, answer["served_by"])


def _environment(temporary: Path, folder: Path, tracking_uri: str) -> dict[str, str]:
    """Of all nodes: this checkout's code, token authentication, Serve's fast ingress."""
    root, token = Path(__file__).parent.parent, temporary / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    return {
        **kept,
        **serve_variables(temporary),
        "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


def _answers(host: str, port: int) -> bool:
    import socket

    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


_JOINED = """
import ray, sys, time
ray.init(log_to_driver=False)
deadline = time.monotonic() + 120
while not {"edge", "cloud"} <= set(ray.cluster_resources()):
    time.sleep(0.3)
    assert time.monotonic() < deadline, "a node is missing"
"""


def _until_both_have_joined(environment: dict[str, str], mark: str, head: _processes.Part) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _JOINED],
        env=environment | {_processes.MARK: mark},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the nodes do not join: {done.stderr[-2000:]}\nlogs: {Path(head.log).parent}")


def measure(served: Served, profile: str, repeats: int, files: Sequence[bytes]) -> Measured:
    """Each body so often, one at a time."""
    served.switch(profile)
    served.ask(files[0])  # the first call of a version connects
    uploads = [served.ask(body) for _ in range(repeats) for body in files]
    bare = served.link.bare_tcp(uploads[0].num_bytes) / uploads[0].modelled
    return Measured(profile, LINKS[profile], uploads, bare)


_PAGE = """# Upload seconds of a deployed edge, against the model's

`python -m benchmarks.link --repeats {repeats}`, at commit {commit}, {date}, {cores} cores ({machine}) for all nodes,
Linux {kernel}, Python {python}, Ray {ray}.

A Ray cluster of a head, a node with the resource `edge` and one with `cloud`, the latter two in network namespaces on
one bridge. All that leaves the edge's namespace, Ray's own traffic included, goes through a token bucket (`tc tbf`,
burst {burst} bytes); what comes back is not shaped. `python -m serve_apps` has deployed the application on them, edge
and cloud replica on nodes of their own, as each answer's `served_by` says. Two photographs at {count} sizes and
formats, {least:.2f} to {most:.2f} MB, are asked one at a time, under a threshold by which each image is complex; their
bytes go up as they came.

Measured: `ms.upload`, by the edge: from the call of the cloud to its answer, less what the cloud took by its own clock.
Ray's hop and object transfer, TCP and the frames' headers are in it. Modelled: `ms.upload_modelled`, the same bytes at
the rate that the energy model has for the link (bytes x 8 / rate), by which `joules.upload` is priced, too. Bare TCP:
one connection between the namespaces that sends as many bytes, to the model's seconds, beside an idle cluster: headers
(3%) and what Ray's nodes tell each other, which takes a fixed rate and so shows on the slowest link.

| link | Mbit/s | uploads | measured, MB/s | measured / modelled | least | most | bare TCP / modelled | within 15% |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

By body, medians of {repeats}:

| link | MB | measured, s | modelled, s | ratio | upload, J (modelled) |
| --- | --- | --- | --- | --- | --- |
{by_body}
"""


def page(found: Sequence[Measured], repeats: int) -> str:
    """As Markdown."""
    sizes = sorted({upload.num_bytes for one in found for upload in one.uploads})
    rows, by_body = [], []
    for one in found:
        ratios = [upload.ratio for upload in one.uploads]
        rate = statistics.median(upload.num_bytes / upload.measured for upload in one.uploads) / 1e6
        rows.append(
            f"| {one.link} | {one.mbps:g} | {len(one.uploads)} | {rate:.3f} | {one.ratio:.3f} | {min(ratios):.3f} "
            f"| {max(ratios):.3f} | {one.bare:.3f} | {'yes' if one.kept else '**no**'} |"
        )
        for size in sizes:
            same = [upload for upload in one.uploads if upload.num_bytes == size]
            seconds = statistics.median(upload.measured for upload in same)
            by_body.append(
                f"| {one.link} | {size / 1e6:.2f} | {seconds:.3f} | {same[0].modelled:.3f} "
                f"| {seconds / same[0].modelled:.3f} | {same[0].joules:.3f} |"
            )
    return _PAGE.format(
        repeats=repeats,
        commit=_cli.commit(),
        date=time.strftime("%Y-%m-%d"),
        cores=os.cpu_count(),
        machine=platform.machine(),
        kernel=platform.release(),
        python=platform.python_version(),
        ray=version("ray"),
        burst=link_net.BURST_BYTES,
        count=len(sizes),
        least=sizes[0] / 1e6,
        most=sizes[-1] / 1e6,
        rows="\n".join(rows),
        by_body="\n".join(by_body),
    )


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.link")
    if (reason := link_net.why_not()) is not None:
        raise SystemExit(f"a shaped link cannot be had: {reason}")
    with tempfile.TemporaryDirectory() as folder, deployed((flags.folder or Path(folder)).absolute()) as served:
        found = [measure(served, profile, flags.repeats, bodies()) for profile in LINKS]
    text = page(found, flags.repeats)
    flags.output.write_text(text)
    print(text)
    sys.exit(0 if all(one.kept for one in found) else 1)


if __name__ == "__main__":
    main()
