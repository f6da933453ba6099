"""A replica's side of live changes: it reports, loads what it is to hold beside its work, and applies what it is told.

Whatever fails here costs the replica its news, never its work.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from meanet.errors import UserError
from serve_apps.director import Orders
from serve_apps.rollout import Beat, Place

LOG = logging.getLogger("ray.serve.meanet")
Loaded = TypeVar("Loaded")
_ANSWER_S = 10.0
"""A control that has not answered by then is asked anew."""
_AGAIN_S = 0.5
_BUSY_S = 0.1


@dataclass
class Follower(Generic[Loaded]):
    """Of one replica."""

    place: Place
    replica: str
    """Its name."""
    node: str
    ask: Callable[[Beat], Awaitable[Orders]]
    """The call to control."""
    load: Callable[[int, dict[int, Loaded]], Loaded]
    """A version, and those that are loaded already; takes long, runs in a thread."""
    apply: Callable[[Orders, Loaded], None]
    """Do from now on as told, with the version to serve; quick."""
    report: Callable[[], dict[str, Any]]
    """What control is to know; quick."""
    held: dict[int, Loaded] = field(default_factory=dict)
    """By version."""
    serving: int | None = None
    _orders: Orders | None = None
    _revision: int = -1
    _failed: dict[int, str] = field(default_factory=dict)
    _loading: "asyncio.Task[None] | None" = None
    _running: "asyncio.Task[None] | None" = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self, fallback: int, timeout_s: float = 30.0) -> None:
        """Begin; returns once a version is served: what control says, or the fallback where it does not answer.

        Raises:
            UserError: the version cannot be loaded.
        """
        LOG.setLevel(logging.INFO)
        self._running = asyncio.get_running_loop().create_task(self._run())
        asked = asyncio.get_running_loop().time()
        while not self._ready.is_set():
            await asyncio.wait({asyncio.ensure_future(self._ready.wait())}, timeout=0.1)
            if self._orders is not None and self._orders.serve in self._failed:
                raise UserError(self._failed[self._orders.serve])
            silent = self._orders is None and asyncio.get_running_loop().time() - asked > timeout_s
            if silent:
                LOG.warning("control does not answer: version %d is served until it does", fallback)
                await self.ensure(fallback)
                return

    def stop(self) -> None:
        """Report no more."""
        if self._running:
            self._running.cancel()

    async def ensure(self, version: int) -> Loaded:
        """A version, loaded now if it is not yet.

        Raises:
            UserError: it cannot be loaded.
        """
        if version not in self.held:
            async with self._lock:  # one at a time: each takes a thread and a network's memory
                if version not in self.held:
                    self.held[version] = await asyncio.to_thread(self.load, version, dict(self.held))
        return self.held[version]

    def beat(self) -> Beat:
        """What this replica says of itself."""
        told = () if self._orders is None else self._orders.hold
        return Beat(
            self.replica,
            self.place,
            self.node,
            self._revision,
            tuple(sorted(self.held)),
            told,
            self.serving if self.place == "edge" else None,
            dict(self._failed),
            self.report(),
        )

    async def _run(self) -> None:
        while True:
            try:
                orders = await asyncio.wait_for(self.ask(self.beat()), _ANSWER_S)
                self._take(orders)
            except Exception as error:  # control is away, or of another mind: go on as before
                LOG.debug("control could not be followed: %s", error)
                await asyncio.sleep(_AGAIN_S)
            if self._loading is not None:
                await asyncio.wait({self._loading}, timeout=_BUSY_S)
            elif self._orders is not None and self._orders.revision != self._revision:  # it cannot be applied
                await asyncio.sleep(_AGAIN_S)

    def _take(self, orders: Orders) -> None:
        self._orders = orders
        self._failed = {version: why for version, why in self._failed.items() if version in orders.hold}
        for version in set(self.held) - {*orders.hold, self.serving}:
            del self.held[version]
        if set(orders.hold) - set(self.held) - set(self._failed) and self._loading is None:
            self._loading = asyncio.get_running_loop().create_task(self._load_missing())
        self._settle()

    async def _load_missing(self) -> None:
        try:
            while self._orders is not None:
                missing = [v for v in self._orders.hold if v not in self.held and v not in self._failed]
                if not missing:
                    return
                version = self._orders.serve if self._orders.serve in missing else missing[0]
                try:
                    await self.ensure(version)
                except Exception as error:  # the version is at fault, whatever it is
                    LOG.warning("version %d cannot be loaded: %s", version, error)
                    self._failed[version] = str(error) or type(error).__name__
                self._settle()
        finally:
            self._loading = None

    def _settle(self) -> None:
        """Apply the orders in hand, once what they name is loaded."""
        orders = self._orders
        if orders is None or orders.revision == self._revision or orders.serve not in self.held:
            return
        self.apply(orders, self.held[orders.serve])
        self.serving, self._revision = orders.serve, orders.revision
        self._ready.set()
