"""Who may write: the token's holder, or anybody on loopback where that was said; no other site's page."""

import dataclasses
from pathlib import Path

import pytest

from meanet.errors import UserError
from serve_apps.writes import Writes, is_loopback

TOKEN = "correct-horse-battery-staple"
BEARER = {"host": "127.0.0.1:8000", "authorization": f"Bearer {TOKEN}"}


def status(writes: Writes, headers: dict[str, str]) -> int:
    refusal = writes.refusal(headers)
    return 200 if refusal is None else refusal.status


def test_token_lets_through_and_nothing_else_does() -> None:
    writes = Writes.read({"MEANET_TOKEN": TOKEN}, open_writes=True, host="127.0.0.1")
    assert status(writes, BEARER) == 200
    assert status(writes, BEARER | {"authorization": f"bearer  {TOKEN}"}) == 200
    for wrong in ("", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \udcff", f"Bearer {writes.digest}"):
        refusal = writes.refusal(BEARER | {"authorization": wrong})
        assert refusal is not None
        assert refusal.status == 401
        assert refusal.headers["WWW-Authenticate"].startswith("Bearer realm=")
    missing = writes.refusal({"host": "127.0.0.1"})
    assert missing is not None
    assert missing.headers["WWW-Authenticate"] == 'Bearer realm="meanet"'


def test_token_is_kept_nowhere_and_never_repeated() -> None:
    writes = Writes.read({"MEANET_TOKEN": TOKEN})
    refusal = writes.refusal(BEARER | {"authorization": f"Bearer {TOKEN}2"})
    assert TOKEN not in repr(writes) + str(dataclasses.asdict(writes)) + repr(refusal)


def test_without_a_token_writes_are_off_but_for_loopback_where_said() -> None:
    assert status(Writes.read({}), BEARER) == 403
    opened = Writes.read({}, open_writes=True, host="127.0.0.1")
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert status(opened, {"host": host}) == 200
    for host in ("", "rebound.example:8000", "192.168.0.7:8000", "[", "[::1", "[v1.a]:8000"):
        assert status(opened, {"host": host}) == 403, "a name that an attacker's DNS points here"
    for host in ("0.0.0.0", "192.168.0.7", None):
        with pytest.raises(UserError, match="open writes on"):
            Writes.read({}, open_writes=True, host=host)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "http://["},
        {"origin": "http://[", "host": "["},
        {"origin": "http://[no address]"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_pages_of_other_sites_may_not_write_even_with_the_token(headers: dict[str, str]) -> None:
    assert status(Writes.read({"MEANET_TOKEN": TOKEN}), BEARER | headers) == 403


def test_the_servers_own_page_may() -> None:
    headers = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}
    assert status(Writes.read({"MEANET_TOKEN": TOKEN}), BEARER | headers) == 200


def test_token_may_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert Writes.read({"MEANET_TOKEN_FILE": str(path)}) == Writes.read({"MEANET_TOKEN": TOKEN})
    with pytest.raises(UserError, match="cannot be read"):
        Writes.read({"MEANET_TOKEN_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("token", ["", "short", "with spaces in the middle", "not-ascii-ä-not-ascii"])
def test_weak_tokens_are_refused(token: str) -> None:
    with pytest.raises(UserError, match="write token") as error:
        Writes.read({"MEANET_TOKEN": token})
    assert not token or token not in str(error.value)


def test_loopback_names() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))
