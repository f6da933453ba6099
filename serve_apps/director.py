"""The desired state of all replicas, and how far they have it; apart from Ray.

It changes by what operators put, by what the deployment's `user_config` says, and by MLflow's alias; replicas report
with `hear` and are told what to do. What was put outlives this process in a small store.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from meanet.errors import UserError
from serve_apps.rollout import Beat, Plan
from serve_apps.settings import Settings
from serve_apps.wishes import PolicyWish

LOG = logging.getLogger("ray.serve.meanet")


@dataclass(frozen=True)
class Orders:
    """What a replica is to do."""

    revision: int
    serve: int
    hold: tuple[int, ...]
    """Versions, `serve` among them."""
    policy: PolicyWish | None
    settings: Settings


@dataclass(frozen=True)
class Desired:
    """What replicas are to be like."""

    revision: int
    """Counts the changes."""
    reference: str
    """An alias that is followed, or a version's number."""
    version: int
    """That is served."""
    policy: PolicyWish | None
    settings: Settings
    configured: str = ""
    """Digest of the `user_config` that was taken over last: a restart brings the same one, and changes nothing."""

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Desired":
        """Back from the store."""
        plain = json.loads(text)
        policy = None if plain["policy"] is None else PolicyWish.of(plain["policy"])
        return Desired(**{**plain, "policy": policy, "settings": Settings().updated(plain["settings"])})


@dataclass(frozen=True)
class Outcome:
    """Of a change."""

    done: bool
    """Every replica that answers has it; else it goes on."""
    refused: str | None = None
    """Why it was not made; the state before stands."""
    nonsense: bool = False
    """It could never be made; else it might at another time."""
    away: bool = False
    """What it needs does not answer now."""


