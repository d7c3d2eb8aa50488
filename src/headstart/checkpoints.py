"""Checkpoints of a training run: whole or absent, verified before they are trusted.

A checkpoint is a folder of tensors and a JSON state, with a manifest of their sha256. It is written beside its place,
synced, then renamed. This room knows files; what the tensors mean is the loop's business.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from headstart.errors import InputError, count_of
from headstart.model import new_folder

KEPT = 2  # the newest, and one to fall back on
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoints:
    """The checkpoints of one run in `folder`, at most one every `minutes` but for those asked for.

    `key` stands for everything that decides the result; checkpoints of another key are not resumed. `remarks` say what
    was resumed from and what was passed over.
    """

    def __init__(
        self, folder: Path, key: str, minutes: float, announce: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.key, self.minutes, self.announce = folder, key, minutes, announce
        self.written = time.monotonic()
        self.remarks: list[str] = []

    def clear(self) -> None:
        """Delete what an earlier run has left."""
        for old in self._newest_first():
            shutil.rmtree(old, ignore_errors=True)

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self.written >= 60 * self.minutes

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write `checkpoint-STEP`, then delete the oldest over `KEPT`; a `DiskError` leaves those there as they are."""
        with new_folder(self.folder / f"checkpoint-{step}", overwrite=True) as folder:
            save_file(dict(tensors), folder / TENSORS)
            (folder / STATE).write_text(json.dumps({"key": self.key, **state}), encoding="utf-8")
            sums = {name: _sha256(folder / name) for name in (TENSORS, STATE)}
            (folder / MANIFEST).write_text(json.dumps(sums), encoding="utf-8")
        for old in list(self._newest_first())[KEPT:]:
            doomed = old.rename(old.with_name(f".{old.name}.{os.getpid()}.old"))  # never half there under its name
            shutil.rmtree(doomed, ignore_errors=True)
        self.written = time.monotonic()

    def newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and state of the newest checkpoint that is whole, if any; an `InputError` if it is of another run."""
        for place in self._newest_first():
            try:
                sums = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
                if damaged := [name for name in (TENSORS, STATE) if _sha256(place / name) != sums.get(name)]:
                    raise ValueError(f"{damaged[0]} is not as it was written")
                state = json.loads((place / STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError, AttributeError) as error:
                self._remark(f"{place}: passed over, it is damaged ({error}).")
                continue
            if state.pop("key") != self.key:
                hint = "Give the same ones as then, or start anew with --overwrite."
                raise InputError(f"{place}: is of a run with other settings, data or versions. {hint}")
            self._remark(f"Resumed from {place} (epoch {state['epoch'] + 1}, {count_of(state['done'], 'step')}).")
            return load_file(place / TENSORS), state
        return None

    def _remark(self, sentence: str) -> None:
        self.remarks.append(sentence)
        self.announce(sentence)

    def _newest_first(self) -> Iterator[Path]:
        found = [(int(path.name[11:]), path) for path in self.folder.glob("checkpoint-*") if path.name[11:].isdigit()]
        return (path for _, path in sorted(found, reverse=True))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
