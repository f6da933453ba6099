"""The files of a form from a stranger, by python-multipart's parser and without a spooled file for each: of images of a
few kilobytes that would be most of the cost."""

from collections.abc import Mapping
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

_MAX_FIELDS = 16
_PARSED_BYTES = 1 << 20


class RefusedError(ValueError):
    """A form that is not taken; the message says why."""


def files_of(body: bytes, content_type: str, max_files: int, max_file_bytes: int) -> list[bytes]:
    """The contents of the parts that have a file name, in order.

    Raises:
        RefusedError: no whole form, or more or larger parts than that.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RefusedError("Missing boundary in multipart.")
    form = _Form(max_files, max_file_bytes)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        for start in range(0, len(body), _PARSED_BYTES):
            parser.write(body[start : start + _PARSED_BYTES])
        parser.finalize()
    except FormParserError as error:
        raise RefusedError(str(error)) from error
    if not form.ended:
        raise RefusedError("the form is cut off before its last boundary")
    return form.files


class _Form:
    """What the parser tells, part by part."""

    def __init__(self, max_files: int, max_file_bytes: int) -> None:
        self.files: list[bytes] = []
        self.ended = False
        self._fields = 0
        self._max_files, self._max_file_bytes = max_files, max_file_bytes
        self._begin()

    def callbacks(self) -> Any:
        """By the parser's names."""
        told: Mapping[str, Any] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        return told

    def _begin(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._field = self._value = self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > self._max_file_bytes:
            raise RefusedError(f"Part exceeded maximum size of {self._max_file_bytes} bytes.")
        self._chunks.append(data[start:end])

    def _part_end(self) -> None:
        if b"filename" in parse_options_header(self._disposition)[1]:
            self.files.append(b"".join(self._chunks))
            if len(self.files) > self._max_files:
                raise RefusedError(f"Too many files. Maximum number of files is {self._max_files}.")
            return
        self._fields += 1
        if self._fields > _MAX_FIELDS:
            raise RefusedError(f"Too many fields. Maximum number of fields is {_MAX_FIELDS}.")

    def _end(self) -> None:
        self.ended = True
