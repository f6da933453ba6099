"""The training loop on Ray Train. Other homes of ray in meanet: `streaming` (Ray Data), `tuning` (Ray Tune), `workers`,
`nodes`.

Phases that do not wait for each other (`meanet.loop.INDEPENDENT`) run at the same time, each group of them inside one
`fit()`, where the cluster has room for two worker groups; else one after the other inside one `fit()`. Every epoch
is reported with a checkpoint; after a worker's death its group starts again from the last registered one.
"""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from meanet import checkpoints
from meanet.checkpoints import STATE as _STATE
from meanet.config import Recipe
from meanet.data import ImageTable, Splits
from meanet.errors import UserError
from meanet.loop import INDEPENDENT, PHASES, Epoch, State, merged
from meanet.stopping import leave_at_once, sigterm_ends_the_block
from meanet.storage import resolve
from meanet.streaming import streaming_feed
from meanet.training import Trainer, resident_feed
from meanet.workers import OnEpoch, RayWorker, interruptible, root_cause

OnEvent = Callable[[dict[str, Any]], None]
OBJECT_STORE_BYTES = 200 * 2**20
"""Of a local Ray, for what is passed on its way; what workers share must be added."""
_MAX_FAILURES = 3


@contextlib.contextmanager
def ray_cluster(
    address: str | None, object_store_bytes: int = OBJECT_STORE_BYTES, num_cpus: int | None = None
) -> Iterator[str]:
    """A cluster to run on: the one at `address`, or a local one on free ports that ends with the block.

    Args:
        address: of a running cluster.
        object_store_bytes: of a local one.
        num_cpus: that a local one gives out; those of this machine if None.

    Yields:
        The address under which other processes join it.

    Raises:
        UserError: no cluster answers at `address`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # results alone belong on standard output
        if address is None:
            stack.enter_context(_local_token())
            folder = Path(tempfile.mkdtemp(prefix="meanet-ray-"))
            stack.callback(_remove, folder)
            options: dict[str, Any] = {
                "address": "local",
                "num_cpus": num_cpus or max(2, os.cpu_count() or 1),  # edge and cloud replica take one each
                "include_dashboard": False,
                "object_store_memory": object_store_bytes,
                "_temp_dir": str(folder),
            }
        else:
            options = {"address": address}
        try:
            _init(options)
        except Exception as error:  # Ray raises bare ones, too
            raise UserError(
                f"no Ray cluster can be used at {address or 'this machine'} ({str(error).splitlines()[0]}): start one "
                "with `ray start --head`, or unset RAY_ADDRESS to run locally"
            ) from error
        stack.callback(_disconnect, joined=address is not None)
        stack.enter_context(sigterm_ends_the_block())  # in place of Ray's
        yield str(ray.get_runtime_context().gcs_address)


def _init(options: dict[str, Any]) -> None:
    """Start or join a Ray; a local one in a second try, too: Ray gives its processes thirty seconds to come up, which a
    machine that is busy with other things may need."""
    begin = functools.partial(ray.init, log_to_driver=False, logging_level=logging.ERROR, namespace="meanet", **options)
    try:
        begin()
    except Exception as error:
        if "_temp_dir" not in options or "timed out during startup" not in str(error):
            raise
        _end_processes_of(options["_temp_dir"])
        begin()


def _end_processes_of(folder: str) -> None:
    """What a start that failed has left: Ray ends it with this process only, and it is in the way until then."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it is gone, or another user's
            if folder.encode() in command.read_bytes():
                os.kill(int(command.parent.name), signal.SIGKILL)


def _disconnect(*, joined: bool) -> None:
    """End what `ray.init` began. A cluster that was joined hears of it from the process's end, where that follows: Ray
    2.60 frees a driver's core worker while its replies to other nodes may wait for threads that nobody joins
    (`GetServerCallExecutor` of src/ray/rpc/server_call.h): SIGSEGV, after all the work was done. Its own workers it
    leaves standing, too (https://github.com/ray-project/ray/pull/18899)."""
    if not (joined and leave_at_once()):
        ray.shutdown()


def _remove(folder: Path) -> None:
    """Remove a local Ray's folder: its processes write until they are gone, a moment after the shutdown."""
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


