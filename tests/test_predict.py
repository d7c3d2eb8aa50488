"""From a run folder to labels: lists, streams and files of every format, whole or not at all, in flat memory."""

import csv
import gzip
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

import headstart
from headstart import encoder, predict, tables
from headstart.encoder import Placement
from headstart.errors import DataError, DiskError
from headstart.predict import (
    Predictor,
    answer_columns,
    decide,
    label_lines,
    predict_file,
    probabilities_of,
    write_frames,
)

TEXTS = [
    "the film was superb",
    'the "soup", they said,\nwas awful; très mauvais 😒',
    "the film was superb",
    "zebra",
    "the waiter was rude and the room was broken at the end of the story and the soup was awful too",
]
ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz")
ADDED = ["prediction", "confidence", "p_0", "p_1"]


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return predict.load(tiny_run, device="cpu", precision="fp32")


def alone(predictor: Predictor, text: str) -> NDArray[np.float64]:
    """The probabilities of one text, scored by itself."""
    row: NDArray[np.float64] = predictor.predict_proba([text])[0]
    return row


# --- lists


def test_probabilities_are_softmax_and_sum_to_one() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    got = probabilities_of(logits)
    np.testing.assert_allclose(got[0], np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum(), rtol=1e-12)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-12)
    assert got[1].tolist() == [1, 0, 0]
    assert got.dtype == np.float64


def test_of_several_labels_each_has_its_own_probability_and_threshold() -> None:
    logits = np.array([[0.0, 3.0], [-800.0, 800.0]])
    got = probabilities_of(logits, "multi")
    np.testing.assert_allclose(got, [[0.5, 1 / (1 + np.exp(-3))], [0, 1]])
    said = decide(got, (0.5, 0.99))
    assert said.labels.tolist() == [[1, 0], [0, 1]]
    assert said.confidence.tolist() == pytest.approx([0.5 * (1 - got[0, 1]), 1.0])
    columns = answer_columns(got, ("a", "b"), (0.6, 0.99))
    assert columns["prediction"].to_list() == ["", "b"]
    assert columns["p_b"].to_list() == got[:, 1].tolist()


