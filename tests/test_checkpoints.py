"""Checkpoints: whole or absent, verified before they are trusted, and never lost to a write that fails."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.checkpoints import KEPT, MANIFEST, STATE, TENSORS, Checkpoints, check_out
from headstart.errors import DiskError, RunError


def content(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and a state that tell of which step they are."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "now.weight": torch.randn(5, 3, generator=generator),
        "now.bias": torch.randn(3, generator=generator).bfloat16(),
        "exp_avg.count": torch.tensor(step),
    }
    epochs = [{"train_loss": loss} for loss in (0.1 + step, 1e-300, 1 / 3)]
    return tensors, {"epochs": epochs[: step // 10], "done": step % 10}


def written(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, 10.0)
    for step in steps:
        checkpoints.save(step, *content(step))
    return checkpoints


def names(folder: Path) -> list[str]:
    """Everything there, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def assert_found(checkpoints: Checkpoints, step: int) -> None:
    """The newest that is whole is that of a step, to the bit."""
    found = checkpoints.newest()
    assert found is not None
    tensors, state = content(step)
    assert found[1] == state
    assert found[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)


# --- there and back


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written(tmp_path, 17)
    assert names(tmp_path) == ["checkpoint-17"]
    assert names(tmp_path / "checkpoint-17") == sorted((TENSORS, STATE, MANIFEST))
    said: list[str] = []
    assert_found(Checkpoints(tmp_path, 10.0, said.append), 17)
    assert said == [f"Resumed from {tmp_path / 'checkpoint-17'} (epoch 2, 7 steps)."]


