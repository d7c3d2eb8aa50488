"""Tables of every format, columns, labels, everything that can be wrong with a file, and the splits."""

import csv
import dataclasses
import gzip
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headstart import data
from headstart.data import Dataset, label_order, label_texts, load, load_texts, split, text_key
from headstart.errors import DataError
from tests.conftest import write_csv

ROWS = [(f"sentence number {i}, with a comma", "pos" if i % 3 else "neg") for i in range(24)]

# A parser must not lose any of these; lone surrogates are no text, and NUL marks a binary file.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=30)
texts = st.one_of(
    any_text, st.sampled_from(['"', '""', "a,b", "a\nb", "\n", "a;b\tc|d", "é\u2028x\x85y", "'", "\ufeffx"])
)
in_files = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def frame_of(rows: Sequence[tuple[str, str]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"sentence": pl.String, "label": pl.String}, orient="row")


def delimited(rows: Sequence[tuple[str, str]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([("sentence", "label"), *rows])
    return file.getvalue().encode()


def polars_csv(rows: Sequence[tuple[str, str]]) -> bytes:
    return frame_of(rows).write_csv().encode()


def json_lines(rows: Sequence[tuple[str, str]]) -> bytes:
    lines = (json.dumps({"sentence": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows)
    return "".join(lines).encode()


def parquet(rows: Sequence[tuple[str, str]]) -> bytes:
    file = io.BytesIO()
    frame_of(rows).write_parquet(file)
    return file.getvalue()


WRITERS: dict[str, Callable[[Sequence[tuple[str, str]]], bytes]] = {
    ".csv": delimited,
    ".CSV": polars_csv,
    ".tsv": lambda rows: delimited(rows, "\t"),
    ".jsonl": json_lines,
    ".ndjson": lambda rows: frame_of(rows).write_ndjson().encode(),
    ".json": lambda rows: frame_of(rows).write_json().encode(),
    ".parquet": parquet,
}


def write(folder: Path, content: "str | bytes", name: str = "table.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*rows: str, header: str = "sentence,label") -> str:
    return "\n".join((header, *rows)) + "\n"


def good(count: int = 20) -> list[str]:
    """Rows without a fault, to put faulty ones among."""
    return [f"text {i},{i % 2}" for i in range(count)]


def labels_of(dataset: Dataset) -> list[str]:
    return [dataset.names[i] for i in dataset.labels]


def made(labels: Sequence[int], texts_: Sequence[str] | None = None, names: Sequence[str] | None = None) -> Dataset:
    names = names or [str(i) for i in range(max(labels) + 1)]
    given_texts = list(texts_) if texts_ is not None else [f"text {i}" for i in range(len(labels))]
    return Dataset(given_texts, np.array(labels, dtype=np.int64), tuple(names), np.arange(len(labels)) + 2)


# --- formats


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_reads_the_same(tmp_path: Path, ending: str, packed: bool) -> None:
    content = WRITERS[ending](ROWS)
    source = write(tmp_path, gzip.compress(content) if packed else content, f"t{ending}{'.gz' if packed else ''}")
    dataset = load(source)
    assert dataset.texts == [text for text, _ in ROWS]
    assert labels_of(dataset) == [label for _, label in ROWS]
    assert dataset.names == ("neg", "pos")
    first = 2 if ending.lower() in (".csv", ".tsv") else 1
    assert dataset.rows.tolist() == list(range(first, first + len(ROWS)))


@pytest.mark.parametrize("ending", WRITERS)
@given(rows=st.lists(st.tuples(texts, st.sampled_from(["a", "b c", "é"])), min_size=1, max_size=12))
@example(rows=[('say "hi", she\nsaid;', "a"), ("\u2028", "a"), ("x\x85y\x1cz\x0bw", "é")])
@in_files
def test_any_text_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, ending: str, rows: list[tuple[str, str]]
) -> None:
    source = write(tmp_path_factory.mktemp("any"), WRITERS[ending](rows), f"t{ending}")
    kept = [(text, label) for text, label in rows if text.strip()]
    known = [("a", "b c", "é")]
    if not kept:
        with pytest.raises(DataError, match="at least 1"):
            load(source, known=known, least_rows=1)
        return
    dataset = load(source, known=known, least_rows=1)
    assert dataset.texts == [text for text, _ in kept]
    assert labels_of(dataset) == [label for _, label in kept]


@given(rows=st.lists(st.tuples(texts, st.just("a")), min_size=1, max_size=8), fault=st.integers(1, 9))
@in_files
def test_a_ragged_row_is_found_among_any_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], fault: int
) -> None:
    rows = [(text + ".", label) for text, label in rows]
    place = min(fault, len(rows))
    head, tail = delimited(rows[:place]), delimited(rows[place:]).split(b"\n", 1)[1]
    source = write(tmp_path_factory.mktemp("ragged"), head + b"one field only\n" + tail)
    with pytest.raises(DataError) as caught:
        load(source, least_rows=1)
    assert f"row {place + 2} has 1 field where the header has 2" in str(caught.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_detected(tmp_path: Path, delimiter: str) -> None:
    rows = [("a, b; c | d", "0"), ("plain", "1")] * 8
    dataset = load(write(tmp_path, delimited(rows, delimiter)))
    assert dataset.texts == [text for text, _ in rows]


def test_the_delimiter_of_other_columns_is_the_commonest(tmp_path: Path) -> None:
    header, rows = "id;body;kind", [f"{i};a, b, c;{i % 2}" for i in range(12)]
    dataset = load(write(tmp_path, lines(*rows, header=header)), "body", "kind")
    assert dataset.texts == ["a, b, c"] * 12


@pytest.mark.parametrize("name", [".csv", ".jsonl", ".json"])
def test_a_byte_order_mark_is_no_part_of_the_table(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + WRITERS[name](ROWS)
    for packed, ending in ((content, ""), (gzip.compress(content), ".gz")):
        assert load(write(tmp_path, packed, f"t{name}{ending}")).texts == [text for text, _ in ROWS]


@pytest.mark.parametrize(
    "header", [" sentence , label ", '"sentence","label"', '\ufeff" sentence",label', "sentence,label,,"]
)
def test_headers_are_cleaned(tmp_path: Path, header: str) -> None:
    more = "," * (header.count(",") - 1)
    dataset = load(write(tmp_path, lines(*(row + more for row in good()), header=header)))
    assert dataset.columns == ("sentence", "label")
    assert len(dataset) == 20


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends(tmp_path: Path, end: str) -> None:
    dataset = load(write(tmp_path, lines(*good()).replace("\n", end)))
    assert dataset.texts[-1] == "text 19"
    assert dataset.names == ("0", "1")


@pytest.mark.parametrize(
    "name", ["a[1].csv", "a*.csv", "what?.csv", "a[1].jsonl", "a[1].parquet", "ü .csv", "t.csv.CSV"]
)
def test_signs_in_a_name_are_no_pattern(tmp_path: Path, name: str) -> None:
    writer = WRITERS[Path(name).suffix.lower()]
    write(tmp_path, WRITERS[Path(name).suffix.lower()](ROWS[:12]), "a1" + Path(name).suffix)
    assert len(load(write(tmp_path, writer(ROWS), name))) == len(ROWS)


def test_the_sample_is_there() -> None:
    dataset = load("sample")
    assert len(dataset) >= 600
    assert len({text_key(text) for text in dataset.texts}) == len(dataset)
    assert dataset.notices == ()


def test_huge_fields_and_many_columns(tmp_path: Path) -> None:
    long = "word " * 400_000
    wide = ",".join(f"c{i}" for i in range(300))
    rows = [f'"{long}",0,{wide}', *(f"text {i},{i % 2},{wide}" for i in range(20))]
    dataset = load(write(tmp_path, lines(*rows, header=f"sentence,label,{wide}")))
    assert dataset.texts[0] == long


def test_texts_alone_need_no_label(tmp_path: Path) -> None:
    assert load_texts(write(tmp_path, "sentence\none\n\n two \n")) == ["one", " two "]
    with pytest.raises(DataError, match="no text in the column 'sentence'"):
        load_texts(write(tmp_path, "sentence,x\n,1\n"))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".jsonl", ".parquet"])
def test_a_table_on_the_hub_is_left_to_polars(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(source: str, *, separator: str = "", **options: Any) -> pl.LazyFrame:
        asked.append((source, separator))
        return frame_of(ROWS).with_columns(pl.lit(None).alias("empty")).lazy()

    for name in ("scan_csv", "scan_ndjson", "scan_parquet"):
        monkeypatch.setattr(pl, name, fetched)
    source = f"hf://datasets/someone/set/train{ending}"
    assert load(source).texts == load_texts(source) == [text for text, _ in ROWS]
    assert set(asked) == {(source, {".csv": ",", ".tsv": "\t"}.get(ending.removesuffix(".gz"), ""))}


def test_a_table_on_the_hub_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: str, **options: Any) -> pl.LazyFrame:
        raise OSError("no route to host")

    monkeypatch.setattr(pl, "scan_csv", refused)
    with pytest.raises(DataError, match=r"cannot be fetched \(no route to host\)\. Download it and give the file\."):
        load("hf://datasets/someone/set/train.csv")


# --- columns


@pytest.mark.parametrize("text", ["sentence", "text", "review", "content", "Review", "TEXT"])
@pytest.mark.parametrize("label", ["label", "labels", "target", "sentiment"])
def test_usual_columns_are_found(tmp_path: Path, text: str, label: str) -> None:
    dataset = load(write(tmp_path, lines(*(f"7,{row}" for row in good()), header=f"id,{text},{label}")))
    assert dataset.columns == (text, label)


def test_the_first_usual_name_wins_over_the_others(tmp_path: Path) -> None:
    rows = [f"no,text {i},{i % 2},9" for i in range(20)]
    dataset = load(write(tmp_path, lines(*rows, header="review,sentence,label,target")))
    assert dataset.columns == ("sentence", "label")


def test_the_persons_choice_wins(tmp_path: Path) -> None:
    rows = [f"no,text {i},5,{i % 2}" for i in range(20)]
    dataset = load(write(tmp_path, lines(*rows, header="sentence,body,label,stars")), "body", "stars")
    assert dataset.columns == ("body", "stars")
    assert dataset.texts[0] == "text 0"
    assert dataset.names == ("0", "1")


@pytest.mark.parametrize(
    ("header", "wanted", "said"),
    [
        ("text,review,label", {}, ["'text' and 'review' could both be the text column", "--text COLUMN"]),
        ("sentence,target,sentiment", {}, ["'target' and 'sentiment' could both be the label column", "--label"]),
        ("sentense,label", {}, ["no text column", "'sentense', 'label'", "--text sentense"]),
        ("sentence,my_label", {}, ["no label column", "'sentence', 'my_label'", "--label my_label"]),
        ("sentence,outcome", {}, ["no label column", "--label COLUMN"]),
        ("sentence,label", {"text": "sentance"}, ["no column 'sentance'", "Did you mean 'sentence'?"]),
        ("sentence,label", {"label": "zzz"}, ["no column 'zzz'", "its columns are 'sentence', 'label'"]),
        ("sentence,label", {"label": "sentence"}, ["cannot both be the column 'sentence'"]),
        ("sentence,label,label", {}, ["the column 'label' appears twice"]),
        ("sentence,label, label ", {}, ["the column 'label' appears twice"]),
        ("this is the first text,1", {}, ["lack a header row"]),
    ],
)
def test_columns_that_cannot_be_told(tmp_path: Path, header: str, wanted: dict[str, Any], said: list[str]) -> None:
    rows = [",".join([f"text {i}"] * (header.count(",")) + [str(i % 2)]) for i in range(20)]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, lines(*rows, header=header)), **wanted)
    for piece in ["table.csv", *said]:
        assert piece in str(caught.value)


