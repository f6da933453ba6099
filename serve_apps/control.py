"""The deployment that holds what all replicas are to be like, and what they have counted; no request passes through it.

What operators put is kept in Ray's internal key-value store, under a key of this build of the application: it lives as
long as the cluster that it describes, is there when MLflow is not, and a restart of this replica finds it again.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from meanet.errors import AwayError, UserError
from serve_apps.board import Board, Report, View
from serve_apps.director import Desired, Director, Orders, Outcome
from serve_apps.rollout import Beat
from serve_apps.settings import Settings
from serve_apps.wishes import PolicyWish

if TYPE_CHECKING:
    from meanet.tracking import Tracker

LOG = logging.getLogger("ray.serve.meanet")
FOLLOW_S = 5.0
"""How often MLflow is asked where the alias points, unless `user_config` says otherwise."""
_NAMESPACE = "meanet-control"
Reply = tuple[Outcome, dict[str, Any]]
"""What came of a change, and the state after it."""


@serve.deployment(
    name="control",
    num_replicas=1,
    max_ongoing_requests=4096,
    ray_actor_options={
        "num_cpus": 0,
        # A store that is away is asked again soon anyway; MLflow's own patience is minutes.
        "runtime_env": {"env_vars": {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}},
    },
)
class Control:
    """One replica; edges and clouds work on without it."""

    def __init__(self, tracking_uri: str, version: int, reference: str, key: str) -> None:
        """What is served at first.

        Args:
            tracking_uri: MLflow store.
            version: to serve.
            reference: the alias or number that led to it.
            key: of this build of the application.
        """
        LOG.setLevel(logging.INFO)
        self._tracking_uri, self._key = tracking_uri, key
        kept = _internal_kv_get(key, namespace=_NAMESPACE)
        first = int(time.time())  # no build's revisions are another's
        start = Desired.from_json(kept.decode()) if kept else Desired(first, reference, version, None, Settings())
        self._director = Director(start, self._resolve, self._save)
        self._board = Board()
        self._follow_s = FOLLOW_S
        self._following: asyncio.Task[None] | None = None
        self._tracker: Tracker | None = None

    def _resolve(self, reference: str) -> int:
        from meanet.tracking import Tracker  # brings MLflow and torch, which edge and cloud do without

        if self._tracker is None:  # once, for it asks the store some things first
            self._tracker = Tracker(self._tracking_uri)
        return self._tracker.version_of(reference)

    def _save(self, text: str) -> None:
        _internal_kv_put(self._key, text, overwrite=True, namespace=_NAMESPACE)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and when `user_config` changes.

        Raises:
            UserError: it makes no sense.
        """
        follow_s = _checked_follow_s(user_config.get("follow_s", FOLLOW_S))  # before any of it is kept
        await self._director.configure(user_config)
        self._follow_s = follow_s
        if self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._follow_s or FOLLOW_S)
            if self._follow_s:
                await self._director.follow()

    async def beat(self, beat: Beat) -> Orders:
        """A replica reports, and waits a moment for news."""
        return await self._director.hear(beat)

    async def report(self, report: Report) -> None:
        """Take an edge replica's counts."""
        self._board.report(report)

    async def board(self, report: Report) -> View:
        """Take them, and give what all edge replicas have counted."""
        self._board.report(report)
        return self._board.view()

    async def view(self) -> dict[str, Any]:
        """All that is known."""
        return self._director.view()

    async def change_settings(self, changes: dict[str, Any], wait_s: float) -> Reply:
        """See `Director.change_settings`."""
        return await self._reply(self._director.change_settings(changes, wait_s))

    async def change_policy(self, wish: PolicyWish | None, wait_s: float) -> Reply:
        """See `Director.change_policy`."""
        return await self._reply(self._director.change_policy(wish, wait_s))

    async def change_version(self, reference: str, wait_s: float) -> Reply:
        """See `Director.change_version`."""
        return await self._reply(self._director.change_version(reference, wait_s))

    async def _reply(self, change: Awaitable[Outcome]) -> Reply:
        """Refusals travel as values: an error would bring its stack along."""
        try:
            outcome = await change
        except UserError as error:
            away = isinstance(error, AwayError)
            outcome = Outcome(False, str(error), nonsense=not away, away=away)
        return outcome, self._director.view()


def _checked_follow_s(given: Any) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given < math.inf:
        raise UserError(f"user_config's follow_s is {given!r}: it must be a number of seconds, or 0 for never")
    return float(given)