def test_where_there_is_none_nothing_is_found(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        said: list[str] = []
        assert Checkpoints(folder, 10.0, said.append).newest() is None
        assert said == []


def test_the_newest_is_by_number_and_only_the_last_two_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-plan.json").write_text("{}")
    (tmp_path / "checkpoint-x").mkdir()
    for steps in ((8,), (9,), (10,), (100,)):
        written(tmp_path, *steps)
        assert_found(Checkpoints(tmp_path, 10.0), *steps)
    assert KEPT == 2
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-plan.json", "checkpoint-x"]


def test_a_step_written_again_takes_the_others_place(tmp_path: Path) -> None:
    written(tmp_path, 3, 4)
    checkpoints = Checkpoints(tmp_path, 10.0)
    checkpoints.save(4, *content(5))
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert_found(checkpoints, 5)


def test_clearing_leaves_what_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    (tmp_path / "checkpoint-plan.json").write_text("{}")
    (tmp_path / "metrics.json").write_text("{}")
    checkpoints.clear()
    assert names(tmp_path) == ["checkpoint-plan.json", "metrics.json"]
    assert checkpoints.newest() is None
    (tmp_path / "checkpoint-3").write_text("no folder")
    with pytest.raises(DiskError, match="checkpoint-3"):
        checkpoints.clear()


def test_one_is_due_after_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("headstart.checkpoints.time.monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, 2.0)
    assert not checkpoints.due()
    now += 119
    assert not checkpoints.due()
    now += 1
    assert checkpoints.due()
    checkpoints.save(1, *content(1))
    assert not checkpoints.due()
    now += 120
    assert checkpoints.due()


# --- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "torn tensors": lambda place: tear(place / TENSORS),
    "a flipped bit of a tensor": lambda place: flip(place / TENSORS),
    "no tensors": lambda place: (place / TENSORS).unlink(),
    "a torn state": lambda place: tear(place / STATE),
    "a flipped bit of the state": lambda place: flip(place / STATE),
    "an empty state": lambda place: (place / STATE).write_bytes(b""),
    "no state": lambda place: (place / STATE).unlink(),
    "no manifest": lambda place: (place / MANIFEST).unlink(),
    "a torn manifest": lambda place: tear(place / MANIFEST),
    "noise for a manifest": lambda place: (place / MANIFEST).write_bytes(b"\xff\x00" * 40),
    "a manifest that is a list": lambda place: (place / MANIFEST).write_text("[1]"),
    "a manifest of nothing": lambda place: (place / MANIFEST).write_text("{}"),
    "an empty folder": empty,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_passed_over_for_the_one_before(kind: str, tmp_path: Path) -> None:
    written(tmp_path, 12, 13)
    DAMAGE[kind](tmp_path / "checkpoint-13")
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 10.0, said.append)
    assert_found(checkpoints, 12)
    passed, resumed = said
    assert passed.startswith(f"{tmp_path / 'checkpoint-13'}: passed over, it is damaged (")
    assert resumed.startswith(f"Resumed from {tmp_path / 'checkpoint-12'} ")


def test_if_all_are_damaged_it_starts_anew(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    flip(tmp_path / "checkpoint-1" / TENSORS)
    tear(tmp_path / "checkpoint-2" / MANIFEST)
    said: list[str] = []
    assert Checkpoints(tmp_path, 10.0, said.append).newest() is None
    assert len(said) == 2


@pytest.mark.parametrize("damaged", [(600,), (500, 600)])
def test_those_that_were_passed_over_make_room_first(damaged: tuple[int, ...], tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 500, 600)
    for step in damaged:
        flip(tmp_path / f"checkpoint-{step}" / TENSORS)
    steps = [510, 520] if damaged == (600,) else [10, 20]
    for step in steps:
        checkpoints.save(step, *content(step))
        assert_found(Checkpoints(tmp_path, 10.0), step)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in steps]


def test_what_a_kill_has_left_of_a_write_goes_with_the_next(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.12345678.tmp")
    checkpoints.save(3, *content(3))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_one_that_was_never_renamed_is_not_there(tmp_path: Path) -> None:
    written(tmp_path, 5)
    (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-9.12345678.tmp")
    assert Checkpoints(tmp_path, 10.0).newest() is None


# --- the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("where", ["save_file", "rename"])
def test_a_write_that_fails_leaves_those_that_are_there(
    where: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = written(tmp_path, 1, 2)
    written_at = checkpoints.written

    def refuse(*given: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename" if where == "rename" else "headstart.checkpoints.save_file", refuse)
        with pytest.raises(DiskError, match="checkpoint-3: "):
            checkpoints.save(3, *content(3))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"], "and nothing half-written"
    assert checkpoints.written == written_at
    assert_found(checkpoints, 2)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="a part of the path is missing or is no folder"):
        written(tmp_path / "file", 3)
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o555)
        try:
            with pytest.raises(DiskError, match="cannot be written"):
                written(tmp_path, 3)
        finally:
            tmp_path.chmod(0o755)
    assert_found(Checkpoints(tmp_path, 10.0), 2)


def test_the_manifest_is_of_the_files_as_they_are(tmp_path: Path) -> None:
    import hashlib

    written(tmp_path, 1)
    place = tmp_path / "checkpoint-1"
    sums = json.loads((place / MANIFEST).read_text())
    assert sums == {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in (TENSORS, STATE)}


# --- the output folder


def test_an_output_folder_is_checked_before_any_work(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "run", overwrite=False)
    assert not (tmp_path / "new" / "run").exists()
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file; --out takes a folder"):
        check_out(tmp_path / "file", overwrite=False)
    with pytest.raises(DiskError, match="a part of the path is missing or is no folder"):
        check_out(tmp_path / "file" / "run", overwrite=False)
    with pytest.raises(DiskError, match="name is too long"):
        check_out(tmp_path / ("x" * 400), overwrite=False)


def test_a_folder_with_something_in_it_is_not_overwritten_by_chance(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is not empty\. Choose another --out, or replace it with --overwrite"):
        check_out(tmp_path, overwrite=False)
    with pytest.raises(RunError, match=r"is not a run folder \(no headstart.json\), so --overwrite does not replace"):
        check_out(tmp_path, overwrite=True)
    (tmp_path / "headstart.json").write_text("{}")
    check_out(tmp_path, overwrite=True)
    with pytest.raises(RunError, match="is not empty"):
        check_out(tmp_path, overwrite=False)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
