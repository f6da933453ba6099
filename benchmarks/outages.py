"""A served champion whose cloud fails, and more load than it can take: `python -m benchmarks.outages`.

Needs a registered champion of digits in MLFLOW_TRACKING_URI (`make demo`). For each fault: edge-only load, then the
same load with the cloud allowed while it is killed, hung, slow or answers NaN, then until it has recovered. Last, three
times the load that the server can take. Writes docs/benchmarks/outages.md; exits 1 when a bound is missed.
"""

import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from benchmarks import load
from benchmarks.load import Sample
from benchmarks.outage_bounds import DEADLINE_S, RECOVERY_S, Bound, Outage, Overload, Question
from benchmarks.unreliable import Faulty, running
from jobs import _cli
from meanet import data, preprocessing, recipes
from meanet.tracking import store_uri

FAULTS = ("killed", "hung", "slow", "nan")
_PER_SECOND = 20.0


@dataclass(frozen=True)
class Flags:
    """Measure and write the page."""

    seconds: float = 60.0
    """Of each fault, and of the overload."""
    clients: int = 4
    """Of the closed loop during the faults: fewer leave room for the cloud replica that starts on the same cores."""
    batch: int = 16
    """Images a request of the overload, so that the blocks are what is overloaded."""
    output: Path = Path("docs/benchmarks/outages.md")
    """The page."""


def classify(body: bytes, **wishes: object) -> bytes:
    """A request for one image."""
    query = "&".join(f"{name}={value}" for name, value in wishes.items())
    return load.encode("POST", f"/v1/classify?deadline_ms={1000 * DEADLINE_S:.0f}&{query}", body)


async def ask_healthy(url: str, count: int = 100) -> list[Question]:
    """Images whose complex ones the cloud answers: as many of these as of others, where there are so many."""
    images = data.load(recipes.digits().data).images
    complex_, simple = list[Question](), list[Question]()
    async with load.connections(url, 1) as (connection,):
        for image in images:
            body = preprocessing.encode_png(image)
            normal = json.loads((await connection.ask(classify(body), 10)).body)
            if normal["degraded"]:
                continue  # its very first call may be slow
            alone = json.loads((await connection.ask(classify(body, edge_only="true"), 10)).body)
            question = Question(body, (normal["class_id"], normal["exit"]), alone["class_id"])
            (complex_ if normal["exit"] == "cloud" else simple).append(question)
            if len(complex_) >= count // 2 and len(simple) >= count // 2:
                break
    if not complex_:
        raise SystemExit("the champion's operating point sends nothing to the cloud: there is nothing to take away")
    both = min(len(complex_), len(simple))
    return [one for pair in zip(complex_[:both], simple[:both], strict=True) for one in pair]


async def drive(url: str, requests: Sequence[bytes], clients: int, stop: asyncio.Event) -> list[Sample]:
    """The load of every phase: some clients in a closed loop, and a schedule."""
    parts = await asyncio.gather(
        load.closed_loop(url, requests, clients, stop), load.paced(url, requests, _PER_SECOND, stop)
    )
    return [sample for part in parts for sample in part]


async def outage(server: Faulty, fault: str, questions: Sequence[Question], seconds: float, clients: int = 4) -> Outage:
    """Edge-only load, the fault under load, and load until it must have recovered."""
    alone = [classify(question.body, edge_only="true") for question in questions]
    normal = [classify(question.body) for question in questions]
    edge_only = await drive(server.url, alone, clients, load.after(seconds / 2))
    stop = asyncio.Event()
    under_load = asyncio.create_task(drive(server.url, normal, clients, stop))
    await asyncio.sleep(1)
    begin = time.monotonic()
    if fault == "killed":
        server.kill_cloud()
        await asyncio.sleep(seconds)
        healthy = await _made_anew(server, begin)
    else:
        server.tell(fault)  # type: ignore[arg-type]
        await asyncio.sleep(seconds)
        server.tell("none")
        healthy = time.monotonic()
    complex_ = next(
        request for question, request in zip(questions, normal, strict=True) if question.answer[1] == "cloud"
    )
    await _until_answered(server.url, complex_, healthy + RECOVERY_S)
    await asyncio.sleep(0.5)
    stop.set()
    return Outage(fault, edge_only, await under_load, begin, healthy, questions)


async def _until_answered(url: str, complex_: bytes, at_most: float) -> None:
    """Until the cloud answers, or the time is over."""
    async with load.connections(url, 1) as (connection,):
        while time.monotonic() < at_most:
            reply = await connection.ask(complex_, 2)
            if reply.status == 200 and json.loads(reply.body)["exit"] == "cloud":
                return
            await asyncio.sleep(0.1)


async def _made_anew(server: Faulty, begin: float, limit_s: float = 120) -> float:
    while (made := server.newest_cloud()) < begin and time.monotonic() < begin + limit_s:
        await asyncio.sleep(0.1)
    return made if made > begin else float("nan")


async def overload(server: Faulty, questions: Sequence[Question], seconds: float, batch: int) -> Overload:
    """Three times what it takes, in batches that the edge answers alone."""
    requests = [_batch([questions[(first + n) % len(questions)].body for n in range(batch)]) for first in range(8)]
    stop = load.after(max(2.0, seconds / 6))
    begun = time.monotonic()
    samples = await load.closed_loop(server.url, requests, 8, stop)
    capacity = sum(sample.reply.status == 200 for sample in samples) / (time.monotonic() - begun)
    stop, held = load.after(seconds), list[int]()

    async def watch() -> None:
        while not stop.is_set():
            held.append(server.held())
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    samples = await load.paced(server.url, requests, 3 * capacity, stop)
    await watching
    return Overload(capacity, samples, held)


