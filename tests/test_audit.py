"""A table's problems are found row by row, wrong labels first; the file can be mended and fed back."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from headstart import config
from headstart.audit import ADDED, WRONG, Audit, audit
from headstart.data import load
from headstart.errors import DataError, InputError
from tests.conftest import SMALL_ROWS, write_csv

Rows = list[tuple[str, str]]


@pytest.fixture
def audited(tiny_bert: Path, tmp_path: Path) -> Callable[..., Audit]:
    def run(rows: Rows, out: str = "found.csv", **settings: Any) -> Audit:
        table = write_csv(tmp_path / "table.csv", rows, "sentence", "label")
        given = {
            "model": str(tiny_bert),
            "thaw": "0",
            "precision": "fp32",
            "head_width": 0,
            "head_features": ("mean-0",),
        }
        return audit(config.settings(str(table), **{**given, **settings}), tmp_path / out)

    return run


def issues(found: Audit) -> dict[int, str]:
    """Issues by row, as a spreadsheet counts, but for wrong labels, which depend on what is learnt."""
    pairs = found.table.sort("row").select("row", "issue").iter_rows()
    kept = ((row, [one for one in (issue or "").split("; ") if one and one != WRONG]) for row, issue in pairs)
    return {row: "; ".join(some) for row, some in kept if some}


def test_a_clean_table_has_no_problem_but_what_is_learnt(audited: Callable[..., Audit]) -> None:
    found = audited(list(SMALL_ROWS))
    assert issues(found) == {}
    assert found.labels == {"0": 40, "1": 40}
    assert found.table.columns == ["sentence", "label", *ADDED]
    assert sorted(found.table["row"].to_list()) == list(range(2, 82))


def test_each_problem_is_named_with_its_row(audited: Callable[..., Audit], tmp_path: Path) -> None:
    rows = list(SMALL_ROWS)
    rows[0] = ("  ", "1")
    rows[5] = ("a film", "")
    rows[7] = (f"  {rows[8][0].upper()} ", rows[8][1])
    rows[20] = (rows[21][0], rows[20][1])
    rows[30] = ("!!! ???", rows[30][1])
    rows[40] = ("very " * 60 + "lovely", rows[40][1])
    rows[50] = ("Das Hotel war wirklich sehr schön und das Frühstück war lecker", rows[50][1])
    other = write_csv(tmp_path / "test.csv", [("a text", "1"), (rows[60][0], "0")], "sentence", "label")
    got = issues(audited(rows, test=str(other)))
    assert got[2] == got[7] == "blank text or label"
    assert got[10] == "repeats another row: row 9"
    assert got[22] == "same text with another label: row 23"
    assert got[23] == "same text with another label: row 22"
    assert got[32] == "no word in it"
    assert got[42].startswith("much longer than the others: 61 words, usual are 4")
    assert got[52].endswith("probably another language: de, most are en")
    assert got[62] == f"stands in another file, too: {other}, row 3"
    assert set(got) == {2, 7, 10, 22, 23, 32, 42, 52, 62}


def test_near_copies_are_those_of_nearly_the_same_words(audited: Callable[..., Audit]) -> None:
    rows = list(SMALL_ROWS)
    rows[3] = (f"{rows[2][0]} .", rows[2][1])
    got = issues(audited(rows))
    assert got == {5: "nearly repeats another row: row 4"}


@pytest.mark.parametrize(
    ("label", "meant"),
    [("Good", "good"), ("go_od", "good"), ("GOOD!", "good"), ("goood", "good"), ("fine", None), ("bod", None)],
)
def test_spellings_of_a_label(label: str, meant: str | None, audited: Callable[..., Audit]) -> None:
    names = {"1": "good", "0": "awful"}
    rows = [(text, names[name]) for text, name in SMALL_ROWS]
    rows[10] = (rows[10][0], label)
    row = audited(rows).table.filter(pl.col("row") == 12).to_dicts()[0]
    if meant is None:
        assert row["issue"] == "label too rare to be learnt: 1 of it"
        assert (row["suggested_label"], row["score"]) == (None, None)
    else:
        assert row["issue"].startswith(f"label spelt otherwise: meant is probably {meant}")
        assert row["suggested_label"] == meant


def test_labels_that_were_turned_round_come_first(audited: Callable[..., Audit]) -> None:
    rows = list(SMALL_ROWS)
    turned = np.random.default_rng(0).choice(len(rows), 6, replace=False).tolist()
    for i in turned:
        rows[i] = (rows[i][0], "1" if rows[i][1] == "0" else "0")
    found = audited(rows)
    first = found.table.head(10)
    assert len({row - 2 for row in first["row"].to_list()} & set(turned)) >= 4
    assert found.table["score"].to_list() == sorted(found.table["score"].to_list())
    for row in found.table.filter(pl.col("issue").str.contains(WRONG)).iter_rows(named=True):
        assert row["suggested_label"] != row["label"]


def test_the_file_is_the_table_mendable_and_readable_again(
    audited: Callable[..., Audit], tiny_bert: Path, tmp_path: Path
) -> None:
    rows = list(SMALL_ROWS)
    rows[0] = ("=cmd|' /C calc'!A0 was superb", "1")
    rows[1] = ("-2+3 the film was awful", "0")
    rows[2] = ("- it was, at the end, superb", "1")
    found = audited(rows)
    with open(tmp_path / "found.csv", encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [int(row["row"]) for row in written] == found.table["row"].to_list()
    by_row = {int(row["row"]): row for row in written}
    assert by_row[2]["sentence"] == "'=cmd|' /C calc'!A0 was superb"
    assert by_row[3]["sentence"].startswith("'-2+3")
    again = load(str(tmp_path / "found.csv"))
    assert sorted(zip(again.texts, (again.names[i] for i in again.labels), strict=True)) == sorted(rows)
    settings = config.settings(str(tmp_path / "found.csv"), model=str(tiny_bert), thaw="0", head_features=("cls",))
    assert audit(settings, tmp_path / "2.csv").table.columns == found.table.columns, "an earlier audit's make way"


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".tsv"])
def test_the_ending_decides_the_format(ending: str, audited: Callable[..., Audit], tmp_path: Path) -> None:
    found = audited(list(SMALL_ROWS), out=f"found{ending}")
    assert load(str(tmp_path / f"found{ending}")).texts == found.table["sentence"].to_list()


def test_copies_are_never_in_the_fold_they_are_judged_by(audited: Callable[..., Audit]) -> None:
    rows = [(f"{text} {filler}", label) for text, label in SMALL_ROWS[:40] for filler in ("", "")]
    rows = [(text.strip(), "1" if i % 2 else "0") for i, (text, _) in enumerate(rows)]  # each text with both labels
    scores = audited(rows).table.filter(pl.col("score").is_not_null())["score"].to_numpy()
    assert np.abs(scores - 0.5).max() < 0.45, "nothing can be learnt, so nothing is sure"


def test_a_column_of_the_person_is_not_overwritten(tiny_bert: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [(*row, "5") for row in SMALL_ROWS], "sentence", "label", "score")
    with pytest.raises(DataError, match="has a column 'score'"):
        audit(config.settings(str(table), model=str(tiny_bert), thaw="0"), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("library", ["cleanlab", "py3langid"])
def test_without_a_library_it_says_what_to_install(
    library: str, audited: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(InputError, match=r"pip install 'headstart\[audit\]'"):
        audited(list(SMALL_ROWS))
    assert not (tmp_path / "found.csv").exists()
