"""Forms from strangers: their files in order, or a refusal that says why."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.multipart import RefusedError, files_of


def form(files: list[bytes], fields: int = 0) -> tuple[bytes, str]:
    request = httpx.Request(
        "POST",
        "http://x",
        files=[("image", (f"{n}.png", content, "image/png")) for n, content in enumerate(files)],
        data={f"field{n}": "value" for n in range(fields)},
    )
    return request.read(), request.headers["content-type"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300) | st.just(b"\r\n--\r\n"), min_size=1, max_size=20))
def test_files_come_out_as_they_went_in(files: list[bytes]) -> None:
    body, kind = form(files, fields=3)
    assert files_of(body, kind, 20, 300) == files


def test_a_file_of_many_megabytes_is_whole() -> None:
    files = [bytes(range(256)) * 20_000, b"small"]
    body, kind = form(files)
    assert files_of(body, kind, 2, 6_000_000) == files


@pytest.mark.parametrize(
    ("files", "fields", "says"),
    [([b"a"] * 5, 0, "Too many files"), ([b"a" * 101], 0, "maximum size of 100"), ([b"a"], 17, "Too many fields")],
)
def test_what_is_too_much_is_refused(files: list[bytes], fields: int, says: str) -> None:
    body, kind = form(files, fields)
    with pytest.raises(RefusedError, match=says):
        files_of(body, kind, 4, 100)


def test_what_is_no_form_is_refused() -> None:
    body, kind = form([b"a" * 50])
    with pytest.raises(RefusedError, match="boundary"):
        files_of(body, "multipart/form-data", 4, 100)
    with pytest.raises(RefusedError, match="cut off"):
        files_of(body[:-40], kind, 4, 100)
    with pytest.raises(RefusedError):
        files_of(b"no form", kind, 4, 100)
    long = body.replace(b"image/png", b"x" * 5000)
    with pytest.raises(RefusedError, match="Maximum header size"):
        files_of(long, kind, 4, 100)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_refused_or_read_and_never_more_than_was_sent(data: st.DataObject) -> None:
    body, kind = form([b"abc", b"defg"])
    place = data.draw(st.integers(0, len(body) - 1))
    damaged = body[:place] + data.draw(st.binary(max_size=4)) + body[place + data.draw(st.integers(0, 4)) :]
    try:
        found = files_of(damaged, kind, 4, 100)
    except RefusedError:
        return
    assert sum(map(len, found)) <= len(damaged)
