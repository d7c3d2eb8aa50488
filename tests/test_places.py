"""Folders here and elsewhere have the same face, and a file is there whole or not at all."""

from pathlib import Path

import fsspec
import pytest

from headstart.errors import DataError, DiskError
from headstart.places import Place, absolute, find_tables, near


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
    names = [Path(one).name for one in find_tables(str(tmp_path))]
    assert names == ["a.parquet", "b.csv"]
    assert find_tables(str(tmp_path / "*.csv")) == {str(tmp_path / "b.csv"): 5}
    assert list(find_tables(str(tmp_path / "b.csv"))) == [str(tmp_path / "b.csv")]
    with pytest.raises(DataError, match="headstart reads"):
        find_tables(str(tmp_path / "c.txt"))
    with pytest.raises(DataError, match="no table"):
        find_tables(str(tmp_path / "*.tsv"))


def test_what_is_elsewhere_is_copied_here_to_be_read() -> None:
    fsspec.filesystem("memory").pipe_file("/there/a.csv", b"sentence\nso\n")
    path = near("memory://there/a.csv")
    assert Path(path).read_bytes() == b"sentence\nso\n"
    assert path.endswith("a.csv")
    assert near("/here/b.csv") == "/here/b.csv"
    assert absolute("memory://x") == "memory://x"
    assert Path(absolute("x")).is_absolute()