def test_no_label_column_never_suggests_the_text_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label column") as caught:
        load(write(tmp_path, lines(*good(), header="sentence,outcome")))
    assert "--label sentence" not in str(caught.value)


def test_all_problems_of_a_file_come_together(tmp_path: Path) -> None:
    rows = [*good(), "one field only", "a, b,1"]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, lines(*rows, header="body,kind")))
    joined = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for piece in ("no text column", "no label column", "row 22 has 1 field", "row 23 has 3 fields"):
        assert piece in joined
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, lines("a,1", "b,1")))
    assert len(caught.value.problems) == 2
    assert "2 usable rows, and at least 10" in caught.value.problems[0]
    assert "every row has the label '1'" in caught.value.problems[1]


# --- labels


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "-1", "2"], ("-1", "2", "9", "10")),
        (["1.0", "0.0", "1"], ("0", "1")),
        (["007", "7", "+3"], ("3", "7")),
        (["pos", "neg"], ("neg", "pos")),
        (["b", "B", "a"], ("B", "a", "b")),
        (["1", "2", "other"], ("1", "2", "other")),
        (["1.5", "2.0"], ("1.5", "2.0")),
        ([" yes", "yes ", "no"], ("no", "yes")),
        (["9" * 5000, "1"], ("1", "9" * 5000)),
        (["true", "false"], ("false", "true")),
    ],
)
def test_label_order(tmp_path: Path, labels: list[str], order: tuple[str, ...]) -> None:
    rows = [(f"text {i}", labels[i % len(labels)]) for i in range(40)]
    dataset = load(write(tmp_path, delimited(rows)))
    assert dataset.names == order
    assert set(labels_of(dataset)) == set(order)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 0, None, 10], ["1", "0", "", "10"]),
        ([1.0, -2.0, None, float("nan")], ["1", "-2", "", ""]),
        ([0.5, 1.0], ["0.5", "1.0"]),
        ([True, False, None], ["true", "false", ""]),
        (["", "  ", " a "], ["", "", "a"]),
        ([None, None], ["", ""]),
    ],
)
def test_label_texts_of_typed_columns(values: list[Any], found: list[str]) -> None:
    assert label_texts(pl.Series("label", values)) == found