class Director:
    """One a deployment. All methods run on one event loop."""

    def __init__(
        self,
        start: Desired,
        resolve: Callable[[str], int],
        save: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        **plan: float,
    ) -> None:
        """Starts from a state.

        Args:
            start: from the store, or what the deployment began with.
            resolve: a version's number or alias -> number; may take long and raise UserError.
            save: keeps the state's JSON.
            clock: monotonic, s.
            plan: limits of `Plan`.
        """
        self.desired = start
        self.plan = Plan(start.version, clock=clock, **plan)
        self._resolve, self._save, self._clock = resolve, save, clock
        self._moved = asyncio.Event()
        self._reference = start.reference
        self._alias_at: int | None = None
        self._ready = clock() + plan.get("grace_s", 2.0)
        self._configure_plan()

    def orders(self) -> Orders:
        """What every replica is told now."""
        wanted = self.desired
        return Orders(wanted.revision, wanted.version, self.plan.hold, wanted.policy, wanted.settings)

    async def hear(self, beat: Beat, wait_s: float = 2.0) -> Orders:
        """A replica reports; it is answered as soon as there is news for it, after `wait_s` at the latest."""
        self.plan.hear(beat)
        self._step()
        if not beat.busy and beat.revision == self.desired.revision:
            known = beat.revision, beat.told
            await self._until(lambda: (self.desired.revision, self.plan.hold) != known, wait_s, look_s=0.5)
        return self.orders()

    # Changes

    async def configure(self, user_config: Mapping[str, Any]) -> None:
        """Take over a `user_config`, unless it is the one that was taken over last.

        Raises:
            UserError: it makes no sense.
        """
        digest = hashlib.sha256(json.dumps(user_config, sort_keys=True).encode()).hexdigest()[:16]
        unknown = set(user_config) - {"settings", "version", "follow_s"}
        if unknown:
            raise UserError(f"user_config has {', '.join(sorted(unknown))}: it takes settings, version and follow_s")
        if digest == self.desired.configured:
            return
        settings = Settings().updated(user_config.get("settings") or {})
        first, reference = not self.desired.configured, user_config.get("version")
        self._change(settings=settings, configured=digest)
        if reference is not None and not first:
            await self.change_version(str(reference), 0.0)

    async def change_settings(self, changes: Mapping[str, Any], wait_s: float) -> Outcome:
        """Change some settings.

        Raises:
            UserError: they make no sense.
        """
        self._change(settings=self.desired.settings.updated(changes))
        return await self._applied(wait_s)

    async def change_policy(self, wish: PolicyWish | None, wait_s: float) -> Outcome:
        """Put a policy in the operating point's place; None = back to that."""
        if wish is not None and wish.version != self.desired.version:
            return Outcome(False, f"version {self.desired.version} is served by now, not {wish.version}: put it again")
        self._change(policy=wish)
        return await self._applied(wait_s)

    async def change_version(self, reference: str, wait_s: float) -> Outcome:
        """Serve another version, or follow an alias.

        Raises:
            UserError: there is no such version; the store does not answer.
        """
        version = await asyncio.to_thread(self._resolve, reference)
        self._reference = reference
        self._start(version)
        settled = await self._until(lambda: version in self.plan.refused or self._settled(version), wait_s)
        if version in self.plan.refused:
            return Outcome(False, f"version {version} is refused: {self.plan.refused[version]}")
        if version not in (self.plan.target, self.desired.version):
            return Outcome(False, f"version {version} was given up for another one that was asked for meanwhile")
        return Outcome(settled)

    async def follow(self) -> None:
        """Look once where the alias points, and roll that version out; a store that is away changes nothing."""
        if self._reference.isdigit():
            return
        reference = self._reference
        try:
            version = await asyncio.to_thread(self._resolve, reference)
        except Exception as error:  # whatever a lost store raises
            LOG.debug("the alias %s could not be looked up: %s", reference, error)
            return
        if reference != self._reference:
            return
        if version != self._alias_at:
            self._alias_at = version
            self.plan.refused.clear()
        if version not in self.plan.refused and version not in (self.desired.version, self.plan.target):
            LOG.info("%s is version %d now: it is rolled out", reference, version)
            self._start(version)

    # What is known

    def view(self) -> dict[str, Any]:
        """All of it, plain."""
        return {
            "revision": self.desired.revision,
            "reference": self._reference,
            "version": self.desired.version,
            "phase": self.plan.phase,
            "target": self.plan.target,
            "refused": {str(version): reason for version, reason in self.plan.refused.items()},
            "policy": None if self.desired.policy is None else self.desired.policy.to_dict(),
            "settings": self.desired.settings.to_dict(),
            "replicas": [
                {
                    "replica": beat.replica,
                    "place": beat.place,
                    "node": beat.node,
                    "revision": beat.revision,
                    "versions": list(beat.held),
                    "serving": beat.serving,
                    "has_it": beat.revision == self.desired.revision,
                    **beat.report,
                }
                for beat in sorted(self.plan.members, key=lambda beat: (beat.place, beat.replica))
            ],
        }

    def _start(self, version: int) -> None:
        self.plan.start(version)
        if self.plan.target is None:
            self._change(reference=self._reference)
        self._step()
        self._notify()

    def _step(self) -> None:
        before = self.plan.target, self.plan.hold
        if self.plan.step():
            LOG.info("version %d is served in place of %d", self.plan.serving, self.desired.version)
            self._change(version=self.plan.serving, policy=None, reference=self._reference)
        elif before[0] is not None and self.plan.target is None:
            LOG.error("version %d is refused: %s", before[0], self.plan.refused[before[0]])
            self._reference = self.desired.reference
        if before != (self.plan.target, self.plan.hold):
            self._notify()

    def _change(self, **fields: Any) -> None:
        self.desired = replace(self.desired, revision=self.desired.revision + 1, **fields)
        self._configure_plan()
        self._save(self.desired.to_json())
        self._notify()

    def _configure_plan(self) -> None:
        self.plan.linger_s = max(5.0, 1.0 + self.desired.settings.deadline_s)

    def _notify(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def _until(self, reached: Callable[[], bool], wait_s: float, look_s: float = 0.2) -> bool:
        """Wait for something that reports and changes bring about; whether it came in time."""
        deadline = self._clock() + wait_s
        while not reached():
            left = deadline - self._clock()
            if left <= 0:
                return False
            moved = self._moved
            try:
                await asyncio.wait_for(moved.wait(), min(left, look_s))  # replicas fall silent without a notice
            except TimeoutError:
                self._step()
        return True

    async def _applied(self, wait_s: float) -> Outcome:
        revision = self.desired.revision
        return Outcome(await self._until(lambda: self._have(revision), wait_s))

    def _have(self, revision: int) -> bool:
        """Whether every replica that serves has this revision or a later one."""
        edges = [beat for beat in self.plan.members if beat.place == "edge" and beat.serving is not None]
        known = bool(edges) and self._clock() >= self._ready
        return known and all(beat.revision >= revision for beat in self.plan.members if beat.revision >= 0)

    def _settled(self, version: int) -> bool:
        """Whether every replica serves this version, and nothing is on its way any more."""
        return self.plan.phase == "idle" and self.desired.version == version and self._have(self.desired.revision)
