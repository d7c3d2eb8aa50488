"""Files and folders that are written whole or not at all, and room on the disk; knows nothing of what is in them."""

import contextlib
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from headstart.errors import RunError, disk_errors


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; synced and renamed to it at the end, removed if anything failed."""
    temporary = beside(path, "tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries (POSIX; elsewhere renames are already ordered)."""
    if path.is_file() or sys.platform != "win32":
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reserve(file: IO[bytes], size: int) -> None:
    """Take so many bytes of the disk: writing to a mapped file where there is no room would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill beside `out`; at the end it is synced and renamed to `out`, or removed if anything failed.

    Without `overwrite` nothing makes way: a `RunError` then says which other name the folder has got instead.
    """
    with disk_errors(out):
        place = out.resolve()  # a link stays one
        temporary, replaced = beside(place, "tmp"), beside(place, "old")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _settle(temporary)
            if overwrite and place.is_dir():
                place.rename(replaced)
            kept = _rename(temporary, place)
            sync(place.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaced.exists() and not place.exists():
                replaced.rename(place)
        shutil.rmtree(replaced, ignore_errors=True)
    if kept != place:
        why = "something has come to be there since this run began, so it was left alone"
        raise RunError(f"{out}: {why}. This run's result is kept in {kept}.")


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path` that nothing has."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}"


def _settle(folder: Path) -> None:
    """Give files the usual mode (safetensors writes for the owner alone), and wait until the disk has everything."""
    os.umask(mask := os.umask(0))  # it can only be read by setting it
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)


def _rename(folder: Path, place: Path) -> Path:
    """Rename to `place` if that is free or an empty folder, else to `place`-2, `place`-3, …; returns the new name."""
    target, number = place, 1
    while True:
        try:
            if os.name == "nt" and target.is_dir():
                target.rmdir()  # POSIX replaces an empty folder
            return folder.rename(target)
        except OSError:
            if not os.path.lexists(target):
                raise
            number += 1
            target = place.with_name(f"{place.name}-{number}")
