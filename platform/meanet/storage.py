"""Where files live: a local path or `s3://`. The only home of pyarrow.fs (and of boto3) in meanet."""

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from meanet.errors import UserError


def resolve(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path within it.

    Raises:
        UserError: a scheme that nothing here can read.
    """
    text = str(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        system, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{text} cannot be opened: {error}; give a local path or s3://bucket/key") from error
    return system, path


def read_parquet(uri: str | Path) -> pa.Table:
    """A whole Parquet file.

    Raises:
        UserError: it does not exist, or is truncated or no Parquet.
    """
    system, path = resolve(uri)
    try:
        return pq.read_table(path, filesystem=system)
    except FileNotFoundError as error:
        raise UserError(f"{uri} does not exist: check the path, or run the job that writes it") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri} is no whole Parquet file ({error}): write it again") from error


def write_parquet(table: pa.Table, uri: str | Path) -> None:
    """Write a whole file or nothing: a local file appears by renaming, an S3 object at the end of its upload."""
    system, path = resolve(uri)
    if not isinstance(system, fs.LocalFileSystem):
        pq.write_table(table, path, filesystem=system)
        return
    with tempfile.NamedTemporaryFile(dir=Path(path).parent, suffix=".partial", delete=False) as part:
        pq.write_table(table, part)
    os.replace(part.name, path)


def write_text(text: str, path: Path) -> None:
    """Write a whole local file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def writable_directory(path: Path) -> Path:
    """Make a local directory and prove that it can be written, before an hour of work is lost.

    Raises:
        UserError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another with --output") from error
    return path.absolute()