@given(st.sets(st.integers(-(10**30), 10**30), min_size=1, max_size=20))
def test_whole_numbers_are_ordered_as_numbers(numbers: set[int]) -> None:
    assert [int(name) for name in label_order({str(number) for number in numbers})] == sorted(numbers)


@given(
    labels=st.lists(st.sampled_from(["b", "a", "10", "9", "é", "B", "-1"]), min_size=2, max_size=30), seed=st.integers()
)
@in_files
def test_label_order_does_not_depend_on_row_order(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], seed: int
) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(labels * 12)]
    mixed = random.Random(seed).sample(rows, len(rows))
    folder = tmp_path_factory.mktemp("order")
    if len(set(labels)) == 1:
        return
    one, other = load(write(folder, delimited(rows), "a.csv")), load(write(folder, delimited(mixed), "b.csv"))
    assert one.names == other.names == label_order(set(labels))
    assert dict(zip(one.texts, labels_of(one), strict=True)) == dict(zip(other.texts, labels_of(other), strict=True))


def test_labels_of_another_table_keep_its_places(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, lines("a,2", "b,0.0")), known=[("0", "1", "2")], least_rows=1)
    assert dataset.labels.tolist() == [2, 0]
    assert dataset.names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("trained_on", "table", "read_as"),
    [
        (("01", "02", "A7"), ("01", "02"), ("01", "02")),
        (("1.5", "2.0"), ("2.0",), ("2.0",)),
        (("1", "2"), ("01", "2.0", " +1"), ("1", "2", "1")),
        (("01", "1", "x"), ("01", "1"), ("01", "1")),
        (("1", "2", "x"), ("01", "x"), ("1", "x")),
    ],
)
def test_labels_are_known_as_written_or_as_numbers(
    tmp_path: Path, trained_on: tuple[str, ...], table: tuple[str, ...], read_as: tuple[str, ...]
) -> None:
    first = load(write(tmp_path, delimited([(f"text {i}", label) for i, label in enumerate(trained_on * 9)])))
    assert first.names == tuple(sorted(trained_on))
    second = write(tmp_path, delimited([("text", label) for label in table]), "second.csv")
    assert labels_of(load(second, known=[first.names], least_rows=1)) == list(read_as)


