"""The on-disk store of what the frozen encoder produced, so that it is computed once.

A *shelf* is a folder for one encoder and layout; it holds immutable *segments*, each a safetensors file of keys
(16 bytes a text) and vectors (half precision), with its sha256 in the name. It is written beside its place, synced
and renamed, so readers need no lock. A text's key is a hash of its truncated token ids, which covers the tokenizer and
max_length (what another one does not cut is reused); all else that changes the answer is in the shelf's name.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs
import psutil
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from headstart.config import CACHE_MAX_BYTES
from headstart.encoder import Encode, Encoder, encode, stored_layout
from headstart.errors import InputError, disk_errors
from headstart.folders import file_sha256, reserve, whole_file
from headstart.places import Place
from headstart.progress import bar
from headstart.tokens import Tokens

Keys = NDArray[np.void]
FORMAT = "2"
KEY_BYTES = 16
READ_ROWS = 1024
SEGMENT_BYTES = 64 * 1024**2  # a segment is written when this much is ready: an interrupted pass keeps what it has done
STORED = ("*/*.safetensors", "*/*.npy")  # of features; and of hidden states, which fine-tuning keeps there
IN_MEMORY_SHARE = 0.25  # of the memory that is free, what one array may take; a larger one is mapped from disk


def cache_folder() -> Path:
    """The folder of everything headstart keeps between runs; HEADSTART_CACHE_DIR moves it."""
    return Path(os.environ.get("HEADSTART_CACHE_DIR") or platformdirs.user_cache_dir("headstart"))


def cache_max_bytes() -> int:
    """The size cap of the store: HEADSTART_CACHE_MAX_BYTES (an `InputError` if that is no number) or the default."""
    given = os.environ.get("HEADSTART_CACHE_MAX_BYTES", str(CACHE_MAX_BYTES))
    if not given.isdigit():
        raise InputError(f"HEADSTART_CACHE_MAX_BYTES must be a number of bytes, and {given!r} was given.")
    return int(given)


def text_keys(tokens: Tokens) -> Keys:
    """(n,) keys of 16 bytes, one a text: BLAKE2b of its token ids."""
    digests = [hashlib.blake2b(tokens[i].tobytes(), digest_size=KEY_BYTES).digest() for i in range(len(tokens))]
    return np.frombuffer(b"".join(digests), dtype=f"V{KEY_BYTES}")


@dataclass(frozen=True)
class Features:
    """The frozen encoder's output for n texts, and what it cost."""

    distinct: NDArray[np.float16]  # (texts, vectors, hidden), an entry a distinct text; memory-mapped where large
    rows: NDArray[np.int64]  # text i has the vectors `distinct[rows[i]]`
    layout: tuple[str, ...]  # names the vectors
    encoded: int  # how many of the distinct texts were computed now
    reused: int  # and how many came from the store
    warnings: tuple[str, ...] = ()  # a sentence for each damage found

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, names: Sequence[str]) -> NDArray[np.float32]:
        """(n, len(names), hidden): some of the layout's vectors of each text."""
        places = [self.layout.index(name) for name in names]
        found = roomy((len(self), len(names), self.distinct.shape[2]), np.float32)
        for start in range(0, len(self), READ_ROWS):
            found[start : start + READ_ROWS] = self.distinct[self.rows[start : start + READ_ROWS]][:, places]
        return found

    def take(self, index: NDArray[np.int64]) -> "Features":
        """The texts at `index`, in that order."""
        return replace(self, rows=self.rows[index])

    def cost(self) -> dict[str, int]:
        """As `metrics.json` has it: distinct texts, how many were encoded and reused, and their bytes."""
        texts, size = len(self.distinct), self.distinct.nbytes
        return {"texts": texts, "bytes": size, "encoded": self.encoded, "reused": self.reused}


