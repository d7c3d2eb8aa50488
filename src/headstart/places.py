"""Folders and tables, here or where fsspec finds them, as on object stores. It knows nothing of what they hold.

Files are written whole or not at all.
"""

import contextlib
import functools
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from headstart.errors import DataError, HeadstartError, InputError, disk_errno, disk_errors
from headstart.folders import whole_file
from headstart.tables import ENDING, file_format, is_remote, resolve_path

STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}  # a file is there whole, or not yet
STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")  # as file systems name it


class Place:
    """A folder, here or on an object store, whose files are written whole or not at all; else an `InputError`."""

    def __init__(self, url: str) -> None:
        if is_remote(url) and url.partition("://")[0] not in STORES:
            raise InputError(f"{url}: files could be left half-written there. Give a folder here, or an object store.")
        self.fs, self.path = reach(url)
        self.url = url

    def write(self, name: str, content: bytes) -> None:
        """Put a file there; object stores have it whole or not at all by themselves."""
        if is_remote(self.url):
            with within_reach(self.url):
                self.fs.pipe_file(f"{self.path}/{name}", content)
        else:
            with disk_errors(self.url), whole_file(Path(self.path) / name) as temporary:
                temporary.write_bytes(content)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with within_reach(self.url):
            return bytes(self.fs.cat_file(f"{self.path}/{name}"))

    def names(self, folder: str = "") -> list[str]:
        """The names in it, or in a folder in it, sorted, without hidden ones; none where that is not there."""
        self.fs.invalidate_cache()  # others write there, too
        with within_reach(self.url):
            try:
                found = self.fs.ls(f"{self.path}/{folder}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        names = (one.rstrip("/").rpartition("/")[2] for one in found)
        return sorted(name for name in names if name and not name.startswith("."))

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        self.fs.invalidate_cache()  # others write there, too
        return bool(self.fs.exists(f"{self.path}/{name}"))

    def remove(self, name: str) -> None:
        """Delete a file or folder, if it is there."""
        if self.fs.exists(f"{self.path}/{name}"):
            self.fs.rm(f"{self.path}/{name}", recursive=True)

    def tidy(self) -> None:
        """Delete what killed writers have left."""
        if not is_remote(self.url):
            for torn in Path(self.path).rglob(".*.tmp"):
                torn.unlink(missing_ok=True)


LOCK = threading.Lock()  # of `_copy_of`, so that two threads do not fetch one thing twice


def reach(url: str) -> tuple[Any, str]:
    """The file system and the path behind an address; an `InputError` if there is none of its kind."""
    try:
        fs, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: cannot be reached ({error}).") from error
    return fs, str(path)


@contextlib.contextmanager
def within_reach(url: str, problem: str = "storage cannot be reached or refuses") -> Iterator[None]:
    """Turn a refusal of storage, of which each kind has errors of its own, into an `InputError` about `url`."""
    try:
        yield
    except HeadstartError:
        raise
    except Exception as error:
        if not is_remote(url) and not isinstance(error, OSError):
            raise
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{url}: {problem} ({why}).") from error


def absolute(source: str) -> str:
    """A path as others need it, who work in other folders."""
    return source if is_remote(source) else str(Path(source.removeprefix("file://")).absolute())


def find_tables(source: str, output: str) -> dict[str, str]:
    """The tables of a path, a folder or a pattern, in order, but for those in `output`, and a version of each.

    That is its size and when it was written, or a sum of its bytes where the store has one. A `DataError` if there is
    no table.
    """
    fs, path = reach(absolute(resolve_path(source)))
    aside = reach(output)[1].rstrip("/") + "/"
    with within_reach(source):
        if fs.isfile(path):
            file_format(path)
            found = [path]
        else:
            found = fs.ls(path, detail=False) if fs.isdir(path) else fs.glob(path)
        named = (name for name in sorted(found) if ENDING.search(name) and name.rpartition("/")[2][0] not in "._")
        tables = {
            fs.unstrip_protocol(name) if is_remote(source) else name: _version(fs.info(name))
            for name in named
            if fs.isfile(name) and not name.startswith(aside)
        }
    if not tables:
        passed = "those whose names begin with . or _ are passed over"
        raise DataError(f"{source}: there is no table of that name or pattern ({passed}). Check the path.")
    return tables


def _version(info: dict[str, Any]) -> str:
    return f"{info['size']} {next((info[name] for name in STAMPS if info.get(name)), '')}"


@functools.lru_cache(maxsize=2)
def _copy_of(source: str) -> Any:
    fs, path = reach(source)
    file = tempfile.NamedTemporaryFile(suffix=f"-{Path(path).name}")  # noqa: SIM115  # deleted when it is forgotten
    fs.get_file(path, file.name)
    return file


@contextlib.contextmanager
def near(source: str) -> Iterator[str]:
    """A path on this machine to what is at `source`, good within the block; an `InputError` if it is out of reach.

    So it is if the disk refuses within the block: that is no fault of what is there. Of elsewhere it is a copy, of
    which the last two are kept. A `DataError` if polars cannot open a file of that name.
    """
    problem = f"cannot be read on {platform.node()}"
    if source.encode(errors="replace").decode() != source:
        raise DataError(f"{source}: its name is not UTF-8. Rename it.")
    with LOCK, within_reach(source, problem):
        file = _copy_of(source) if is_remote(source) else None
        path = source if file is None else str(file.name)
        open(path, "rb").close()
    try:
        yield path
    except (OSError, DataError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, Exception) or (number := disk_errno(cause)) is None:
            raise
        raise InputError(f"{source}: {problem} ({os.strerror(number)}).") from error
