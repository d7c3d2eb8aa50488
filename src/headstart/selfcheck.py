"""Proof on the person's own machine and data that a killed run, resumed, ends as one that was left alone.

This room runs the command line as others would, and compares the run folders it leaves.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import polars
import torch
from safetensors.torch import load_file

from headstart.config import TrainConfig
from headstart.errors import HeadstartError, count_of
from headstart.prepare import read

TEXTS, OFTEN = 40, "1e-9"  # of each label, for a few steps; minutes between checkpoints, so that each step has one


def check_resume(config: TrainConfig, announce: Callable[[str], None]) -> str:
    """Fine-tune a little, kill it by SIGKILL after a checkpoint, resume, compare: says what was found equal.

    A `HeadstartError` says what differs, or what a run said that failed.
    """
    depth = config.thaw if config.thaw not in ("0", "auto") else "all"
    alone = replace(config, validation=None, test=None, label_names=None, folds=None, trials=None, recipe="headstart")
    changes = {"text": "sentence", "label": "label", "head": "auto", "epochs": 2, "batch_size": 8}
    with tempfile.TemporaryDirectory(prefix="headstart-selfcheck-") as work:
        table, settings, whole, killed = (Path(work) / name for name in ("few.csv", "settings.json", "whole", "killed"))
        few_rows(alone).write_csv(table)
        recorded = {"settings": {**asdict(alone), **changes}, "thaw": {"kept": depth}}
        settings.write_text(json.dumps(recorded), encoding="utf-8")
        command = [sys.executable, "-m", "headstart.cli", "train", str(table), "--config", str(settings), "--out"]
        announce("Training undisturbed.")
        live([*command, str(whole)], whole)
        announce("Training again, to be killed after its second checkpoint.")
        place = live([*command, str(killed), "--checkpoint-minutes", OFTEN], killed, checkpoints=2)
        announce(f"Killed by SIGKILL; resuming from {place}.")
        live([*command, str(killed), "--resume"], killed)
        return comparison(whole, killed, f"killed by SIGKILL after {place} and resumed")


def few_rows(config: TrainConfig) -> polars.DataFrame:
    """The first texts of each label, as a table."""
    train = read(config)[0].train
    table = polars.DataFrame({"sentence": train.texts, "label": [train.names[label] for label in train.labels]})
    return table.group_by("label", maintain_order=True).head(TEXTS).select("sentence", "label")


def live(command: Sequence[str], out: Path, checkpoints: float = math.inf) -> str:
    """Run a command to its end, or kill it once there are so many checkpoints in `out`; returns the newest one's name.

    A `HeadstartError` has what it said if it failed, or ended before it could be killed.
    """
    found: list[Path] = []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while len(found) < checkpoints and process.poll() is None:
                time.sleep(0.01)
                found = sorted(out.glob("checkpoint-*/"), key=lambda place: int(place.name.partition("-")[2]))
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip()
    if len(found) < checkpoints and (process.returncode or checkpoints < math.inf):
        raise HeadstartError(f"--selfcheck-resume: a run ended with code {process.returncode}. It said: {said}")
    return found[-1].name if found else ""


def comparison(one: Path, other: Path, what: str) -> str:
    """What is equal of two run folders, in words; a `HeadstartError` names what is not."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    infos = [json.loads((folder / "headstart.json").read_text(encoding="utf-8")) for folder in (one, other)]
    losses, rest = ([[epoch["train_loss"], epoch["validation_loss"]] for epoch in info["history"]] for info in infos)
    differ = [name for name in weights if name not in others or not torch.equal(weights[name], others[name])]
    if differ or losses != rest:
        found = f"{len(differ)} of {count_of(len(weights), 'tensor')} differ; losses {losses} and {rest}"
        raise HeadstartError(f"--selfcheck-resume: a run {what} ended otherwise than one left alone: {found}.")
    told = ", ".join(f"{train:.6f}" for train, _ in losses)
    return (
        f"Run 1     left alone: training losses {told}\n"
        f"Run 2     {what}: training losses {told}\n"
        f"Weights   {count_of(len(weights), 'tensor')}, equal to the last bit\n"
        "Resuming is exact on this machine."
    )
