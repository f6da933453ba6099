"""What Ray Train and Ray Tune share here: a worker as the loop sees it, and a driver that can be interrupted."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TypeVar

import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from torch import nn

from meanet.loop import Epoch, State

OnEpoch = Callable[[Epoch, State], None]
T = TypeVar("T")


class RayWorker:
    """A Ray Train worker as the loop sees it."""

    def __init__(self, on_epoch: OnEpoch) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        self._on_epoch = on_epoch

    def wrap(self, module: nn.Module) -> nn.Module:
        """Buffers are not sent round every step: `synchronise` does it where they matter, at an epoch's end."""
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True} if self.world_size > 1 else None
        wrapped: nn.Module = prepare_model(module, parallel_strategy_kwargs=options)
        return wrapped

    def synchronise(self, module: nn.Module) -> None:
        """The first worker's buffers to all."""
        if self.world_size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum over all workers."""
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        return counts

    def report(self, row: Epoch, state: State) -> None:
        """Called by every worker."""
        self._on_epoch(row, state)


def interruptible(*fits: Callable[[], T]) -> list[T]:
    """Run these at the same time so that Ctrl-C reaches us: in the main thread, Ray would install a handler that
    swallows it. The first that fails is raised at once."""
    outcomes: list[Future[T]] = [Future() for _ in fits]

    def run(fit: Callable[[], T], outcome: Future[T]) -> None:
        try:
            outcome.set_result(fit())
        except BaseException as error:  # handed on to the waiting thread, whatever it is
            outcome.set_exception(error)

    for fit, outcome in zip(fits, outcomes, strict=True):
        threading.Thread(target=run, args=(fit, outcome), name="meanet-fit", daemon=True).start()
    left = set(outcomes)
    while left:  # with a time limit, for a wait without one is not interrupted
        done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
        for outcome in done:
            outcome.result()
    return [outcome.result() for outcome in outcomes]


def root_cause(error: BaseException) -> str:
    """The last line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
