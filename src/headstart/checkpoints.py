"""Checkpoints of a training run: whole or absent, verified before they are trusted.

A checkpoint is a folder of tensors and a JSON state, with a manifest of their sha256. It is written beside its place,
synced, then renamed. This room knows files; what the tensors mean is the loop's business.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from headstart.errors import RunError, count_of, disk_errors
from headstart.folders import beside, file_sha256, new_folder

KEPT = 2  # the newest, and one to fall back on
PLAN = "checkpoint-plan.json"  # in a folder while its run is being fine-tuned: how deep
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoints:
    """The checkpoints of one run in `folder`, at most one every `minutes` but for those asked for.

    `announce` is told what was resumed from and what was passed over.
    """

    def __init__(self, folder: Path, minutes: float, announce: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.minutes, self.announce = folder, minutes, announce
        self.written = time.monotonic()

    def clear(self) -> None:
        """Delete what an earlier run has left; a `DiskError` if that is forbidden."""
        for old in self._newest_first():
            with disk_errors(old):  # if it stayed, it would be resumed from
                shutil.rmtree(old)

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self.written >= 60 * self.minutes

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write `checkpoint-STEP`, then delete the oldest over `KEPT`; a `DiskError` leaves those there as they are.

        Those of later steps count as the oldest: they were passed over.
        """
        for torn in self.folder.glob(".checkpoint-*"):  # by a kill
            shutil.rmtree(torn, ignore_errors=True)
        with new_folder(self.folder / f"checkpoint-{step}", overwrite=True) as folder:
            save_file(dict(tensors), folder / TENSORS)
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
            sums = {name: file_sha256(folder / name) for name in (TENSORS, STATE)}
            (folder / MANIFEST).write_text(json.dumps(sums), encoding="utf-8")
        for old in sorted(self._newest_first(), key=lambda place: _step(place) > step)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)  # what a kill leaves of it does not verify
        self.written = time.monotonic()

    def newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and state of the newest checkpoint that is whole, if any."""
        for place in self._newest_first():
            try:
                sums = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
                if damaged := [name for name in (TENSORS, STATE) if file_sha256(place / name) != sums.get(name)]:
                    raise ValueError(f"{damaged[0]} is not as it was written")
                state = json.loads((place / STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError, AttributeError) as error:
                self.announce(f"{place}: passed over, it is damaged ({error}).")
                continue
            epoch, steps = len(state["epochs"]) + 1, count_of(state["done"], "step")
            self.announce(f"Resumed from {place} (epoch {epoch}, {steps}).")
            return load_file(place / TENSORS), state
        return None

    def _newest_first(self) -> list[Path]:
        found = [path for path in self.folder.glob("checkpoint-*") if path.name[11:].isdigit()]
        return sorted(found, key=_step, reverse=True)


def _step(place: Path) -> int:
    return int(place.name[11:])


def is_unfinished(out: Path) -> bool:
    """Whether a folder holds a run that was ended while it was being fine-tuned."""
    return (out / PLAN).is_file()


def check_out(out: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output folder that cannot or must not be written, before any work is done."""
    with disk_errors(out):
        if out.is_file():
            raise RunError(f"{out}: is a file; --out takes a folder.")
        unfinished = is_unfinished(out)
        taken = out.is_dir() and any(out.iterdir()) and not (resume and unfinished)
        if taken and not overwrite:
            what = "is not empty. Choose another --out"
            what = "holds a run that has not ended. Go on with it by --resume" if unfinished else what
            raise RunError(f"{out}: {what}, or replace it with --overwrite.")
        if taken and not unfinished and not (out / "headstart.json").is_file():
            raise RunError(f"{out}: is not a run folder (no headstart.json), so --overwrite does not replace it.")
        # Its missing folders are made when there is something to put into them.
        place = next(folder for folder in out.absolute().parents if folder.exists())
        probe = beside(place / out.name, "tmp")
        probe.mkdir()
        probe.rmdir()