def test_a_number_as_parquet_has_it_is_the_label_of_a_csv(tmp_path: Path) -> None:
    frame = pl.DataFrame({"sentence": ["a", "b"], "label": [1.0, 0.0]})
    frame.write_parquet(tmp_path / "t.parquet")
    assert load(str(tmp_path / "t.parquet"), known=[("0", "1")], least_rows=1).labels.tolist() == [1, 0]


def test_a_label_not_trained_on_is_named_with_its_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, lines("a,1", "b,maybe", "c,0", "d,maybe")), known=[("0", "1")], least_rows=1)
    assert "the label 'maybe' (rows 3 and 5) is not one of those trained on: 0, 1" in str(caught.value)


# --- rows


def test_blank_rows_are_dropped_and_named(tmp_path: Path) -> None:
    rows = [*good(), ",1", "no label,", '"  ",0', "another,", "", "third,  "]
    dataset = load(write(tmp_path, lines(*rows)))
    assert len(dataset) == 20
    assert len(dataset.notices) == 2
    assert "dropped 3 rows with an empty text (rows 22, 24 and 26)" in dataset.notices[0]
    assert "dropped 3 rows with an empty label (rows 23, 25 and 27)" in dataset.notices[1]
    assert dataset.rows.tolist() == list(range(2, 22))


def test_many_blank_rows_are_counted(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, lines(*good(), *([",1"] * 1500))))
    assert (
        "dropped 1,500 rows with an empty text (rows 22, 23, 24, 25, 26, 27, 28, 29, … (1,500 in all))"
        in (dataset.notices[0])
    )


def test_one_blank_row_is_one(tmp_path: Path) -> None:
    assert "dropped 1 row with an empty text (row 22)." in load(write(tmp_path, lines(*good(), ",1"))).notices[0]


def test_nan_and_null_labels_are_blank(tmp_path: Path) -> None:
    values = [float("nan"), None, *(float(i % 2) for i in range(20))]
    frame = pl.DataFrame({"sentence": [f"text {i}" for i in range(22)], "label": values})
    frame.write_parquet(tmp_path / "t.parquet")
    dataset = load(str(tmp_path / "t.parquet"))
    assert dataset.names == ("0", "1")
    assert "dropped 2 rows with an empty label (rows 1 and 2)" in dataset.notices[0]


def test_duplicates_and_conflicts_are_counted(tmp_path: Path) -> None:
    rows = [*good(), "Same  Text,0", "same text,0", " same text ,1", "text 0,0"]
    dataset = load(write(tmp_path, lines(*rows)))
    assert len(dataset) == 24, "they are said, not dropped"
    assert dataset.notices[0].endswith("3 rows repeat an earlier row's text.")
    assert "1 text stands there with different labels (for example 'same text')" in dataset.notices[1]


@given(st.text(max_size=20))
def test_text_key_forgets_spaces_and_capitals(text: str) -> None:
    assert text_key(f"  {text.upper()} ") == text_key(text.upper())
    assert text_key(text_key(text)) == text_key(text)
    assert text_key("A  b\tC") == text_key("a b c")


def test_take_keeps_rows_together() -> None:
    part = made([0, 1, 0, 1]).take(np.array([3, 0]))
    assert (part.texts, part.labels.tolist(), part.rows.tolist()) == (["text 3", "text 0"], [1, 0], [5, 2])


# --- files that are no table


def latin1(row: int) -> bytes:
    rows = good()
    rows[row - 2] = "café,1"
    return lines(*rows).encode("latin-1")


