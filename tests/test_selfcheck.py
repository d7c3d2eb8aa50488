"""The proof of exact resuming: that it holds here, and that it would say so if it did not."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart import config
from headstart.errors import HeadstartError
from headstart.selfcheck import TEXTS, check_resume, comparison, few_rows, live
from tests.conftest import SMALL_ROWS, write_csv


@pytest.mark.parametrize("thaw", ["auto", "2"])
def test_it_proves_that_resuming_is_exact(
    thaw: str, tiny_bert: Path, small_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(config.__file__).parents[1]))
    said: list[str] = []
    given: dict[str, Any] = {"model": str(tiny_bert), "thaw": thaw, "device": "cpu", "label_names": ("bad", "good")}
    before = sorted(small_table.parent.iterdir())
    text = check_resume(config.settings(str(small_table), **given), said.append)
    assert said[:2] == ["Training undisturbed.", "Training again, to be killed after its second checkpoint."]
    assert said[2].startswith("Killed by SIGKILL; resuming from checkpoint-")
    first, second, weights, last = text.splitlines()
    assert first.split(":")[1] == second.split(":")[1]
    assert len(first.split(":")[1].split(",")) == 2, "two epochs"
    assert weights.startswith("Weights   5")
    assert weights.endswith(" tensors, equal to the last bit")
    assert last == "Resuming is exact on this machine."
    assert sorted(small_table.parent.iterdir()) == before, "nothing is left behind"


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal run folders, as far as they are compared."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, one / "model.safetensors")
    epoch = {"train_loss": 0.5, "validation_loss": 0.25, "validation_accuracy": 1.0, "seconds": 3.0}
    (one / "headstart.json").write_text(json.dumps({"history": [epoch]}))
    shutil.copytree(one, other)
    return one, other


def test_equal_runs_are_called_equal(two_runs: tuple[Path, Path]) -> None:
    info = json.loads((two_runs[1] / "headstart.json").read_text())
    info["history"][0]["seconds"] = 9.0
    (two_runs[1] / "headstart.json").write_text(json.dumps(info))
    text = comparison(*two_runs, "killed")
    assert "Run 2     killed: training losses 0.500000" in text
    assert "2 tensors, equal to the last bit" in text


def test_one_bit_of_difference_is_told(two_runs: tuple[Path, Path]) -> None:
    tensors = load_file(two_runs[1] / "model.safetensors")
    tensors["a"][1] = 1 + 2**-23
    save_file(tensors, two_runs[1] / "model.safetensors")
    with pytest.raises(HeadstartError, match=r"ended otherwise than one left alone: 1 of 2 tensors differ"):
        comparison(*two_runs, "killed")


def test_another_loss_is_told(two_runs: tuple[Path, Path]) -> None:
    text = (two_runs[1] / "headstart.json").read_text()
    (two_runs[1] / "headstart.json").write_text(text.replace("0.25", "0.2500000001"))
    with pytest.raises(HeadstartError, match=r"0 of 2 tensors differ; losses"):
        comparison(*two_runs, "killed")


def test_a_few_texts_of_each_label(tmp_path: Path) -> None:
    rows = [(f"{text} {i}", label) for i in range(5) for text, label in SMALL_ROWS]
    table = write_csv(tmp_path / "many.csv", rows)
    few = few_rows(config.settings(str(table)))
    assert few.columns == ["sentence", "label"]
    assert [few["label"].to_list().count(label) for label in ("0", "1")] == [TEXTS, TEXTS]


@pytest.mark.parametrize("checkpoints", [2, math.inf])
def test_a_run_that_fails_is_told(checkpoints: float, tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; print('Traceback', 'No.', sep='\\n', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(HeadstartError, match=r"a run ended with code 3\. It said: Traceback\nNo\."):
        live(failing, tmp_path / "out", checkpoints)


def test_a_run_that_ends_before_it_could_be_killed_is_told(tmp_path: Path) -> None:
    quick = [sys.executable, "-c", "pass"]
    assert live(quick, tmp_path / "out") == ""
    with pytest.raises(HeadstartError, match=r"a run ended with code 0"):
        live(quick, tmp_path / "out", checkpoints=2)


def test_the_process_is_killed_and_gone(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time; out = pathlib.Path(sys.argv[-1])\n"
        "out.mkdir(); (out / 'pid').write_text(str(os.getpid()))\n"
        "[(out / f'checkpoint-{n}').mkdir() for n in (9, 10)]; time.sleep(60)"
    )
    out = tmp_path / "out"
    assert live([sys.executable, "-c", script, str(out)], out, checkpoints=2) == "checkpoint-10"
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "pid").read_text()), 0)
