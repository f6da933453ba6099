"""What a deployment's YAML says is checked where it is read, before anything is kept or started."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from meanet import tracking
from meanet.errors import UserError
from serve_apps import control, graph
from serve_apps.graph import AppArgs, app

asked = list[str]()


class Store:
    """Of a registry that has version 3 under every name."""

    def __init__(self, uri: str) -> None:
        asked.append(uri)

    def version_of(self, _reference: str) -> int:
        return 3


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    monkeypatch.setattr(tracking, "Tracker", Store)
    monkeypatch.setattr(graph, "_get_global_client", lambda **_words: None)


def test_password_in_the_stores_address_reaches_neither_store_nor_cluster() -> None:
    with pytest.raises(
        UserError, match=r"^tracking_uri holds a password for mlflow.*MLFLOW_TRACKING_PASSWORD"
    ) as refused:
        app(AppArgs(tracking_uri="https://me:s3cret@mlflow:5000"))
    assert "s3cret" not in str(refused.value)
    assert asked == []


def test_replicas_are_given_the_stores_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    links = app(AppArgs(tracking_uri="sqlite:///mlflow.db"))._bound_deployment.init_args[0]
    told = links.control._bound_deployment.init_args
    assert [*asked, links.tracking_uri, told[0]] == [f"sqlite:///{tmp_path}/mlflow.db"] * 3
    assert links.version == told[1] == 3


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What control has kept."""
    found = list[str]()
    monkeypatch.setattr(control, "_internal_kv_get", lambda _key, **_words: None)
    monkeypatch.setattr(control, "_internal_kv_put", lambda _key, text, **_words: found.append(text))
    return found


@pytest.mark.parametrize("follow_s", [-1, "often", "5", None, True, float("nan"), float("inf")])
def test_user_config_that_follows_at_no_time_is_refused_as_a_whole(kept: list[str], follow_s: Any) -> None:
    async def run() -> None:
        deployment: Any = control.Control
        one = deployment.func_or_class("sqlite:///x", 3, "champion", "key")
        before = one._director.desired
        with pytest.raises(
            UserError, match=f"follow_s is {follow_s!r}: it must be a number of seconds, or 0 for never"
        ):
            await one.reconfigure({"settings": {"deadline_s": 3.0}, "follow_s": follow_s})
        assert (one._director.desired, kept) == (before, [])
        await one.reconfigure({"settings": {"deadline_s": 3.0}, "follow_s": 0})
        assert one._director.desired.settings.deadline_s == 3.0
        assert (one._follow_s, len(kept)) == (0.0, 1)
        one._following.cancel()

    asyncio.run(run())
