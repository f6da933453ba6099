"""Where files live: a local path or `s3://`. With `s3` the only home of pyarrow.fs in meanet."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from meanet import s3
from meanet.errors import UserError


def resolve(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path within it.

    Raises:
        UserError: a scheme that nothing here can read.
    """
    text = str(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    if text.startswith(s3.SCHEME):
        return s3.PatientS3(), "/".join(s3.split(text)).rstrip("/")
    try:
        system, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{text} cannot be opened: {error}; give a local path or s3://bucket/key") from error
    return system, path


def check_readable(uri: str) -> None:
    """Say at the start what is missing of an s3:// path: server, credentials, clock, bucket or permission.

    Raises:
        UserError: something is.
    """
    if uri.startswith(s3.SCHEME):
        s3.preflight(uri)


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


def list_files(uri: str) -> list[str]:
    """Every file below a folder, as sorted paths relative to it.

    Raises:
        UserError: there is no such folder.
    """
    system, root = resolve(uri)
    try:
        found = system.get_file_info(fs.FileSelector(root, recursive=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{uri} is no folder that can be read: check the path") from error
    except OSError as error:
        raise UserError(f"{uri} cannot be listed ({error}): check the path and the credentials") from error
    start = len(root.rstrip("/")) + 1
    return sorted(info.path[start:] for info in found if info.type == fs.FileType.File)


def folders(uri: str) -> list[str]:
    """Names of the folders right below one, which need not exist."""
    system, root = resolve(uri)
    found = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
    return [info.base_name for info in found if info.type == fs.FileType.Directory]


def read_files(uri: str, paths: Sequence[str]) -> Iterator[bytes]:
    """The bytes of files below a folder, in order."""
    system, root = resolve(uri)
    for path in paths:
        with system.open_input_stream(f"{root.rstrip('/')}/{path}", compression=None) as stream:
            yield stream.read()


def parquet_files(uri: str) -> list[str]:
    """A Parquet file, or the sorted ones in a folder, as URIs.

    Raises:
        UserError: there are none.
    """
    system, path = resolve(uri)
    try:
        kind = system.get_file_info(path).type
    except OSError as error:
        raise UserError(f"{uri} cannot be looked at ({error}): check the path and the credentials") from error
    if kind == fs.FileType.File:
        return [uri]
    if kind == fs.FileType.NotFound:
        raise UserError(f"{uri} does not exist: give a Parquet file or a folder of them")
    found = [f"{uri.rstrip('/')}/{name}" for name in list_files(uri) if name.endswith(".parquet")]
    if not found:
        raise UserError(f"{uri} has no *.parquet files: give a Parquet file or a folder of them")
    return found


def parquet_schema(uri: str) -> pa.Schema:
    """Of one file."""
    with _parquet(uri) as file:
        return file.schema_arrow


def read_columns(uri: str, columns: list[str]) -> tuple[pa.Table, list[int]]:
    """Some columns of one file, and the rows of each of its row groups.

    Raises:
        UserError: a column is missing, or the file is not whole.
    """
    with _parquet(uri) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{uri} lacks the column {missing[0]!r}, which the files beside it have")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return file.read(columns), sizes


def read_row_group(uri: str, group: int, column: str) -> pa.ChunkedArray:
    """One column of one row group."""
    with _parquet(uri) as file:
        return file.read_row_group(group, [column])[column]


@contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    system, path = resolve(uri)
    try:
        with system.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{uri} does not exist: check the path") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri} is no whole Parquet file ({error}): write it again") from error


def has_files(uri: str, ending: str) -> bool:
    """Whether a folder exists that has files with this ending anywhere below it."""
    system, path = resolve(uri)
    found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return any(info.type == fs.FileType.File and info.path.endswith(ending) for info in found)


def write_parquet(table: pa.Table, uri: str | Path, row_group_size: int | None = None) -> None:
    """Write a whole file or nothing: a local file appears by renaming, an S3 object at the end of its upload."""
    system, path = resolve(uri)
    if not isinstance(system, fs.LocalFileSystem):
        pq.write_table(table, path, filesystem=system, row_group_size=row_group_size)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.NamedTemporaryFile(dir=Path(path).parent, suffix=".partial", delete=False)  # noqa: SIM115
    with _nothing_left(Path(part.name)):
        with part:
            pq.write_table(table, part, row_group_size=row_group_size)
        os.replace(part.name, path)


@contextmanager
def _nothing_left(partial: Path) -> Iterator[None]:
    """A partial file does not outlive a block that fails."""
    try:
        yield
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def upload(folder: Path, uri: str, names: Sequence[str]) -> int:
    """Copy some files and whole folders below a local folder to another one, local or s3://; returns how many files.

    What is there is written over, each file as a whole; names that begin with a dot, which are not whole yet, and
    missing ones are left out.

    Raises:
        UserError: one cannot be written.
    """
    found = [path for name in names for path in sorted((folder / name).rglob("*") if (folder / name).is_dir() else ())]
    found += [folder / name for name in names]
    inner = [path.relative_to(folder) for path in found if path.is_file()]
    system, root = resolve(uri)
    whole = [name for name in inner if not any(part.startswith(".") for part in name.parts)]
    for name in whole:
        place = f"{root.rstrip('/')}/{name.as_posix()}"
        try:
            if isinstance(system, fs.LocalFileSystem):
                _copy(folder / name, Path(place))
                continue
            with (folder / name).open("rb") as file, system.open_output_stream(place) as stream:
                stream.upload(file)
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be copied to {uri} ({error}): give the same command again"
            ) from error
    return len(whole)


def _copy(source: Path, place: Path) -> None:
    """A whole file or nothing, as an S3 object is: until then under a name that `upload` and readers leave out."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}-{secrets.token_hex(4)}.partial")
    with _nothing_left(partial):
        shutil.copyfile(source, partial)
        os.replace(partial, place)


def remove(uri: str, names: Sequence[str]) -> None:
    """Remove files and whole folders below a folder, in order; missing ones are left out.

    Raises:
        UserError: one cannot be removed.
    """
    system, root = resolve(uri)
    for name in names:
        place = f"{root.rstrip('/')}/{name}"
        try:
            kind = system.get_file_info(place).type
            if kind == fs.FileType.Directory:
                system.delete_dir(place)
            elif kind == fs.FileType.File:
                system.delete_file(place)
        except OSError as error:
            raise UserError(f"{uri}/{name} cannot be removed ({error}): remove it, or choose another place") from error


def write_text(text: str, path: Path) -> None:
    """Write a whole local file or nothing.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another path with --output") from error


def check_writable(uri: str) -> str:
    """Prove that a folder, local or s3://, can be written; returns it, absolute if local.

    Raises:
        UserError: it cannot.
    """
    if uri.startswith(s3.SCHEME):
        s3.preflight(uri, write=True)
        return uri
    system, path = resolve(uri)
    marker = f"{path.rstrip('/')}/.writable-{secrets.token_hex(4)}"  # its own: nodes prove it at the same time
    try:
        if isinstance(system, fs.LocalFileSystem):
            system.create_dir(path, recursive=True)
        try:
            with system.open_output_stream(marker) as stream:
                stream.write(b"")
        finally:
            if system.get_file_info(marker).type == fs.FileType.File:
                system.delete_file(marker)
    except OSError as error:
        raise UserError(f"{uri} cannot be written ({error}): choose another with --storage") from error
    return path if isinstance(system, fs.LocalFileSystem) else uri


@contextmanager
def marked(folder: str) -> Iterator[str]:
    """An empty file in a local folder while the block runs, by which `check_marked` knows the folder; yields its name,
    which is empty for s3://."""
    if folder.startswith(s3.SCHEME):
        yield ""
        return
    path = Path(folder) / f".shared-{secrets.token_hex(4)}"
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def check_marked(folder: str, marker: str) -> None:
    """Prove that this machine can write the folder that another has `marked`.

    Raises:
        UserError: it cannot; or it is another one.
    """
    if marker and not (Path(folder) / marker).exists():
        raise UserError(f"{folder} is another folder there: with --storage give one that all nodes share, or s3://")
    check_writable(folder)


def writable_directory(path: Path, remedy: str = "--output") -> Path:
    """Make a local directory and prove that it can be written, before an hour of work is lost.

    Raises:
        UserError: it cannot; `remedy` is what the user can change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another with {remedy}") from error
    return path.absolute()