FAULTY: dict[str, tuple[str, "str | bytes", list[str]]] = {
    "empty": ("t.csv", b"", ["the file is empty"]),
    "blank": ("t.csv", " \n\n", ["the file is empty"]),
    "empty gzip": ("t.csv.gz", gzip.compress(b""), ["the file is empty"]),
    "binary": ("t.csv", bytes(range(256)) * 20, ["is a binary file"]),
    "a late NUL": ("t.csv", lines(*good(), *["x" * 100 + ",1"] * 60, "a\0b,1"), ["NUL byte near row 8"]),
    "latin-1": ("t.csv", latin1(9), [f"byte {latin1(9).index(0xE9)} (0xe9, in row 9)", "latin-1", "iconv -f latin1"]),
    "UTF-16": ("t.csv", lines(*good()).encode("utf-16"), ["UTF-16", "Save it as UTF-8"]),
    "UTF-16 without a mark": ("t.csv", lines(*good()).encode("utf-16-be"), ["UTF-16", "Save it as UTF-8"]),
    "cut inside a character": ("t.csv", (lines(*good()) + "é").encode()[:-1], ["ends inside a character", "cut off"]),
    "header only": ("t.csv", "sentence,label\n", ["a header and no rows"]),
    "header only, no line end": ("t.csv", "sentence,label", ["a header and no rows"]),
    "no rows in json": ("t.json", "[]", ["columns are"]),
    "too many fields": ("t.csv", lines(*good(), "a, b,1"), ["row 22 has 3 fields where the header has 2", "quotes"]),
    "too few fields": ("t.csv", lines(*good(), "abc"), ["row 22 has 1 field where the header has 2", "Fill in"]),
    "both": ("t.tsv", lines("a\tb\tc", "d").replace(",", "\t"), ["row 2 has 3 fields", "row 3 has 1 field"]),
    "unclosed quote": ("t.csv", lines(*good(), '"abc,1', *good()), ["row 22 opens a quote that is never closed"]),
    "unclosed at the end": ("t.csv", lines(*good(), 'abc,"1'), ["row 22 opens a quote that is never closed"]),
    "old Mac line ends": ("t.csv", lines(*good()).replace("\n", "\r"), ["old Mac", "tr '\\r' '\\n'"]),
    "truncated gzip": ("t.csv.gz", gzip.compress(lines(*good(500)).encode())[:-40], ["not a whole gzip file"]),
    "not gzip": ("t.csv.gz", lines(*good()), ["not a whole gzip file"]),
    "corrupt parquet": ("t.parquet", b"PAR1" + b"\xff" * 400 + b"PAR1", ["not a whole .parquet table"]),
    "truncated parquet": ("t.parquet", parquet(ROWS)[:-20], ["not a whole .parquet table"]),
    "a CSV called parquet": ("t.parquet", lines(*good()), ["not a whole .parquet table"]),
    "truncated parquet.gz": ("t.parquet.gz", gzip.compress(parquet(ROWS))[:-9], ["not a whole gzip file"]),
    "broken JSON line": ("t.jsonl", json_lines(ROWS) + b'{"sentence": \n[1]\n', ["rows 25 and 26 are no records"]),
    "broken JSON": ("t.json", '[{"sentence": "a"},\n\n {"sen', ["not whole JSON (", "line 3"]),
    "JSON of numbers": ("t.json", "[1, 2]", ["rows 1 and 2 are no records"]),
    "nested JSON": ("t.json", '[{"sentence": ["a"], "label": 1}]', ["'sentence' holds lists or records"]),
    "one label": (
        "t.csv",
        lines(*(f"text {i},yes" for i in range(20))),
        ["every row has the label 'yes'", "two labels"],
    ),
    "all distinct": ("t.csv", lines(*(f"text {i},{i}" for i in range(30))), ["30 different values", "--label COLUMN"]),
    "nine rows": ("t.csv", lines(*good(9)), ["9 usable rows, and at least 10 are needed"]),
    "a spreadsheet": ("t.xlsx", b"PK\x03\x04", ["headstart reads .csv, .tsv, .jsonl", "Rename or convert"]),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_faulty_file_is_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    name, content, said = FAULTY[kind]
    source = write(tmp_path, content, name)
    with pytest.raises(DataError) as caught:
        load(source)
    for piece in said:
        assert piece in str(caught.value)
    for problem in caught.value.problems:
        assert problem.startswith(source), "the file is named"
        assert problem.endswith((".", ".csv")), "a whole sentence, or a command"
        assert len(problem) < 600


def test_ten_rows_are_enough(tmp_path: Path) -> None:
    assert len(load(write(tmp_path, lines(*good(10))))) == 10


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    frame = pl.DataFrame({"sentence": [b"\xff\xfe"] * 20, "label": [0, 1] * 10})
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'sentence' holds bytes that are no UTF-8 text"):
        load(str(tmp_path / "t.parquet"))
    frame.with_columns(sentence=pl.lit(b"plain")).write_parquet(tmp_path / "t.parquet")
    assert load(str(tmp_path / "t.parquet")).texts == ["plain"] * 20


def test_a_stray_quote_inside_a_field_is_text(tmp_path: Path) -> None:
    assert load(write(tmp_path, lines(*good(), 'the "best" one,0', *good()))).texts[20] == 'the "best" one'


def test_a_carriage_return_inside_a_field_is_text(tmp_path: Path) -> None:
    rows = [*good(), "one\rtwo,1", '"three\rfour",0']
    assert load(write(tmp_path, lines(*rows))).texts[-2:] == ["one\rtwo", "three\rfour"]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, lines(*rows, "abc")))
    assert len(caught.value.problems) == 1
    assert "row 24 has 1 field" in str(caught.value)


