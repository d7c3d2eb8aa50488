"""The proof of exact resuming: that it holds here, and that it would say so if it did not."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars
import pytest

from headstart import config, selfcheck
from headstart.errors import HeadstartError
from headstart.selfcheck import TEXTS, check_resume, finish, kill
from tests.conftest import SMALL_ROWS, kinds_of_rows, write_csv


@pytest.mark.parametrize("thaw", ["auto", pytest.param("2", marks=pytest.mark.slow)])
def test_it_proves_that_resuming_is_exact(
    thaw: str, tiny_bert: Path, small_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(config.__file__).parents[1]))
    said: list[str] = []
    given: dict[str, Any] = {"model": str(tiny_bert), "thaw": thaw, "device": "cpu", "label_names": ("bad", "good")}
    before = sorted(small_table.parent.iterdir())
    weights, losses, last = check_resume(config.settings(str(small_table), **given), said.append).splitlines()
    assert said[:2] == ["Training undisturbed.", "Training again, to be killed after its second checkpoint."]
    assert said[2].startswith("Killed by SIGKILL; resuming")
    assert weights.startswith("Weights   ")
    assert weights.endswith(" bytes, equal to the last bit")
    assert int(weights.split()[1].replace(",", "")) > 50_000
    assert re.fullmatch(r"Losses    equal, too; in training: \d\.\d{6}, \d\.\d{6}", losses)
    assert last == "Resuming is exact on this machine."
    assert sorted(small_table.parent.iterdir()) == before, "nothing is left behind"


@pytest.mark.slow
def test_several_labels_are_checked_as_such(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(config.__file__).parents[1]))
    table = write_csv(tmp_path / "multi.csv", kinds_of_rows()["multi"])
    chosen = config.settings(str(table), model=str(tiny_bert), device="cpu")
    assert check_resume(chosen, lambda _: None).endswith("Resuming is exact on this machine.")


@pytest.mark.parametrize("differ", ["", "weights", "losses"])
def test_one_bit_of_difference_is_told(differ: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained on and how is asked for as a command; here it only leaves weights and losses."""
    commands: list[Sequence[str]] = []

    def leave_weights(command: Sequence[str], out: Path | None = None) -> None:
        commands.append(command)
        place = Path(command[command.index("--out") + 1])
        place.mkdir(exist_ok=True)
        other = differ if "--resume" in command else ""
        (place / "model.safetensors").write_bytes(bytes(9) + bytes([other == "weights"]))
        epoch = {"train_loss": 0.5, "validation_loss": 0.25 + 1e-15 * (other == "losses"), "seconds": len(commands)}
        (place / "headstart.json").write_text(json.dumps({"history": [epoch]}))

    monkeypatch.setattr(selfcheck, "finish", leave_weights)
    monkeypatch.setattr(selfcheck, "kill", leave_weights)
    rows = [(f"{text} {i}", label) for i in range(5) for text, label in SMALL_ROWS]
    chosen = config.settings(str(write_csv(tmp_path / "many.csv", rows)), thaw="1", seed=7, store=False)
    if differ:
        with pytest.raises(HeadstartError, match=rf"ended with other {differ}.* than one left alone"):
            check_resume(chosen, lambda _: None)
    else:
        assert "10 bytes, equal to the last bit" in check_resume(chosen, lambda _: None)
    assert len(commands) == 3
    for command in commands:
        assert {"--thaw=1", "--seed=7", "--no-store", "--model=minilm"} <= set(command)


def test_a_few_texts_of_each_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"{text} {i}", ("bad", "good")[int(label)]) for i in range(5) for text, label in SMALL_ROWS]
    table, seen = write_csv(tmp_path / "many.csv", rows, "review", "stars"), list[polars.DataFrame]()

    def look(command: Sequence[str]) -> None:
        seen.append(polars.read_csv(command[command.index("train") + 1]))
        raise HeadstartError("enough seen")

    monkeypatch.setattr(selfcheck, "finish", look)
    with pytest.raises(HeadstartError, match="enough seen"):
        check_resume(config.settings(str(table), label="stars"), print)
    assert set(seen[0].columns) == {"sentence", "label"}
    assert [seen[0]["label"].to_list().count(label) for label in ("bad", "good")] == [TEXTS, TEXTS]


def test_a_run_that_fails_is_told() -> None:
    failing = [sys.executable, "-c", "import sys; print('Traceback', 'No.', sep='\\n', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(HeadstartError, match=r"a run ended with code 3\. It said: Traceback\nNo\."):
        finish(failing)


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_that_ends_before_it_could_be_killed_is_told(code: int, tmp_path: Path) -> None:
    quick = [sys.executable, "-c", f"import sys; sys.exit({code})"]
    with pytest.raises(HeadstartError, match=rf"a run ended with code {code} before it was killed"):
        kill(quick, tmp_path / "out")


def test_the_process_is_killed_and_gone(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time; out = pathlib.Path(sys.argv[-1])\n"
        "out.mkdir(); (out / 'pid').write_text(str(os.getpid()))\n"
        "[(out / f'checkpoint-{n}').mkdir() for n in (9, 10)]; time.sleep(60)"
    )
    kill([sys.executable, "-c", script, str(tmp_path / "out")], tmp_path / "out")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "out" / "pid").read_text()), 0)