def test_many_texts_are_scored_in_the_fastest_precision_and_few_exactly(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    real = encoder.choose_placement

    def noting(device: str, precision: str) -> Placement:
        asked.append((device, precision))
        return real("cpu", "fp32")

    monkeypatch.setattr(encoder, "choose_placement", noting)
    for texts in (0, predict.EXACT_ROWS, predict.EXACT_ROWS + 1):
        predict.load(tiny_run, texts=texts)
    predict.load(tiny_run, precision="bf16")
    assert [precision for _, precision in asked] == ["fp32", "fp32", "auto", "bf16"]


def test_the_order_of_texts_and_their_neighbours_do_not_matter(predictor: Predictor) -> None:
    got = predictor.predict_proba(TEXTS)
    assert got.shape == (5, 2)
    for row, text in zip(got, TEXTS, strict=True):
        np.testing.assert_allclose(row, alone(predictor, text), atol=1e-4)
    np.testing.assert_allclose(predictor.predict_proba(TEXTS[::-1])[::-1], got, atol=1e-4)
    assert len(np.unique(got.round(6), axis=0)) == 4
    assert predictor.predict(TEXTS) == [predictor.names[i] for i in got.argmax(axis=1)]
    assert predictor.names == ("0", "1")


def test_no_texts_give_no_rows(predictor: Predictor) -> None:
    assert predictor.predict([]) == []
    assert predictor.predict_proba([]).shape == (0, 2)


def test_the_package_loads_a_predictor(tiny_run: Path, predictor: Predictor) -> None:
    assert headstart.load(tiny_run).predict(TEXTS) == predictor.predict(TEXTS)
    assert headstart.load(str(tiny_run)).names == ("0", "1")


def test_a_text_that_occurs_twice_is_scored_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    real = type(predictor.classifier).logits

    def counting(self: object, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        scored.append(len(ids))
        found: NDArray[np.float32] = real(predictor.classifier, ids, mask)
        return found

    monkeypatch.setattr(type(predictor.classifier), "logits", counting)
    forgetful = Predictor(predictor.classifier)
    got = forgetful.predict_proba([TEXTS[0], TEXTS[3], TEXTS[0]] * 40)
    assert sum(scored) == 2
    np.testing.assert_array_equal(forgetful.predict_proba([TEXTS[3], TEXTS[0]])[::-1], got[:2])
    assert sum(scored) == 2, "nor is one from the call before"
    assert (got[0::3] == got[2::3]).all()
    assert not (got[0] == got[1]).any()


def test_texts_that_are_cut_are_told(predictor: Predictor) -> None:
    scores = predictor.score(TEXTS)
    assert predictor.classifier.max_length == 16
    lengths = predictor.classifier.tokenizer(TEXTS).lengths
    assert scores.cut.tolist() == (lengths > 16).tolist()
    assert 0 < scores.cut.sum() < 5
    beginning = "the waiter was rude and the room was broken at the end of the"  # 14 words and two special tokens
    np.testing.assert_allclose(scores.probabilities[4], alone(predictor, f"{beginning} whatever follows"), atol=1e-6)


# --- lines


def test_lines_are_labelled_in_order_and_blank_ones_passed_over(predictor: Predictor) -> None:
    lines = ["the film was superb\n", "\n", "   \t\n", "zebra\n", " the soup was awful \n"]
    for at_once in (1, 2, 100):
        answers = list(label_lines(predictor, lines, at_once))
        assert [answer.text for answer in answers] == ["the film was superb", "zebra", "the soup was awful"]
        for answer in answers:
            row = alone(predictor, answer.text)
            assert answer.label == predictor.names[row.argmax()]
            assert answer.confidence == pytest.approx(row.max(), abs=1e-4)
            assert not answer.cut


def test_an_endless_stream_is_answered_as_it_comes(predictor: Predictor) -> None:
    read = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield f"the film was {number}"

    answers = list(itertools.islice(label_lines(predictor, endless()), 3))
    assert len(answers) == 3
    assert len(read) == 3, "a person's line is answered before the next is asked for"


# --- files


def table(rows: int = 12) -> pl.DataFrame:
    """Rows with an id, a text (some blank, some again), and a note that is hard on delimiters."""
    texts: list[str | None] = [*TEXTS, None, "   "]
    return pl.DataFrame(
        {
            "id": [str(i) for i in range(rows)],
            "sentence": [texts[i % len(texts)] for i in range(rows)],
            "note": [f'a "quoted", tab\t and\nline {i} é' for i in range(rows)],
        }
    )


def write_table(frame: pl.DataFrame, path: Path) -> Path:
    with gzip.open(path, "wb") if path.name.endswith(".gz") else open(path, "wb") as file:
        write_frames(file, tables.file_format(str(path)), iter([frame]), frame.clear())
    return path


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("given", ENDINGS)
def test_any_format_in_and_any_out(given: str, to: str, predictor: Predictor, tmp_path: Path) -> None:
    source = write_table(table(), tmp_path / f"in{given}")
    target = tmp_path / "deep" / f"out{to}"
    summary = predict_file(predictor, str(source), str(target))
    assert (summary.rows, summary.blank, summary.cut) == (12, 2, 4)
    got = tables.scan(str(target)).collect()
    assert got.columns == ["id", "sentence", "note", *ADDED]
    assert got["id"].cast(pl.String).to_list() == table()["id"].to_list()
    assert got["note"].to_list() == table()["note"].to_list()
    for before, row in zip(table()["sentence"], got.iter_rows(named=True), strict=True):
        if before is None or not before.strip():
            assert (row["sentence"] or "").strip() == ""
            assert all(row[name] is None for name in ADDED), row
        else:
            assert row["sentence"] == before
            expected = alone(predictor, before)
            assert [float(row["p_0"]), float(row["p_1"])] == pytest.approx(expected.tolist(), abs=1e-4)
            assert float(row["confidence"]) == max(float(row["p_0"]), float(row["p_1"]))
            assert row["prediction"] == predictor.names[expected.argmax()]
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    if to.endswith(".gz"):
        assert target.read_bytes()[:2] == b"\x1f\x8b"


def test_types_that_the_format_keeps_stay(predictor: Predictor, tmp_path: Path) -> None:
    frame = pl.DataFrame({"stars": [5, None, 1], "sentence": TEXTS[:3], "tags": [["a"], [], ["b", "c"]]})
    frame.write_parquet(tmp_path / "in.parquet")
    predict_file(predictor, str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"))
    got = pl.read_parquet(tmp_path / "out.parquet")
    assert got.select(frame.columns).equals(frame)
    assert got.schema["stars"] == pl.Int64
    assert [got.schema[name] for name in ADDED] == [pl.String, *[pl.Float64] * 3]
    with pytest.raises(DataError, match=r"the column 'tags' holds lists or records; write \.jsonl or \.parquet"):
        predict_file(predictor, str(tmp_path / "in.parquet"), str(tmp_path / "out.csv"))


def test_many_chunks_keep_their_order(predictor: Predictor, tmp_path: Path) -> None:
    rows = 2 * predict.CHUNK_ROWS + 77
    source = write_table(table(rows), tmp_path / "in.jsonl")
    for name in ("out.csv", "out.json", "out.parquet"):
        summary = predict_file(predictor, str(source), str(tmp_path / name))
        assert summary.rows == rows
        got = tables.scan(str(tmp_path / name)).collect()
        assert got["id"].cast(pl.String).to_list() == table(rows)["id"].to_list()
        assert got["prediction"].to_list() == (got["prediction"].to_list()[:7] * rows)[:rows]


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_a_table_without_rows_gives_one_without_rows(ending: str, predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,sentence\n")
    summary = predict_file(predictor, str(tmp_path / "in.csv"), str(tmp_path / f"out{ending}"))
    assert (summary.rows, summary.blank, summary.cut) == (0, 0, 0)
    content = (tmp_path / f"out{ending}").read_bytes()
    if ending == ".csv":
        assert content == b"id,sentence,prediction,confidence,p_0,p_1\n"
    elif ending == ".parquet":
        assert pl.read_parquet(tmp_path / "out.parquet").columns == ["id", "sentence", *ADDED]
    else:
        assert content == (b"[]" if ending == ".json" else b"")


def test_the_text_column_is_the_one_asked_for_or_trained_on_or_found(predictor: Predictor, tmp_path: Path) -> None:
    def label_of(columns: dict[str, list[str]], text: str | None = None) -> list[str]:
        pl.DataFrame(columns).write_csv(tmp_path / "in.csv")
        predict_file(predictor, str(tmp_path / "in.csv"), str(tmp_path / "out.csv"), text)
        return pl.read_csv(tmp_path / "out.csv", infer_schema=False)["p_1"].to_list()

    first, second = TEXTS[:1], TEXTS[3:4]
    expected = label_of({"sentence": first})
    assert label_of({"review": first}) == expected
    assert label_of({"review": second, "sentence": first}) == expected
    assert label_of({"sentence": second, "words": first}, "words") == expected
    assert label_of({"sentence": second, "words": first}) != expected
    with pytest.raises(DataError, match=r"has no column 'wrods'.*Did you mean 'words'"):
        label_of({"words": first}, "wrods")


def test_a_column_named_as_one_of_ours_gives_way(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prediction,sentence\nold,the film was superb\n")
    predict_file(predictor, str(tmp_path / "in.csv"), str(tmp_path / "out.csv"))
    got = pl.read_csv(tmp_path / "out.csv", infer_schema=False)
    assert sorted(got.columns) == sorted(["sentence", *ADDED])
    assert got["prediction"].to_list() == predictor.predict([TEXTS[0]])


def test_to_stdout_it_is_csv(predictor: Predictor, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    source = write_table(table(), tmp_path / "in.jsonl")
    predict_file(predictor, str(source), "-")
    out = capfdbinary.readouterr().out.decode()
    predict_file(predictor, str(source), str(tmp_path / "out.csv"))
    assert out == (tmp_path / "out.csv").read_text()
    assert len(list(csv.reader(out.splitlines(keepends=True)))) == 13


# --- whole or not at all


def test_a_file_that_breaks_midway_leaves_no_output(predictor: Predictor, tmp_path: Path) -> None:
    rows = "".join(f'{{"sentence": "the film was {i}"}}\n' for i in range(predict.CHUNK_ROWS + 100))
    (tmp_path / "in.jsonl").write_text(rows + '{"sentence": "the\n')
    (tmp_path / "out.csv").write_text("what was there\n")
    with pytest.raises(DataError):
        predict_file(predictor, str(tmp_path / "in.jsonl"), str(tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_text() == "what was there\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.csv"]


def test_an_output_that_cannot_be_written(predictor: Predictor, tmp_path: Path) -> None:
    source = write_table(table(), tmp_path / "in.csv")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="a part of the path is missing or is no folder"):
        predict_file(predictor, str(source), str(tmp_path / "file" / "out.csv"))
    with pytest.raises(DataError, match="is the input; choose another --output"):
        predict_file(predictor, str(source), str(source))
    with pytest.raises(DataError, match="headstart reads"):
        predict_file(predictor, str(source), str(tmp_path / "out.xlsx"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        predict_file(predictor, str(source), str(tmp_path / "folder.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv", "in.csv"]


# --- memory

MEASURED = """
import resource, sys
from headstart import predict
summary = predict.predict_file(predict.load(sys.argv[1], device="cpu", precision="fp32"), sys.argv[2], sys.argv[3])
print(summary.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(run: Path, source: Path, target: Path) -> tuple[int, int]:
    """Rows written, and the most memory that a process of its own took for it."""
    command = [sys.executable, "-c", MEASURED, str(run), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, memory = done.stdout.split()
    return int(rows), int(memory)


def rows_of(count: int) -> Iterator[tuple[str, str]]:
    """Rows of 600 bytes: 200,000 of them held in memory would add a third to what the process takes anyway."""
    for i in range(count):
        yield f"the film was {i % 997}", f"{i} " * 100


def test_memory_does_not_grow_with_the_file(tiny_run: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (20_000, 200_000):
        with open(tmp_path / "in.csv", "w", newline="") as file:
            csv.writer(file).writerows(itertools.chain([("sentence", "note")], rows_of(count)))
        rows, memory = peak_memory(tiny_run, tmp_path / "in.csv", tmp_path / "out.csv")
        assert rows == count
        peaks.append(memory)
    assert peaks[1] < 1.2 * peaks[0], f"{peaks} kB"


def test_the_environment_is_left_as_it_was(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLARS_CSV_CHUNK_SIZE", "77777")
    before = dict(os.environ)
    predict_file(predictor, str(write_table(table(), tmp_path / "in.csv")), str(tmp_path / "out.csv"))
    assert dict(os.environ) == before
