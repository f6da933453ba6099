"""Arrow streams from strangers: plain ones are read, whatever could grow or is broken is refused."""

import io
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.arrow import RefusedError, images_of

IMAGES = [b"one", b"", b"three" * 100]


def stream(column: Any, name: str = "image", chunk: int = 2, **options: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.table({name: column, "other": pa.nulls(len(column))})
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return sink.getvalue()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_columns_keep_order(kind: pa.DataType) -> None:
    assert images_of(stream(pa.array([*IMAGES, None], kind)), 10) == [*IMAGES, b""]
    assert images_of(stream(pa.array([], kind)), 10) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no whole"),
        (b"\xff" * 100, "no whole"),
        (stream(pa.array(IMAGES, pa.binary()), name="picture"), "no column `image`"),
        (stream(pa.array(["a", "b"])), "no column `image`"),
        (stream(pa.array(IMAGES * 10, pa.binary())), "more than 10 images"),
        (stream(pa.array([b"\0" * 10**6], pa.binary()), compression="zstd"), "compressed"),
        (stream(pa.array([b"\0" * 10**6], pa.binary()), compression="lz4"), "compressed"),
        (stream(pa.array(IMAGES, pa.binary()).dictionary_encode()), "dictionary|no column"),
        (stream(pa.array(IMAGES, pa.binary()))[:-150], "no whole"),
    ],
)
def test_others_are_refused(body: bytes, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        images_of(body, 10)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_never_raise_anything_else(data: st.DataObject) -> None:
    body = bytearray(stream(pa.array(IMAGES, pa.binary())))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        images = images_of(bytes(body), 10)
    except RefusedError:
        return
    assert sum(map(len, images)) <= len(body)
