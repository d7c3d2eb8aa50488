"""Folders here and elsewhere have the same face, and a file is there whole or not at all."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from headstart.errors import DataError, DiskError, InputError
from headstart.places import Place, absolute, find_tables, near

OUT = "/nowhere/out"


@pytest.mark.parametrize("kind", ["here", "elsewhere"])
def test_files_of_a_folder(kind: str, tmp_path: Path) -> None:
    url = str(tmp_path / "place") if kind == "here" else "memory://place"
    place = Place(url)
    assert place.names() == []
    place.write("a/b.txt", b"one")
    place.write("a/b.txt", b"two")
    place.write("c", b"")
    assert place.read("a/b.txt") == b"two"
    assert place.names() == ["a", "c"]
    assert place.names("a") == ["b.txt"]
    place.remove("a")
    place.remove("nothing")
    assert place.names() == ["c"]


def test_what_killed_writers_left_is_no_file_and_goes(tmp_path: Path) -> None:
    (tmp_path / ".part.1234.tmp").write_bytes(b"torn")
    place = Place(str(tmp_path))
    assert place.names() == []
    place.tidy()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_the_disks_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="is no folder"):
        Place(str(tmp_path / "file" / "place")).write("a", b"")


def test_tables_of_a_folder_a_pattern_and_a_path(tmp_path: Path) -> None:
    for name in ("b.csv", "a.parquet", "c.txt", "_d.csv", ".e.csv"):
        (tmp_path / name).write_text(name)
    (tmp_path / "f.csv").mkdir()
    names = [Path(one).name for one in find_tables(str(tmp_path), OUT)]
    assert names == ["a.parquet", "b.csv"]
    found = find_tables(str(tmp_path / "*.csv"), OUT)
    assert list(found) == [str(tmp_path / "b.csv")]
    os.utime(tmp_path / "b.csv", (1, 1))  # as if it were written again, with as many bytes
    assert find_tables(str(tmp_path / "*.csv"), OUT) != found
    assert list(find_tables(str(tmp_path / "b.csv"), OUT)) == [str(tmp_path / "b.csv")]
    with pytest.raises(DataError, match="headstart reads"):
        find_tables(str(tmp_path / "c.txt"), OUT)
    with pytest.raises(DataError, match="no table"):
        find_tables(str(tmp_path / "*.tsv"), OUT)


def test_links_are_tables_and_answers_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "a [v2]"
    (folder / "out").mkdir(parents=True)
    (tmp_path / "b.csv").write_text("sentence")
    (folder / "link.csv").symlink_to(tmp_path / "b.csv")
    (folder / "out" / "part-00000.parquet").write_text("")
    assert list(find_tables(str(folder), OUT)) == [str(folder / "link.csv")]
    found = find_tables(str(tmp_path / "*" / "**" / "*.parquet"), OUT)
    assert [Path(one).name for one in found] == ["part-00000.parquet"]
    with pytest.raises(DataError, match="no table"):
        find_tables(str(tmp_path / "*" / "**" / "*.parquet"), str(folder / "out"))


def test_what_is_elsewhere_is_copied_here_to_be_read() -> None:
    memory = fsspec.filesystem("memory")
    for name in "abcd":
        memory.pipe_file(f"/there/{name}.csv", name.encode())

    def read(name: str) -> bytes:
        with near(f"memory://there/{name}.csv") as path:
            time.sleep(0.01)
            assert path.endswith(f"{name}.csv")
            return Path(path).read_bytes()

    with ThreadPoolExecutor(8) as pool:  # more tables than copies are kept, and each is read by several at once
        assert b"".join(pool.map(read, "abcd" * 8)) == b"abcd" * 8


@pytest.mark.parametrize("cause", [None, OSError(5, "gone"), ValueError("Input/output error (os error 5)")])
def test_a_disk_that_refuses_is_no_fault_of_a_table(tmp_path: Path, cause: Exception | None) -> None:
    (tmp_path / "a.csv").write_text("id")
    fault = DataError("it is no table")
    fault.__cause__ = cause
    wanted, said = (DataError, "it is no table") if cause is None else (InputError, "Input/output error")
    with pytest.raises(InputError, match=said) as raised, near(str(tmp_path / "a.csv")):
        raise fault
    assert type(raised.value) is wanted


def test_what_is_out_of_reach_is_a_sentence(tmp_path: Path) -> None:
    for gone in (str(tmp_path / "gone.csv"), "memory://gone.csv"):
        with pytest.raises(InputError, match="cannot be read on"), near(gone):
            pass
    with pytest.raises(InputError, match="cannot be reached"):
        find_tables("foo://x", OUT)
    with pytest.raises(InputError, match="half-written"):
        Place("sftp://host/x")
    assert absolute("file:///x/y") == "/x/y"
    assert absolute("memory://x") == "memory://x"
    assert Path(absolute("x")).is_absolute()
