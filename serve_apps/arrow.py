"""The images of an Arrow IPC stream from a stranger: nothing in it may grow beyond the bytes that were sent.

Compressed buffers, dictionaries and run-length encodings could; they are refused, the first before decoding.
"""

import struct

import pyarrow as pa

_RECORD_BATCH = 3
_PLAIN = (pa.binary(), pa.large_binary())


class RefusedError(ValueError):
    """A stream that is not taken; the message says why."""


def images_of(body: bytes, limit: int) -> list[bytes]:
    """The values of the column `image`, in order; empty bytes where it is null.

    Raises:
        RefusedError: no whole stream, no such plain column, compressed, or more than `limit` rows.
    """
    try:
        _refuse_compression(body)
        return _read(body, limit)
    except RefusedError:
        raise
    except Exception as error:  # pyarrow raises many kinds over damaged bytes: each means the same
        raise RefusedError(f"it is no whole Arrow IPC stream ({type(error).__name__})") from error


def _refuse_compression(body: bytes) -> None:
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type == "dictionary" or _is_compressed(message.metadata.to_pybytes()):
            raise RefusedError("compressed or dictionary-encoded batches are not taken: send plain ones")


def _read(body: bytes, limit: int) -> list[bytes]:
    images: list[bytes] = []
    with pa.ipc.open_stream(body) as reader:
        if "image" not in reader.schema.names or reader.schema.field("image").type not in _PLAIN:
            raise RefusedError("there is no column `image` of type binary")
        for batch in reader:
            if len(images) + batch.num_rows > limit:
                raise RefusedError(f"there are more than {limit} images")
            column = batch.column("image")
            column.validate(full=True)
            images += [image or b"" for image in column.to_pylist()]
    return images


def _is_compressed(metadata: bytes) -> bool:
    """Whether a Message is a RecordBatch with the field `compression` (https://arrow.apache.org: Message.fbs)."""
    message = struct.unpack_from("<I", metadata)[0]
    kind, header = _field(metadata, message, 1), _field(metadata, message, 2)
    if not kind or not header or metadata[kind] != _RECORD_BATCH:
        return False
    return _field(metadata, header + struct.unpack_from("<I", metadata, header)[0], 3) != 0


def _field(data: bytes, table: int, number: int) -> int:
    """Position of a flatbuffers table's field; 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    if vtable < 0 or slot >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + slot)[0]
    return table + offset if offset else 0
