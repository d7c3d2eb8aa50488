"""Files and folders: whole or absent, whatever fails, is killed, or comes to be there meanwhile."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from headstart import folders
from headstart.checkpoints import check_out
from headstart.errors import DiskError, RunError
from headstart.folders import new_folder, reserve, whole_file

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["headstart.folders"])


def test_a_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with pytest.raises(RuntimeError, match="midway"), new_folder(out) as folder:  # noqa: PT012  # the block fills the folder
        (folder / "config.json").write_text("{}")
        assert not out.exists()
        raise RuntimeError("midway")
    assert list((tmp_path / "deep").iterdir()) == []
    with new_folder(out) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_text("x")
        (folder / "config.json").write_text("{}")
    assert sorted(path.name for path in out.rglob("*")) == ["config.json", "model.onnx", "onnx"]
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def finish(out: Path, content: str, *, overwrite: bool = False) -> None:
    """A result at `out`, which `check_out` has found free or replaceable before."""
    with new_folder(out, overwrite=overwrite) as folder:
        (folder / "headstart.json").write_text(content)


@pytest.mark.parametrize("taken", [[], ["run-2"], ["run-2", "run-3"]])
def test_what_has_come_to_be_there_meanwhile_stays_and_the_result_is_kept_beside_it(
    tmp_path: Path, taken: list[str]
) -> None:
    out = tmp_path / "run"
    for name in taken:
        finish(tmp_path / name, "taken")
    check_out(out, overwrite=False)
    finish(out, "another's")
    kept = tmp_path / f"run-{2 + len(taken)}"
    message = rf"^{re.escape(str(out))}: .*has come to be there.*is kept in {re.escape(str(kept))}\b"
    with pytest.raises(RunError, match=message):
        finish(out, "mine")
    assert {path.name: (path / "headstart.json").read_text() for path in tmp_path.iterdir()} == {
        **dict.fromkeys(taken, "taken"),
        "run": "another's",
        kept.name: "mine",
    }


def test_a_file_that_has_come_to_be_there_stays(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run-2"), new_folder(tmp_path / "run") as folder:  # noqa: PT012  # the block fills the folder
        (folder / "config.json").write_text("{}")
        (tmp_path / "run").write_text("a note")
    assert (tmp_path / "run").read_text() == "a note"
    assert (tmp_path / "run-2" / "config.json").is_file()


def test_overwriting_replaces_the_run_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(out, "old")
    check_out(out, overwrite=True)
    (out / "onnx").mkdir()
    finish(out, "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in out.iterdir()] == ["headstart.json"]
    assert (out / "headstart.json").read_text() == "new"


def test_the_old_run_is_removed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    finish(out, "old")

    def refused(folder: Path, place: Path) -> Path:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(folders, "_rename", refused)
    with pytest.raises(DiskError, match="disk is full"):
        finish(out, "new", overwrite=True)
    (left,) = tmp_path.rglob("headstart.json")
    assert left.read_text() == "old"


def finish_often(folder: str, name: str) -> None:
    """In a child: try to be the one that writes each of 50 folders."""
    for number in range(50):
        with contextlib.suppress(RunError):
            finish(Path(folder) / str(number), name)


def test_runs_that_end_together_all_keep_their_results(tmp_path: Path) -> None:
    children = [processes.Process(target=finish_often, args=(str(tmp_path), name)) for name in "abc"]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    found: dict[str, list[str]] = {}
    for path in tmp_path.iterdir():
        found.setdefault(path.name.split("-")[0], []).append((path / "headstart.json").read_text())
    assert {name: sorted(content) for name, content in found.items()} == {str(i): ["a", "b", "c"] for i in range(50)}


def test_an_empty_folder_behind_a_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    check_out(tmp_path / "run", overwrite=False)
    finish(tmp_path / "run", "mine")
    assert (tmp_path / "disk" / "headstart.json").read_text() == "mine"
    assert (tmp_path / "run").is_symlink()


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "headstart.json").write_text("old")
    with pytest.raises(OSError, match="odd"), new_folder(out, overwrite=True) as folder:  # noqa: PT012  # the block fills the folder
        (folder / "new").write_text("new")
        raise OSError("odd")
    assert [path.name for path in out.iterdir()] == ["headstart.json"]
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def write_for_ever(out: str, progress: Connection) -> None:
    """In a child: fill a new folder without end."""
    with new_folder(Path(out)) as folder:
        for number in range(10**9):
            (folder / f"{number % 50}.bin").write_bytes(bytes(10_000))
            progress.send(number)


@pytest.mark.parametrize("before", ["nothing", "a run"])
def test_a_killed_writer_leaves_no_half_folder(before: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if before == "a run":
        out.mkdir()
        (out / "headstart.json").write_text("{}")
    for stop_at in (0, 7, 60):
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=write_for_ever, args=(str(out), theirs))
        child.start()
        theirs.close()
        while ours.recv() < stop_at:
            pass
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = sorted(path.name for path in out.iterdir()) if out.exists() else None
        assert found == (["headstart.json"] if before == "a run" else None)
    check_out(out, overwrite=True)  # what it left does not stand in the way of the next


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    finish(out, "old")
    monkeypatch.setattr(folders, "_rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    with pytest.raises(OSError, match="gone"):
        finish(out, "new", overwrite=True)
    assert (out / "headstart.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.csv"
    with whole_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="midway"), whole_file(path) as temporary:  # noqa: PT012  # the block fills the file
        temporary.write_text("ne")
        raise RuntimeError("midway")
    assert path.read_text() == "old"
    assert [one.name for one in path.parent.iterdir()] == ["table.csv"]


def test_room_is_taken_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        reserve(file, 1_000_000)
    found = (tmp_path / "file").stat()
    assert found.st_size == 1_000_000
    if hasattr(os, "posix_fallocate"):
        assert found.st_blocks * 512 >= 1_000_000, "no hole is left to be filled later"