@pytest.mark.parametrize("at", [4095, 4096, 4097, 4096 + (1 << 20) - 1])
def test_the_bad_byte_is_found_past_characters_on_the_edge_of_a_block(tmp_path: Path, at: int) -> None:
    head = b"sentence,label\n"
    content = head + b"x" * (at - len(head)) + "é,1\n".encode()
    with pytest.raises(DataError, match="at least 10"):
        load(write(tmp_path, content))
    with pytest.raises(DataError, match=rf"byte {len(content) + 1} \(0xe9, in row 3\)"):
        load(write(tmp_path, content + b"y\xe9,1\n"))


def test_a_lone_quote_is_named(tmp_path: Path) -> None:
    rows = [*good(), 'a 5" screen,1', *good(), 'a 6" screen,1']
    with pytest.raises(DataError, match=r"rows 22 and 43 have a lone quote\. Put quotes around the text, and double"):
        load(write(tmp_path, lines(*rows)))


def test_no_such_file_suggests_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, lines(*good()), "reviews.csv")
    with pytest.raises(DataError, match=r"no such file\. Did you mean reviews\.csv\?"):
        load(str(tmp_path / "review.csv"))
    with pytest.raises(DataError, match=r"no such file\. Check the path\."):
        load(str(tmp_path / "elsewhere" / "zzz.csv"))


def test_a_folder_names_the_tables_in_it(tmp_path: Path) -> None:
    write(tmp_path, lines(*good()), "reviews.csv.gz")
    with pytest.raises(DataError, match=r"is a folder; give a file in it\. It holds reviews\.csv\.gz\."):
        load(str(tmp_path))


def test_a_name_too_long_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load(str(tmp_path / ("x" * 5000 + ".csv")))


def test_a_long_label_is_shortened_in_messages(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, lines(*good(), "odd," + "w" * 10_000)))
    with pytest.raises(DataError, match="too few rows") as caught:
        split(dataset, None, None, seed=1, duplicates="together")
    assert len(str(caught.value)) < 400


# --- splits


def article_split(labels: Sequence[int], seed: int) -> tuple[list[int], list[int], list[int]]:
    """The notebook's two calls, as everyone copies them."""
    from sklearn.model_selection import train_test_split

    rows = list(range(len(labels)))
    train_rows, temp_rows, _, temp_labels = train_test_split(
        rows, labels, random_state=seed, test_size=0.3, stratify=labels
    )
    val_rows, test_rows, _, _ = train_test_split(
        temp_rows, temp_labels, random_state=seed, test_size=0.5, stratify=temp_labels
    )
    return train_rows, val_rows, test_rows


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(8, 60), min_size=2, max_size=5), seed=st.integers(0, 2**32 - 1), copies=st.booleans()
)
def test_splits_are_the_articles_row_for_row(counts: list[int], seed: int, copies: bool) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(labels)
    dataset = made(labels, [f"text {i % 7 if copies else i}" for i in range(len(labels))])
    parts = split(dataset, None, None, seed=seed, duplicates="as they fall")
    expected = article_split(labels, seed)
    for part, rows in zip((parts.train, parts.validation, parts.test), expected, strict=True):
        assert (part.rows - 2).tolist() == rows
    assert parts.notices == ()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kinds=st.integers(150, 400), rows=st.integers(60, 200))
