"""The desired state and the replicas that follow it, all in one event loop: no Ray, no network, no model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from meanet.errors import UserError
from serve_apps.director import Desired, Director, Orders
from serve_apps.follower import Follower
from serve_apps.rollout import Beat, Place
from serve_apps.settings import Settings
from serve_apps.wishes import PolicyWish

SHORT = {"grace_s": 0.1, "forget_s": 0.5}


class Store:
    """A registry of three versions, and what the director saves."""

    def __init__(self) -> None:
        self.aliases = {"champion": 1}
        self.away = False
        self.broken: dict[str, set[int]] = {}
        self.saved = Desired(0, "champion", 1, None, Settings()).to_json()

    def resolve(self, reference: str) -> int:
        if self.away:
            raise UserError("the store does not answer")
        version = int(reference) if reference.isdigit() else self.aliases[reference]
        if version > 3:
            raise UserError(f"there is no version {version}")
        return version

    def save(self, text: str) -> None:
        self.saved = text


class House:
    """A director and its replicas."""

    def __init__(self) -> None:
        self.store = Store()
        self.director = self.start()
        self.followers: dict[str, Follower[str]] = {}
        self.applied: dict[str, list[Orders]] = {}

    def start(self) -> Director:
        self.director = Director(
            Desired.from_json(self.store.saved), self.store.resolve, self.store.save, linger_s=5.0, **SHORT
        )
        return self.director

    async def hear(self, beat: Beat) -> Orders:
        return await self.director.hear(beat)

    async def add(self, place: Place, name: str) -> Follower[str]:
        def load(version: int, held: dict[int, str]) -> str:
            if version in self.store.broken.get(name, ()):
                raise UserError("its weights are cut off")
            return f"network {version}"

        def apply(orders: Orders, loaded: str) -> None:
            assert loaded == f"network {orders.serve}"
            self.applied.setdefault(name, []).append(orders)

        follower = Follower(place, name, "node", self.hear, load, apply, lambda: {"answers": 0})
        self.followers[name] = follower
        await follower.start(fallback=1)
        return follower


@contextlib.asynccontextmanager
async def house() -> AsyncIterator[House]:
    made = House()
    try:
        for place, name in (("edge", "e0"), ("edge", "e1"), ("cloud", "c0")):
            await made.add(place, name)  # type: ignore[arg-type]
        await asyncio.sleep(0.2)
        yield made
    finally:
        for follower in made.followers.values():
            follower.stop()
        await asyncio.sleep(0)


def within_a_house(test: Callable[[House], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def inside() -> None:
            async with house() as made:
                await asyncio.wait_for(test(made), 30)

        asyncio.run(inside())

    run.__name__ = test.__name__
    return run


@within_a_house
async def test_settings_reach_every_replica_before_the_change_is_done(made: House) -> None:
    outcome = await made.director.change_settings({"deadline_s": 1.5}, 5.0)
    assert outcome.done
    assert {applied[-1].settings.deadline_s for applied in made.applied.values()} == {1.5}
    view = made.director.view()
    assert view["settings"]["deadline_s"] == 1.5
    assert len(view["replicas"]) == 3
    assert all(replica["has_it"] for replica in view["replicas"])
    with pytest.raises(UserError, match="deadline_s is -1"):
        await made.director.change_settings({"deadline_s": -1}, 5.0)


@within_a_house
async def test_version_rolls_out_and_its_policy_starts_afresh(made: House) -> None:
    assert (await made.director.change_policy(PolicyWish(1, thresholds=(0.5,)), 5.0)).done
    assert made.applied["e0"][-1].policy == PolicyWish(1, thresholds=(0.5,))
    outcome = await made.director.change_version("2", 10.0)
    assert outcome.done
    assert (outcome.refused, made.director.plan.phase, made.director.desired.version) == (None, "idle", 2)
    assert all(made.followers[name].serving == 2 for name in ("e0", "e1"))
    assert all(2 in follower.held for follower in made.followers.values())
    assert made.applied["e0"][-1].policy is None, "thresholds are a version's own"
    for applied in made.applied.values():
        assert all(orders.policy is None or orders.policy.version == orders.serve for orders in applied)
    late = await made.director.change_policy(PolicyWish(1, thresholds=(0.5,)), 5.0)
    assert late.refused is not None
    assert "version 2 is served" in late.refused


@within_a_house
async def test_version_that_one_replica_cannot_load_is_refused_everywhere(made: House) -> None:
    made.store.broken = {"c0": {2}}
    before = made.director.desired
    outcome = await made.director.change_version("2", 10.0)
    assert outcome.refused is not None
    assert "cloud replica: its weights are cut off" in outcome.refused
    assert made.director.desired == before
    assert made.director.view()["reference"] == "champion"
    assert {made.followers[name].serving for name in ("e0", "e1")} == {1}
    made.store.broken = {}
    assert (await made.director.change_version("2", 10.0)).done, "asked for again, it is tried again"
    with pytest.raises(UserError, match="no version 9"):
        await made.director.change_version("9", 1.0)


@within_a_house
async def test_change_that_a_replica_does_not_confirm_goes_on(made: House) -> None:
    made.followers["c0"].stop()
    assert not (await made.director.change_settings({"deadline_s": 1.5}, 0.2)).done
    assert (await made.director.change_settings({"deadline_s": 1.6}, 5.0)).done, "it is forgotten after a while"
    assert (await made.director.change_version("3", 5.0)).done


@within_a_house
async def test_alias_is_followed_and_a_store_that_is_away_changes_nothing(made: House) -> None:
    await made.director.follow()
    assert made.director.plan.target is None
    made.store.away = True
    made.store.aliases["champion"] = 2
    await made.director.follow()
    assert made.director.plan.target is None
    made.store.away = False
    await made.director.follow()
    assert (await made.director.change_version("champion", 10.0)).done
    assert made.director.desired.version == 2


@within_a_house
async def test_version_that_cannot_be_loaded_is_not_tried_again_until_the_alias_moves(made: House) -> None:
    made.store.broken = {"e1": {2}}
    made.store.aliases["champion"] = 2
    await made.director.follow()
    await made.director._until(lambda: bool(made.director.plan.refused), 5.0)
    made.store.broken = {}
    await made.director.follow()
    assert made.director.plan.target is None
    for version in (1, 2):
        made.store.aliases["champion"] = version
        await made.director.follow()
    assert made.director.plan.target == 2


@within_a_house
async def test_number_is_not_followed_and_the_alias_may_be_again(made: House) -> None:
    await made.director.change_version("1", 5.0)
    made.store.aliases["champion"] = 3
    await made.director.follow()
    assert made.director.plan.target is None
    assert (await made.director.change_version("champion", 10.0)).done
    assert made.director.desired.version == 3


@within_a_house
async def test_new_control_goes_on_where_the_old_one_was(made: House) -> None:
    config: dict[str, Any] = {"settings": {"deadline_s": 3.0}, "version": "champion"}
    await made.director.configure(config)
    assert (await made.director.change_version("2", 10.0)).done
    await made.director.change_settings({"deadline_s": 1.5}, 5.0)
    await made.director.change_policy(PolicyWish(2, thresholds=(0.25,), edge_only=True), 5.0)
    before = made.director.desired
    made.start()
    await made.director.configure(config)
    assert made.director.desired == before, "the same user_config undoes nothing that was put"
    assert made.director.view()["reference"] == "2"
    assert (await made.director.change_settings({"breaker_failures": 4}, 5.0)).done
    assert made.applied["c0"][-1].settings.breaker_failures == 4
    await made.director.configure(config | {"settings": {"deadline_s": 4.0}})
    assert (made.director.desired.settings.deadline_s, made.director.desired.settings.breaker_failures) == (4.0, 3)


@within_a_house
async def test_new_replica_serves_what_is_served_and_not_what_it_was_deployed_with(made: House) -> None:
    assert (await made.director.change_version("2", 10.0)).done
    follower = await made.add("edge", "e2")
    assert follower.serving == 2
    assert made.applied["e2"][0].serve == 2


@within_a_house
async def test_replica_without_control_serves_its_fallback_and_joins_later(made: House) -> None:
    async def nobody(beat: Beat) -> Orders:
        raise ConnectionError(beat.replica)

    lonely = Follower(
        "cloud", "c9", "node", nobody, lambda version, held: f"n{version}", lambda orders, one: None, dict
    )
    await lonely.start(fallback=1, timeout_s=0.2)
    assert lonely.held == {1: "n1"}
    lonely.ask = made.hear
    assert (await made.director.change_version("2", 10.0)).done
    while 2 not in lonely.held:  # the house's time limit ends it otherwise
        await asyncio.sleep(0.05)
    lonely.stop()


@within_a_house
async def test_nonsense_in_user_config_is_refused(made: House) -> None:
    with pytest.raises(UserError, match="user_config has colour"):
        await made.director.configure({"colour": 1})
    with pytest.raises(UserError, match="deadline"):
        await made.director.configure({"settings": {"deadline": 1}})