@contextlib.contextmanager
def _local_token() -> Iterator[None]:
    """Token authentication with a 0600 file of our own; Ray's default writes a world-readable one.

    Raises:
        UserError: it is said to be off.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode and mode != "token":
        raise UserError(f"RAY_AUTH_MODE is {mode!r}: a Ray of ours wants a token; unset it, or set it to token")
    if mode:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="meanet-token-") as folder:
        path = Path(folder) / "token"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))
        _read_authentication_again()
        try:
            yield
        finally:
            del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]
            _read_authentication_again()


def _read_authentication_again() -> None:
    """`import ray` has read mode and token already; config first, as ray's own tests do it."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


class _Mailbox:
    """Carries events from the workers, wherever they run, to the driver."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


def _reporter(mailbox: Any) -> OnEpoch:
    """Every epoch is a checkpoint, and the driver hears of it."""

    def on_epoch(row: Epoch, state: State) -> None:
        metrics = asdict(row)
        if ray.train.get_context().get_world_rank():
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(state, Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
        _send(mailbox, {"event": "epoch", "at": time.time(), **metrics})

    return on_epoch


def _send(mailbox: Any, event: dict[str, Any]) -> None:
    """Tell the driver; rank 0 only."""
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(mailbox.put.remote(event))


def _train_loop(config: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(config["recipe"])
    splits: Splits = ray.get(config["splits"])  # pixels in memory are the object store's, shared by all workers
    checkpoint = _newer(ray.train.get_checkpoint(), config["unregistered"])
    state = load_state(checkpoint) if checkpoint else None
    worker = RayWorker(_reporter(config["mailbox"]))
    feed = resident_feed if isinstance(splits.table, ImageTable) else streaming_feed
    trainer = Trainer(recipe, splits, worker, state, feed)
    phases, nodes = config["phases"], _nodes(worker)
    _send(
        config["mailbox"],
        {
            "event": "start",
            "at": time.time(),
            "pid": os.getpid(),
            "workers": worker.world_size,
            "nodes": nodes,
            "phases": list(phases),
            "epochs_done": len(state.history) if state else 0,
            "resumed": state is not None,
        },
    )
    trainer.run(phases)


def _nodes(worker: RayWorker) -> list[str]:
    """Ray's ids of the nodes on which the group's workers run; called by every worker."""
    own = bytes.fromhex(ray.get_runtime_context().get_node_id())
    ids = torch.zeros(worker.world_size, len(own), device=worker.device)
    ids[worker.rank] = torch.tensor(list(own), dtype=torch.float32)
    return sorted({bytes(row).hex() for row in worker.total(ids).int().tolist()})  # each row has one that is not 0


def _newer(registered: Checkpoint | None, unregistered: Checkpoint | None) -> Checkpoint | None:
    """The one whose folder was named later: Ray Train names them by the time."""
    if registered is None or unregistered is None:
        return registered or unregistered
    return max(registered, unregistered, key=lambda one: Path(one.path).name)


def save_state(state: State, folder: Path) -> None:
    """Write a state as tensors and JSON types."""
    torch.save(asdict(state), folder / _STATE)


def load_state(checkpoint: Checkpoint) -> State:
    """Read a state; `weights_only` refuses anything that would unpickle code."""
    with checkpoint.as_directory() as folder:
        return State(**torch.load(Path(folder) / _STATE, weights_only=True, map_location="cpu"))


def _cluster_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def scaling(num_workers: int | None, *, streaming: bool, groups: int = 1) -> ScalingConfig:
    """Workers of the connected cluster and their CPUs; a streamed set leaves some to decode it.

    Args:
        num_workers: of a group; if None one a GPU, or one per two CPUs, of the group's share.
        streaming: whether the set is.
        groups: that share what there is, where `num_workers` does not say.

    Raises:
        UserError: no workers, or more than there are CPUs, or GPUs where there are any.
    """
    cpus, gpus = _cluster_cpus(), int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    workers = max(1, gpus // groups if gpus else cpus // (2 * groups)) if num_workers is None else num_workers
    kept = 1 if streaming else 0
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be 1 or more")
    if 0 < gpus < workers:
        raise UserError(f"{workers} workers asked for and the cluster has {gpus} GPUs, one a worker: lower --workers")
    if workers > cpus - kept:
        raise UserError(
            f"{workers} workers asked for and the cluster has {cpus} CPUs"
            + (", one of which must stay free to decode a streamed set" if streaming else "")
            + ": lower --workers or add nodes"
        )
    return ScalingConfig(
        num_workers=workers,
        use_gpu=0 < workers <= gpus,
        resources_per_worker={"CPU": min(2, (cpus - kept) // workers)},
    )


def phase_groups(num_workers: int | None, *, streaming: bool) -> tuple[tuple[str, ...], ...]:
    """Phases that are to be trained at the same time: all that do not wait for each other, where the connected cluster
    has for each group what one alone would take; else all phases in one group.

    Raises:
        UserError: as `scaling`.
    """
    alone = scaling(num_workers, streaming=streaming, groups=len(INDEPENDENT))
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = {"CPU": resources.get("CPU", 1) - streaming, "GPU": resources.get("GPU", 0)}
    taken = alone.total_resources
    enough = all(len(INDEPENDENT) * taken.get(name, 0) <= free[name] for name in free)
    return INDEPENDENT if enough else (PHASES,)


def train(
    recipe: Recipe,
    splits: Splits,
    *,
    storage: str,
    name: str,
    num_workers: int | None,
    on_event: OnEvent,
    parallel: bool = True,
) -> State:
    """Train all phases on the connected cluster; the same name and storage go on where they stopped, from the newest
    checkpoint that is whole.

    Args:
        recipe: what to train.
        splits: its images, divided.
        storage: absolute path or s3:// that every node can write.
        name: the run's name below `storage`.
        num_workers: data-parallel workers of a group; if None one a GPU, or one per two CPUs, shared by the groups.
        on_event: called in this process with `start` and `epoch` events as they arrive.
        parallel: whether phases that do not wait for each other may run at the same time (`phase_groups`).

    Raises:
        UserError: more workers than CPUs; or training failed for good.
    """
    streaming = not isinstance(splits.table, ImageTable)
    groups = phase_groups(num_workers, streaming=streaming) if parallel else (PHASES,)
    workers = scaling(num_workers, streaming=streaming, groups=len(groups))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()  # another node may be lost
    config = {"recipe": recipe.to_dict(), "mailbox": mailbox, "splits": ray.put(splits)}
    runs = [_Run(storage, name if phases[0] == PHASES[0] else f"{name}-{phases[0]}", phases) for phases in groups]
    with _forward(mailbox, on_event):
        try:
            states = interruptible(*(functools.partial(run.fit, config, workers) for run in runs))
        except ray.train.TrainingFailedError as error:
            raise UserError(f"training failed after {_MAX_FAILURES} restarts: {root_cause(error)}") from error
        except ray.exceptions.RayError as error:
            raise UserError(f"training could not be run: {root_cause(error)}") from error
    return states[0] if len(states) == 1 else merged(list(zip(groups, states, strict=True)))


@dataclass(frozen=True)
class _Run:
    """Of Ray Train: some phases, and where their checkpoints lie."""

    storage: str
    name: str
    phases: tuple[str, ...]

    def fit(self, config: dict[str, Any], workers: ScalingConfig) -> State:
        """Train them; returns the last checkpoint's state."""
        system, place = resolve(self.storage)  # ours, for it outwaits an outage of S3
        newest = checkpoints.tidied(self.storage, self.name)
        unregistered = Checkpoint(newest, system) if newest else None
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={**config, "phases": self.phases, "unregistered": unregistered},
            scaling_config=workers,
            run_config=RunConfig(
                name=self.name,
                storage_path=place,
                storage_filesystem=system,
                failure_config=FailureConfig(
                    max_failures=_MAX_FAILURES,
                    controller_failure_limit=_MAX_FAILURES,  # type: ignore[call-arg]  # Train V2's; the stub shows V1's
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        last = _newer(trainer.fit().checkpoint, unregistered)
        assert last is not None, "a finished run has a checkpoint"
        checkpoints.tidied(self.storage, self.name)
        return load_state(last)


@contextlib.contextmanager
def _forward(mailbox: Any, on_event: OnEvent) -> Iterator[None]:
    """Hand the mailbox's events to `on_event` in a thread, and the last ones at the end."""
    done = threading.Event()

    def drain() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # a lost mailbox costs the live view, never the run
            for event in ray.get(mailbox.take.remote()):
                on_event(event)

    def follow() -> None:
        while not done.wait(0.3):
            drain()

    thread = threading.Thread(target=follow, name="meanet-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        drain()
        ray.kill(mailbox)