def roomy(shape: tuple[int, ...], dtype: type[np.float16] | type[np.float32]) -> NDArray[Any]:
    """An empty array in memory; where that would take much, on a nameless file (a `DiskError` if that has no room)."""
    if math.prod(shape) * np.dtype(dtype).itemsize < IN_MEMORY_SHARE * psutil.virtual_memory().available:
        return np.empty(shape, dtype)
    with disk_errors(folder := cache_folder()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            found = np.memmap(file, dtype, mode="w+", shape=shape)
            reserve(file, found.nbytes)
            return found


class Shelf:
    """Stored vectors of one encoder and layout, in one folder; `warnings` tells of damage."""

    def __init__(self, encoder: Encoder, layout: Sequence[str]) -> None:
        name = hashlib.sha256(json.dumps([FORMAT, encoder.fingerprint, list(layout)]).encode()).hexdigest()[:32]
        self.folder = cache_folder() / "features" / name
        self.warnings: list[str] = []

    def lookup(self, keys: Keys, into: NDArray[np.float16]) -> NDArray[np.bool_]:
        """Copy what is stored under `keys` into the rows of `into`; (n,) whether each was found, not so if damaged."""
        found = np.zeros(len(keys), dtype=bool)
        for _, _, path in reversed(by_age(self.folder, "*.safetensors")):
            missing = np.flatnonzero(~found)
            if not len(missing):
                break
            try:
                with safe_open(path, framework="numpy") as segment:
                    stored = np.ascontiguousarray(segment.get_tensor("keys")).view(f"V{KEY_BYTES}")
                    _, rows, here = np.intersect1d(stored, keys[missing], return_indices=True)
                    if not len(rows):
                        continue
                    if not path.stem.endswith(file_sha256(path)):
                        raise ValueError("its checksum is another")
                    into[missing[here]] = segment.get_tensor("values")[rows]
            except FileNotFoundError:
                continue  # evicted by another process meanwhile
            except (SafetensorError, ValueError, OSError) as error:
                why = f"cannot be read ({error}); those texts are encoded again."
                self.warnings.append(f"The feature store's file {path} {why}")
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            found[missing[here]] = True
            with contextlib.suppress(OSError):  # a read-only cache still serves
                os.utime(path)
        return found

    def append(self, keys: Keys, values: NDArray[np.float16]) -> None:
        """Write a segment: synced, then renamed, under the store's lock; then evict. A `DiskError` if it cannot be."""
        flat = np.frombuffer(keys.tobytes(), dtype=np.uint8).reshape(-1, KEY_BYTES)
        data = save({"keys": flat, "values": np.ascontiguousarray(values)})
        store = self.folder.parent
        with disk_errors(store), FileLock(store / "lock"):
            for orphan in store.glob("*/.*.safetensors.*.tmp"):  # of a killed writer: a living one holds the lock
                orphan.unlink(missing_ok=True)
            name = f"{uuid.uuid4().hex[:8]}-{hashlib.sha256(data).hexdigest()}.safetensors"
            with whole_file(self.folder / name) as part:
                part.write_bytes(data)
            evict(store)

    def exchange(self) -> None:
        """Fetch what others have put into HEADSTART_SHARED_STORE, and put ours there; nothing, where that is not set.

        It is a folder or an address that fsspec knows. Segments never change and no two have one name. What goes wrong
        there is a warning.
        """
        if not (url := os.environ.get("HEADSTART_SHARED_STORE")):
            return
        place = Place(f"{url}/{self.folder.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            here = {path.name for path in self.folder.glob("*.safetensors")}
            there = {name for name in place.names() if name.endswith(".safetensors")}
            for name in there - here:
                content = place.read(name)
                with FileLock(self.folder.parent / "lock"), whole_file(self.folder / name) as part:
                    part.write_bytes(content)
            for name in here - there:
                with contextlib.suppress(FileNotFoundError):  # evicted by another process meanwhile
                    place.write(name, (self.folder / name).read_bytes())
            evict(self.folder.parent)
        except Exception as error:  # of a store's library, which may be any
            self.warnings.append(f"HEADSTART_SHARED_STORE: not all was exchanged with it ({error}).")


def evict(store: Path) -> None:
    """Delete what a killed process left half written; and while the store is over its cap, what was used longest ago.

    What is over the cap by itself goes first, so that it does not cost all the rest.
    """
    for torn in store.glob("states-*/.*.npy.*.tmp"):
        with contextlib.suppress(Timeout), FileLock(torn.parent / f"{torn.name.split('.')[1]}.lock", timeout=0):
            torn.unlink(missing_ok=True)
    cap = cache_max_bytes()
    files = sorted(by_age(store, *STORED), key=lambda file: file[1] <= cap)
    excess = sum(size for _, size, _ in files) - cap
    for _, size, path in files:
        if excess > 0:
            path.unlink(missing_ok=True)
            excess -= size


def by_age(folder: Path, *patterns: str) -> list[tuple[int, int, Path]]:
    """Time of the last use (ns), bytes and path of each file of these names, the one used longest ago first."""
    found = []
    for path in itertools.chain.from_iterable(map(folder.glob, patterns)):
        with contextlib.suppress(OSError):
            found.append(((stat := path.stat()).st_mtime_ns, stat.st_size, path))
    return sorted(found)


def frozen_features(encoder: Encoder, tokens: Tokens, compute: Encode = encode) -> Features:
    """What the frozen encoder makes of n truncated texts: from the store if it is there, else computed and kept.

    Each distinct text is found or computed once, in half precision either way, by `compute`, here or elsewhere. A
    `DiskError` if it cannot be stored.
    """
    layout = stored_layout(encoder)
    shelf = Shelf(encoder, layout)
    shelf.exchange()
    keys, first, where = np.unique(text_keys(tokens), return_index=True, return_inverse=True)
    values = roomy((len(keys), len(layout), encoder.hidden), np.float16)
    missing = np.flatnonzero(~shelf.lookup(keys, values))
    left, unsaved = len(missing), missing[:0]
    with bar("encoding" if left else None, left, "texts") as advance:
        for index, fresh in compute(encoder, tokens.take(first[missing]), layout) if left else ():
            values[missing[index]] = fresh
            unsaved, left = np.append(unsaved, missing[index]), left - len(index)
            advance(len(index), "")
            if left == 0 or values[0].nbytes * len(unsaved) >= SEGMENT_BYTES:
                shelf.append(keys[unsaved], values[unsaved])
                unsaved = unsaved[:0]
    if len(missing):
        shelf.exchange()
    return Features(values, where.ravel(), layout, len(missing), len(keys) - len(missing), tuple(shelf.warnings))


class CacheInfo(NamedTuple):
    """What the store holds: texts over all encoders, shelves (encoders and layouts), bytes on disk and their cap."""

    folder: Path
    texts: int
    shelves: int
    bytes: int
    max_bytes: int


def cache_info() -> CacheInfo:
    """Count what the store holds; files that cannot be read count as bytes only."""
    store = cache_folder() / "features"
    files = by_age(store, *STORED)
    segments = [path for _, _, path in files if path.suffix == ".safetensors"]
    texts, size = 0, sum(size for _, size, _ in files)
    for path in segments:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="numpy") as segment:
            texts += segment.get_slice("keys").get_shape()[0]
    return CacheInfo(store, texts, len({path.parent for path in segments}), size, cache_max_bytes())


def clear_cache() -> int:
    """Delete every stored feature; returns the bytes freed. A `DiskError` if that is forbidden."""
    info = cache_info()
    with disk_errors(info.folder):
        if info.folder.is_dir():
            with FileLock(info.folder / "lock"):
                for shelf in filter(Path.is_dir, info.folder.iterdir()):
                    shutil.rmtree(shelf)
    return info.bytes
