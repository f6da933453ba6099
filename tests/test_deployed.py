"""What a deployment's YAML says is checked where it is read, before anything is kept or started."""

from pathlib import Path

import pytest

from meanet import tracking
from meanet.errors import UserError
from serve_apps import graph
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
