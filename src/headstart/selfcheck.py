"""Proof on the person's own machine and data that a killed run, resumed, ends as one that was left alone.

This room runs the command line as others would, and compares the weights and losses it leaves.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import polars

from headstart.config import TrainConfig
from headstart.errors import HeadstartError
from headstart.prepare import read

TEXTS = 40  # of each label, for a few steps


def check_resume(config: TrainConfig, announce: Callable[[str], None]) -> str:
    """Fine-tune a little, kill it by SIGKILL after a checkpoint, resume, compare: says what was found equal.

    Of the settings it takes the encoder, the depth, the seed and where to compute. A `HeadstartError` says that
    weights or losses differ, or what a run said that failed.
    """
    train = read(config)[0].train
    labels = [label or "|" for label in train.written]  # of no label
    rows = polars.DataFrame({"sentence": train.texts, "label": labels})
    depth = config.thaw if config.thaw not in ("0", "auto") else "all"
    with tempfile.TemporaryDirectory(prefix="headstart-selfcheck-") as work:
        table, whole, killed = (Path(work) / name for name in ("few.csv", "whole", "killed"))
        rows.group_by("label", maintain_order=True).head(TEXTS).write_csv(table)
        command = [sys.executable, "-m", "headstart.cli", "train", str(table), "--epochs=2", "--batch-size=8"]
        command += [f"--model={config.model}", f"--thaw={depth}", f"--seed={config.seed}", f"--device={config.device}"]
        command += [
            f"--problem={train.problem}",
            f"--precision={config.precision}",
            *([] if config.store else ["--no-store"]),
            "--out",
        ]
        announce("Training undisturbed.")
        finish([*command, str(whole)])
        announce("Training again, to be killed after its second checkpoint.")
        kill([*command, str(killed), "--checkpoint-minutes=1e-9"], killed)
        announce("Killed by SIGKILL; resuming.")
        finish([*command, str(killed), "--resume"])
        weights, others = ((folder / "model.safetensors").read_bytes() for folder in (whole, killed))
        losses, resumed = (losses_of(folder) for folder in (whole, killed))
    if weights != others or losses != resumed:
        what = "weights" if weights != others else f"losses ({resumed}, not {losses})"
        raise HeadstartError(f"--selfcheck-resume: a run that was resumed ended with other {what} than one left alone.")
    told = ", ".join(f"{train:.6f}" for train, _ in losses)
    equal = f"Weights   {len(weights):,} bytes, equal to the last bit\nLosses    equal, too; in training: {told}"
    return f"{equal}\nResuming is exact on this machine."


def losses_of(run: Path) -> list[list[float]]:
    """Training and validation loss of each epoch."""
    history = json.loads((run / "headstart.json").read_text(encoding="utf-8"))["history"]
    return [[epoch["train_loss"], epoch["validation_loss"]] for epoch in history]


def finish(command: Sequence[str]) -> None:
    """Run a command to its end; a `HeadstartError` has what it said if it failed."""
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if ended.returncode:
        said = f"a run ended with code {ended.returncode}. It said: {ended.stderr.strip()}"
        raise HeadstartError(f"--selfcheck-resume: {said}")


def kill(command: Sequence[str], out: Path) -> None:
    """Run a command and kill it once there are two checkpoints in `out`; a `HeadstartError` if it ends before."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while (running := process.poll() is None) and len(list(out.glob("checkpoint-*/"))) < 2:
                time.sleep(0.01)
        finally:
            process.kill()
    if not running:
        raise HeadstartError(f"--selfcheck-resume: a run ended with code {process.returncode} before it was killed.")
