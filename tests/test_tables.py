"""Opening a table: names, delimiters, headers, columns. How whole tables are read is in test_data.py."""

from pathlib import Path

import pytest

from headstart import tables
from headstart.errors import DataError


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.csv", ".csv"),
        ("A.TSV", ".tsv"),
        ("a.b.jsonl.gz", ".jsonl"),
        ("x.JSON.GZ", ".json"),
        ("p.parquet", ".parquet"),
    ],
)
def test_the_format_is_the_ending(name: str, ending: str) -> None:
    assert tables.file_format(name) == ending
    assert tables.is_delimited(name) is (ending in (".csv", ".tsv"))


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.csv.zip", "csv"])
def test_another_ending_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"headstart reads \.csv"):
        tables.file_format(name)


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [
        ("sentence,label", ","),
        ("sentence;label", ";"),
        ("text\tlabel", "\t"),
        ("a|b|c", "|"),
        ('"last, first";label', ";"),
        ("only", ","),
    ],
)
def test_the_delimiter_is_read_off_the_header(tmp_path: Path, header: str, delimiter: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(header + "\nx,y;z\n")
    assert tables.read_delimiter(str(path)) == delimiter


def test_rows_are_named_or_counted() -> None:
    assert tables.name_rows([3]) == "row 3"
    assert tables.name_rows([3, 7]) == "rows 3 and 7"
    assert tables.name_rows(range(2, 43)) == "rows 2, 3, 4, 5, 6, 7, 8, 9, … (41 in all)"


def test_headers_lose_marks_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\ufeff sentence , label\nx,1\n")
    assert tables.scan(str(path)).collect().columns == ["sentence", "label"]


def test_columns_are_found_by_role() -> None:
    assert tables.find_column("t", ["id", "review", "stars"], None, "text") == "review"
    assert tables.find_column("t", ["id", "review", "stars"], "stars", "label") == "stars"
    with pytest.raises(DataError, match="could both be the text column; choose one with --text"):
        tables.find_column("t", ["review", "content"], None, "text")
    with pytest.raises(DataError, match=r"has no label column \(label, labels"):
        tables.find_column("t", ["id", "review"], None, "label")


def test_a_broken_file_is_looked_at_closely(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('sentence,label\na,1\nb\nc,d,2\n"open,1\n')
    (opened, few, many) = tables.faults(str(path))
    assert "row 5 opens a quote that is never closed" in opened
    assert "row 3 has 1 field where the header has 2" in few
    assert "row 4 has 3 fields where the header has 2" in many