def test_by_default_copies_of_a_text_are_never_on_two_sides(seed: int, kinds: int, rows: int) -> None:
    rng = random.Random(seed)
    texts_ = [f"Text {rng.randrange(kinds)}" + " " * rng.randrange(3) for _ in range(rows)]
    dataset = made([i % 2 for i in range(rows)], texts_)
    parts = split(dataset, None, None, seed=seed, duplicates="together")
    keys = [{text_key(text) for text in part.texts} for part in (parts.train, parts.validation, parts.test)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    every = np.concatenate([parts.train.rows, parts.validation.rows, parts.test.rows])
    assert sorted(every.tolist()) == dataset.rows.tolist(), "no row is lost or doubled"


def test_without_copies_the_default_split_is_the_articles() -> None:
    dataset = made([i % 3 for i in range(100)])
    parts = split(dataset, None, None, seed=2021, duplicates="together")
    expected = article_split(dataset.labels.tolist(), 2021)
    assert [(part.rows - 2).tolist() for part in (parts.train, parts.validation, parts.test)] == list(expected)


def test_moved_copies_are_said() -> None:
    texts_ = [f"text {i % 150}" for i in range(200)]
    dataset = made([i % 2 for i in range(200)], texts_)
    parts = split(dataset, None, None, seed=0, duplicates="together")
    plain = split(dataset, None, None, seed=0, duplicates="as they fall")
    moved = len(parts.train) - len(plain.train) + sum(row in plain.test.rows for row in parts.validation.rows.tolist())
    assert moved > 0
    assert parts.notices[0] == f"{moved} rows moved so that copies of a text share one part."


def test_a_label_that_leaves_a_part_with_its_copies_is_said() -> None:
    texts_ = ["the same words" if i % 5 == 0 else f"text {i}" for i in range(100)]
    dataset = made([2 if i % 5 == 0 else i % 2 for i in range(100)], texts_)
    parts = split(dataset, None, None, seed=0, duplicates="together")
    assert "After that, no row in the test part has the label '2'." in parts.notices


def test_nothing_left_is_refused() -> None:
    dataset = made([i % 2 for i in range(40)], ["one and the same"] * 40)
    with pytest.raises(DataError, match="nothing is left for validation"):
        split(dataset, None, None, seed=0, duplicates="together")


def test_a_test_file_leaves_70_to_15() -> None:
    dataset, test = made([i % 2 for i in range(170)]), made([0, 1], ["one", "two"])
    parts = split(dataset, None, test, seed=1, duplicates="together")
    assert (len(parts.train), len(parts.validation)) == (140, 30)
    assert parts.test is test


def test_a_validation_file_leaves_70_to_15() -> None:
    dataset, validation = made([i % 2 for i in range(170)]), made([0, 1], ["one", "two"])
    parts = split(dataset, validation, None, seed=1, duplicates="together")
    assert (len(parts.train), len(parts.test)) == (140, 30)
    assert parts.validation is validation


def test_both_files_leave_the_table_whole() -> None:
    dataset, other = made([0, 1] * 10), made([0, 1], ["one", "two"])
    parts = split(dataset, other, other, seed=1, duplicates="together")
    assert parts.train.texts == dataset.texts
    assert parts.notices == ()


def test_texts_of_a_given_file_that_were_trained_on_are_said() -> None:
    dataset, test = made([0, 1] * 10), made([0, 1, 1], ["TEXT 3", "new", "text  4"])
    parts = split(dataset, made([0], ["text 5"]), test, seed=1, duplicates="together")
    assert "2 of the 3 test texts also stand in the training table" in parts.notices[1]
    assert "1 of the 1 validation texts also stands in the training table" in parts.notices[0]
    assert len(parts.test) == 3, "they are said, not dropped"


@pytest.mark.parametrize("rare", range(1, 5))
@pytest.mark.parametrize("files", ["none", "test"])
def test_a_class_is_in_every_part_or_named(rare: int, files: str) -> None:
    labels = [0] * 33 + [1] * 29 + [2] * rare
    dataset = made(labels, names=["no", "yes", "rare one"])
    test = made([0], ["other"], names=dataset.names) if files == "test" else None
    for seed in range(12):
        try:
            parts = split(dataset, None, test, seed=seed, duplicates="together")
        except DataError as error:
            message = str(error)
            assert re.search(rf"'rare one' has {rare} rows?\b", message), message
            assert "Merge it with another label, add rows, or give files with --validation and --test" in message
        else:
            for part in (parts.train, parts.validation) if test else (parts.train, parts.validation, parts.test):
                assert set(part.labels.tolist()) == {0, 1, 2}


def test_many_rare_classes_are_counted_not_listed() -> None:
    with pytest.raises(DataError, match="194 more labels are as rare"):
        split(made([i % 200 for i in range(400)]), None, None, seed=1, duplicates="together")


def test_200_labels_can_be_split() -> None:
    parts = split(made([i % 200 for i in range(2000)]), None, None, seed=1, duplicates="together")
    assert len(np.unique(parts.test.labels)) == 200


def test_the_shared_sets_split_as_in_the_notebook(shared_data: Path) -> None:
    dataset = load(str(shared_data / "sst2" / "all.csv"))
    parts = split(dataset, None, None, seed=2021, duplicates="as they fall")
    expected = article_split(dataset.labels.tolist(), 2021)
    sentence = dataset.texts
    assert parts.train.texts == [sentence[i] for i in expected[0]]
    assert parts.validation.texts == [sentence[i] for i in expected[1]]
    assert parts.test.texts == [sentence[i] for i in expected[2]]


def test_the_room_knows_no_model() -> None:
    assert "torch" not in vars(data)
    assert "transformers" not in vars(data)


# --- several labels a text, and ordered ones

TOPICS = [
    *(("the room was awful", "room|dirt"), ("the soup was awful", "food"), ("the waiter was rude", "staff")),
    *(("nothing to say", "|"), ("the soup in the room", " food | room |"), ("the story", "")),
    *(("dirt in the soup", "dirt|food"), ("room", "room"), ("rude, and dirt", "staff|dirt"), ("food", "food|food")),
    *(("the waiter", "staff"), ("the dirt", "dirt")),
]


def sets_of(dataset: Dataset) -> list[set[str]]:
    return [{dataset.names[i] for i in np.flatnonzero(row)} for row in dataset.labels]


def test_cells_with_a_bar_hold_several_labels(tmp_path: Path) -> None:
    found = load(str(write_csv(tmp_path / "t.csv", TOPICS)))
    assert found.problem == "multi"
    assert found.names == ("dirt", "food", "room", "staff")
    assert found.labels.shape == (11, 4)
    assert sets_of(found)[:5] == [{"room", "dirt"}, {"food"}, {"staff"}, set(), {"food", "room"}]
    assert found.counts.tolist() == [4, 4, 3, 3]
    assert found.written[:5] == ["dirt|room", "food", "staff", "", "food|room"]
    assert found.take(np.array([3, 0])).written == ["", "dirt|room"]
    assert any("(row 7)" in one and "empty label" in one for one in found.notices)
    assert any("--problem single" in one for one in found.notices)
    some = write_csv(tmp_path / "single.csv", [(f"text {i}", "ab|c"[: i % 2 * 3 + 1]) for i in range(12)])
    assert load(str(some), problem="single").names == ("a", "ab|c")
    assert load(str(some), problem="multi").names == ("a", "ab", "c")
    alone = load(str(some))
    assert (alone.problem, alone.names) == ("single", ("a", "ab|c")), "its parts come nowhere else"
    assert any("--problem multi" in one for one in alone.notices)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_a_column_of_lists_holds_several_labels(ending: str, tmp_path: Path) -> None:
    lists = [None if not cell else [one for one in cell.split("|") if one.strip()] for _, cell in TOPICS]
    frame = pl.DataFrame({"text": [text for text, _ in TOPICS], "labels": lists})
    path = tmp_path / f"t{ending}"
    write: Any = {".jsonl": frame.write_ndjson, ".json": frame.write_json, ".parquet": frame.write_parquet}[ending]
    write(path)
    found, expected = load(str(path)), load(str(write_csv(tmp_path / "t.csv", TOPICS)))
    assert (found.names, found.written) == (expected.names, expected.written)
    with pytest.raises(DataError, match="holds lists, and each text was to have one label"):
        load(str(path), problem="single")


def test_numbers_in_lists_are_named_as_numbers(tmp_path: Path) -> None:
    pl.DataFrame({"text": [f"t {i}" for i in range(12)], "label": [[i % 3, 10] for i in range(12)]}).write_parquet(
        path := tmp_path / "t.parquet"
    )
    assert load(str(path)).names == ("0", "1", "2", "10")


def test_a_part_of_several_labels_has_them_all(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [
        (
            f"text {i}",
            "|".join(n for n, p in zip("abcd", (0.7, 0.3, 0.1, 0.06), strict=True) if random.random() < p) or "|",
        )
        for i in range(400)
    ]
    whole = load(str(write_csv(tmp_path / "t.csv", rows)))
    parts = split(whole, None, None, seed=1, duplicates="together")[:3]
    shares = np.array([part.counts / len(part) for part in parts])
    assert [len(part) for part in parts] == [280, 60, 60]
    assert np.abs(shares[1:] / shares[0] - 1).max() < 0.6, "rare labels are spread evenly"
    assert (np.abs(shares - whole.counts / 400) < 0.06).all()
    rare = [*rows[:60], ("text x", "rare")]
    with pytest.raises(DataError, match="the label 'rare' has 1 row"):
        split(load(str(write_csv(tmp_path / "r.csv", rare))), None, None, seed=1, duplicates="together")


def test_stars_are_ordered_and_other_numbers_only_if_asked_for(tmp_path: Path) -> None:
    stars = write_csv(tmp_path / "stars.csv", [(f"text {i}", str(i % 5 + 1)) for i in range(20)])
    four = write_csv(tmp_path / "four.csv", [(f"text {i}", str(i % 4)) for i in range(20)])
    words = write_csv(tmp_path / "words.csv", [(f"text {i}", "ab"[i % 2]) for i in range(20)])
    assert load(str(stars)).problem == "ordered"
    assert load(str(stars), problem="single").problem == "single"
    assert load(str(four)).problem == "single"
    assert load(str(four), problem="ordered").problem == "ordered"
    with pytest.raises(DataError, match="--problem ordered takes whole numbers as labels"):
        load(str(words), problem="ordered")


def test_weights_go_with_their_texts() -> None:
    whole = dataclasses.replace(made([0, 1, 0]), weights=np.array([1, 2, 3], np.float32))
    assert whole.take(np.array([2, 0])).weights.tolist() == [3, 1]  # type: ignore[union-attr]