def _batch(bodies: Sequence[bytes]) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join([*(head + one + b"\r\n" for one in bodies), b"--x--\r\n"])
    target = f"/v1/classify/batch?edge_only=true&deadline_ms={1000 * DEADLINE_S:.0f}"
    return load.encode("POST", target, body, {"content-type": "multipart/form-data; boundary=x"})


_OUTAGES = """# When the cloud is away, and under overload

`python -m benchmarks.outages --seconds {seconds:g} --clients {clients}`, commit {commit}, {date}, {cores} cores
({machine}) for clients, server and cluster, Python {python}, Ray {ray}; digits, one edge and one cloud replica.

For each fault, {clients} clients in a closed loop and {rate:g} requests a second on a schedule; half of the images want
the cloud; each request names a deadline of {deadline:g} s. Before each, the same load with `edge_only`, {alone:g} s.
killed: SIGKILL to the replica's process, away until Serve has made another; hung: its event loop sleeps; slow: it
answers after 2 s; nan: with a confidence that is no number. Right while the cloud is away: the edge's own answer,
marked `degraded` with the reason. A figure beyond its bound is bold.

{table}
"""
_OVERLOAD = """## Three times its capacity, {seconds:g} s

Batches of {batch} images with `edge_only`: the server takes {capacity:.0f} requests a second, and {three:.0f} come on a
schedule. {accepted} were answered (p50 {p50:.0f} ms, p99 {p99:.0f} ms), {refused} refused with 503 (p50 {p50r:.0f} ms).

{table}
"""


def page(flags: Flags, outages: Sequence[Outage], over: Overload) -> str:
    """As Markdown."""
    rows = [
        [one.fault, str(len(one.samples)), str(one.degraded), *_p99s(one), *_figures(one.bounds())] for one in outages
    ]
    names = [bound.name for bound in outages[0].bounds()]
    first = _OUTAGES.format(
        seconds=flags.seconds,
        commit=_cli.commit(),
        date=time.strftime("%Y-%m-%d"),
        cores=os.cpu_count(),
        machine=platform.machine(),
        python=platform.python_version(),
        ray=version("ray"),
        clients=flags.clients,
        rate=_PER_SECOND,
        deadline=DEADLINE_S,
        alone=flags.seconds / 2,
        table=_table(["fault", "requests", "degraded", "p99 edge-only, ms", "p99 cloud away, ms", *names], rows),
    )
    accepted, refused = over.with_status(200), over.with_status(503)
    bounds = [
        [bound.name, figure, f"{bound.limit:g}"]
        for bound, figure in zip(over.bounds(), _figures(over.bounds()), strict=True)
    ]
    return (
        first
        + "\n"
        + _OVERLOAD.format(
            seconds=flags.seconds,
            batch=flags.batch,
            capacity=over.capacity,
            three=3 * over.capacity,
            accepted=len(accepted),
            p50=1000 * load.percentile(accepted, 0.5),
            p99=1000 * load.percentile(accepted, 0.99),
            refused=len(refused),
            p50r=1000 * load.percentile(refused, 0.5),
            table=_table(["bound", "measured", "at most"], bounds),
        )
    )


def _p99s(one: Outage) -> list[str]:
    return [f"{1000 * load.percentile(samples, 0.99):.1f}" for samples in (one.edge_only, one.during)]


def _figures(bounds: Sequence[Bound]) -> list[str]:
    return [_figure(bound) for bound in bounds]


def _figure(bound: Bound) -> str:
    text = f"{bound.value:.2f}" if bound.value % 1 else f"{bound.value:.0f}"
    return text if bound.kept else f"**{text}**"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


async def measure(server: Faulty, flags: Flags) -> tuple[list[Outage], Overload]:
    """Everything, one after another."""
    questions = await ask_healthy(server.url)
    outages = []
    for fault in FAULTS:
        outages.append(await outage(server, fault, questions, flags.seconds, flags.clients))
        print(fault, *(f"{bound.name} {_figure(bound)}" for bound in outages[-1].bounds()), sep="; ", flush=True)
        _say(outages[-1].samples)
    over = await overload(server, questions, flags.seconds, flags.batch)
    _say(over.samples)
    return outages, over


def _say(samples: Sequence[Sample]) -> None:
    """How often each status and refusal came."""

    def mark(sample: Sample) -> tuple[int, str]:
        return sample.reply.status, "" if sample.reply.status == 200 else sample.reply.body[:60].decode(
            errors="replace"
        )

    for (status, text), count in load.count_by(samples, mark).items():
        print(f"  {count} x {status} {text}", flush=True)


def main() -> None:
    """Command-line entry."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.outages")
    with tempfile.TemporaryDirectory() as folder:
        uri = store_uri(os.environ.get("MLFLOW_TRACKING_URI"))
        with running(Path(folder), uri) as server:
            outages, over = asyncio.run(measure(server, flags))
    flags.output.write_text(page(flags, outages, over))
    missed = [f"{one.fault}: {b.name} {_figure(b)}" for one in outages for b in one.bounds() if not b.kept]
    missed += [f"overload: {bound.name} {_figure(bound)}" for bound in over.bounds() if not bound.kept]
    print(f"{flags.output}:", "; ".join(missed) or "every bound is kept")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
