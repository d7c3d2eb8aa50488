"""Many tables into a folder: every row once, whatever is wrong with it and whoever is killed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from headstart import bulk, parts, predict
from headstart.bulk import Job, score_each, score_tables
from headstart.cli import main
from headstart.errors import DataError, HeadstartError, InputError, RunError
from headstart.parts import parts_of
from headstart.predict import Predictor
from tests.conftest import SMALL_ROWS

MISSING = "cuda" if sys.platform == "darwin" else "mps"

TEXTS = [text for text, _ in SMALL_ROWS]


def quiet(_: str) -> None:
    """Nobody is told."""


def label(run: Path, source: object, out: Path, **given: Any) -> dict[str, Any]:
    return score_tables(Job(str(run), str(out), **{"precision": "fp32", "device": "cpu", **given}), str(source), quiet)


def answers(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(out.glob("part-*.parquet"))], how="diagonal_relaxed")


def set_aside(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "_bad").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of three tables: 200 rows with ids, two files of parquet and one of JSON lines."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows = pl.DataFrame({"id": range(200), "sentence": [TEXTS[i % 80] for i in range(200)]})
    rows[:90].write_parquet(folder / "a.parquet")
    rows[90:130].write_parquet(folder / "b.parquet")
    rows[130:].write_ndjson(folder / "c.jsonl")
    return folder


def test_rows_come_out_once_in_order_with_their_columns_and_the_labels_of_one_table(
    tiny_run: Path, many: Path, tmp_path: Path
) -> None:
    summary = label(tiny_run, many, tmp_path / "out")
    found = answers(tmp_path / "out")
    assert found["id"].to_list() == list(range(200))
    assert found.columns == ["id", "sentence", "prediction", "confidence", "p_0", "p_1"]
    one = predict.load(tiny_run, device="cpu", precision="fp32")
    np.testing.assert_allclose(found["p_1"].to_numpy(), one.predict_proba(found["sentence"].to_list())[:, 1], atol=1e-6)
    assert found["prediction"].to_list() == one.predict(found["sentence"].to_list())
    assert (summary["rows"], summary["scored"], summary["set_aside"], summary["parts"]) == (200, 200, 0, 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_plan.json",
        "_summary.json",
        "part-00000.parquet",
    ]


def test_what_the_command_says(tiny_run: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    main_ends(0, "predict", str(tiny_run), "--input", str(many / "*.parquet"), "--output", out)
    said = capsys.readouterr()
    assert said.out.startswith(f"130 of 130 rows labelled in {out} (1 file).\nRate ")
    assert "0 rows (0.0%) were begun more than once" in said.out
    main_ends(0, "predict", str(tiny_run), "--input", str(many / "*.parquet"), "--output", out)
    assert "is finished" in capsys.readouterr().err
    main_ends(2, "predict", str(tiny_run), "--input", str(many / "*.parquet"))
    assert "--output DIR" in capsys.readouterr().err
    main_ends(2, "predict", str(tiny_run), "--input", str(many / "*.tsv"), "--output", out)
    assert "no table of that name or pattern" in capsys.readouterr().err
    main_ends(2, "predict", str(tiny_run), "--input", str(many / "a.parquet"), "--output", str(tmp_path / "o.xlsx"))
    assert "headstart reads" in capsys.readouterr().err


def main_ends(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert (ended.value.code or 0) == code


def test_rows_without_a_text_are_set_aside_with_where_they_are(tiny_run: Path, tmp_path: Path) -> None:
    texts = ["the film was superb", None, " ", "the soup was awful"]
    pl.DataFrame({"id": range(4), "sentence": texts}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"id": range(4, 8), "sentence": texts}).write_csv(tmp_path / "b.csv")
    summary = label(tiny_run, tmp_path / "[ab].*", tmp_path / "out")
    assert (summary["rows"], summary["scored"], summary["set_aside"]) == (8, 4, 4)
    assert sorted(map(int, answers(tmp_path / "out")["id"])) == [0, 3, 4, 7]
    found = set_aside(tmp_path / "out")
    assert [(Path(one["source"]).name, one["row"]) for one in found] == [
        ("a.parquet", 2),
        ("a.parquet", 3),
        ("b.csv", 3),
        ("b.csv", 4),
    ]
    assert {one["reason"] for one in found} == {"its text is empty"}
    assert found[0]["record"] == {"id": 1, "sentence": None}


def test_damaged_rows_are_set_aside_and_the_others_scored(tiny_run: Path, tmp_path: Path) -> None:
    lines = [b"id;sentence", b"0;the film was superb", b"1;the soup;was awful", b"2;caf\xe9", b"", b"4;"]
    (tmp_path / "a.csv").write_bytes(b"\n".join([*lines, b"5;the room was lovely", b'6;"open']))
    records = [b'{"id": 10, "sentence": "the app was rude"}', b'{"id": 11, "sent', b"[12]"]
    records += [b'{"id": 13, "sentence": ""}', b'{"id": 14, "sentence": "great"}']
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(records))
    label(tiny_run, tmp_path / "[ab].*", tmp_path / "out")
    assert sorted(map(int, answers(tmp_path / "out")["id"])) == [0, 5, 10, 14]
    found = {(Path(one["source"]).name, one["row"]): one["reason"] for one in set_aside(tmp_path / "out")}
    assert found == {
        ("a.csv", 3): "it has 3 fields where the header has 2",
        ("a.csv", 4): "it is not UTF-8",
        ("a.csv", 6): "its text is empty",
        ("a.csv", 8): "it has a quote without a partner",
        ("b.jsonl", 2): found["b.jsonl", 2],
        ("b.jsonl", 3): "it is no record",
        ("b.jsonl", 4): "its text is empty",
    }
    assert found["b.jsonl", 2].startswith("it is not JSON (")


def test_a_good_row_beside_a_damaged_one_keeps_its_text(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,sentence\n0,"first\rsecond"\n1,a,b\n2,ab\rcd\n')
    label(tiny_run, tmp_path / "a.csv", tmp_path / "out")
    assert answers(tmp_path / "out")["sentence"].to_list() == ["first\rsecond", "ab\rcd"]


def test_a_table_that_cannot_be_read_stops_nothing_unless_it_is_the_only_one(
    tiny_run: Path, many: Path, tmp_path: Path
) -> None:
    whole = (many / "a.parquet").read_bytes()
    (many / "b.parquet").write_bytes(whole[: len(whole) // 2])
    summary = label(tiny_run, many, tmp_path / "out")
    assert (summary["scored"], summary["unreadable"]) == (160, 1)
    assert [(Path(one["source"]).name, one["row"]) for one in set_aside(tmp_path / "out")] == [("b.parquet", None)]
    with pytest.raises(DataError, match=r"b\.parquet: is not a whole \.parquet table"):
        label(tiny_run, many / "b.parquet", tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.*"))


def test_a_table_without_a_text_column_stops_all_before_it_begins(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    pl.DataFrame({"id": [1], "words": ["so"]}).write_csv(many / "d.csv")
    with pytest.raises(InputError, match=r"d\.csv: has no text column"):
        label(tiny_run, many, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_what_is_done_stays_and_the_rest_is_done(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: Path
) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 32)
    out = tmp_path / "out"
    label(tiny_run, many, out)
    before = answers(out)
    (out / "part-00003.parquet").unlink()
    (out / "_summary.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    told: list[str] = []
    job = Job(str(tiny_run), str(out), precision="fp32", device="cpu")
    summary = score_tables(job, str(many), told.append)
    assert told == ["Resumed   6 of 7 parts were there."]
    assert summary["now"]["rows"] == 32
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-*") if path.name in kept} == kept
    assert answers(out).equals(before)


def test_a_folder_with_something_else_is_refused(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    label(tiny_run, many / "a.parquet", tmp_path / "out")
    with pytest.raises(RunError, match="another classifier, other tables or settings"):
        label(tiny_run, many, tmp_path / "out")
    (many / "a.parquet").write_bytes((many / "a.parquet").read_bytes())  # another of the same name and size
    with pytest.raises(RunError, match="another classifier, other tables or settings"):
        label(tiny_run, many / "a.parquet", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunError, match="something else"):
        label(tiny_run, many, tmp_path / "other")


@pytest.mark.parametrize(
    "kind", ["cut gzip", "no gzip", "utf-16", "latin header", "empty", "old mac", "lone CR", "NaN"]
)
def test_whatever_is_wrong_with_one_table_the_others_are_scored(
    tiny_run: Path, many: Path, tmp_path: Path, kind: str
) -> None:
    rows = b"id,sentence\n300,great\n301,awful\n"
    content = {
        "cut gzip": gzip.compress(rows * 500)[:-20],
        "no gzip": rows,
        "utf-16": rows.decode().encode("utf-16"),
        "latin header": b"id,sentence,caf\xe9\n300,great,1\n",
        "empty": b"",
        "old mac": rows.replace(b"\n", b"\r"),
        "lone CR": b"id,sentence\n300,gr\reat\n301,so,so\n",
        "NaN": b'{"id": 300, "sentence": NaN}\n{"id": 301, "sentence": "great"}\n',
    }[kind]
    ending = "csv.gz" if "gzip" in kind else "jsonl" if kind == "NaN" else "csv"
    (many / f"d.{ending}").write_bytes(content)
    scored = {"lone CR": {300}, "NaN": {301}}
    said = {
        "cut gzip": "not a whole gzip file",
        "no gzip": "not a whole gzip file",
        "utf-16": "is UTF-16",
        "latin header": "byte 15 (0xe9, in row 1) is not UTF-8",
        "empty": "the file is empty",
        "old mac": "lines end as on an old Mac",
        "lone CR": "it has 3 fields where the header has 2",
        "NaN": "it is not JSON (it has no NaN)",
    }
    label(tiny_run, many, tmp_path / "out")
    assert {int(i) for i in answers(tmp_path / "out")["id"]} >= set(range(200))
    assert {int(i) for i in answers(tmp_path / "out")["id"] if int(i) >= 300} == scored.get(kind, set())
    found = [(one["row"], str(one["reason"])) for one in set_aside(tmp_path / "out")]
    assert [row for row, _ in found] == ([3] if kind == "lone CR" else [1] if kind == "NaN" else [None])
    assert said[kind] in found[0][1]
    assert not (tmp_path / "out" / "_mended").exists()
    assert all("_mended" not in str(one["reason"]) for one in set_aside(tmp_path / "out"))


def test_a_table_whose_header_is_damaged_is_set_aside_whole(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    (many / "d.csv").write_text('id,sentence,5" screen\n300,great,x\n301,so,x,y\n')
    summary = label(tiny_run, many, tmp_path / "out")
    assert (summary["scored"], summary["unreadable"]) == (200, 1)
    (found,) = set_aside(tmp_path / "out")
    assert (found["source"], found["row"]) == (str(many / "d.csv"), None)


def test_a_table_whose_name_is_no_text(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(many) + b"/caf\xe9.csv")
    Path(name).write_text("id,sentence\n300,great\n301,\n302,so,so\n")
    summary = label(tiny_run, many, tmp_path / "out")
    assert (summary["scored"], summary["unreadable"]) == (200, 1)
    assert [one["source"] for one in set_aside(tmp_path / "out")] == [name]


def test_storage_that_refuses_is_no_fault_of_a_table(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/d.csv", b"id,sentence\n300,great\n301,so,so\n")
    write = type(memory).pipe_file

    def refuse(self: Any, path: str, *content: Any) -> None:
        if "_mended" in path:
            raise RuntimeError("slow down")  # as stores' libraries have errors of their own
        write(self, path, *content)

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    job = Job(str(tiny_run), "memory://answers", precision="fp32", device="cpu")
    with pytest.raises(InputError, match=r"memory://answers: storage .* refuses \(slow down\)"):
        score_tables(job, "memory://bucket/*", quiet)
    assert not memory.exists("/answers/_plan.json")


def test_bytes_that_are_no_text_are_set_aside(tiny_run: Path, tmp_path: Path) -> None:
    pl.DataFrame({"id": [0, 1], "sentence": [b"great", b"\xff\xfe"]}).write_parquet(tmp_path / "a.parquet")
    summary = label(tiny_run, tmp_path / "a.parquet", tmp_path / "out")
    assert (summary["scored"], summary["set_aside"]) == (1, 1)


def test_a_table_that_is_gone_when_it_is_to_be_read_stops_the_job(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    job = Job(str(tiny_run), str(tmp_path / "out"), precision="fp32", device="cpu")
    (part,) = parts_of([bulk.measure(job, (str(many / "a.parquet"), "1"))])
    (many / "a.parquet").unlink()
    with pytest.raises(InputError, match="cannot be read on"):  # as on a node without the disk, which is no bad row
        bulk.Scorer(job)(part)
    assert not (tmp_path / "out" / "_bad").exists()
    assert not list((tmp_path / "out" / "_begun").glob("*/*"))


def test_a_table_that_changes_under_way_stops_the_job(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    job = Job(str(tiny_run), str(tmp_path / "out"), precision="fp32", device="cpu")
    (part,) = parts_of([bulk.measure(job, (str(many / "a.parquet"), "1"))])
    pl.read_parquet(many / "b.parquet").write_parquet(many / "a.parquet")
    with pytest.raises(RunError, match=r"a\.parquet: has other rows than when the job began"):
        bulk.Scorer(job)(part)
    assert not list((tmp_path / "out").glob("part-*"))


def test_what_is_wrong_with_the_classifier_is_told_before_anything_is_written(tiny_run: Path, many: Path) -> None:
    wrong: list[dict[str, Any]] = [{"min_confidence": 7.0}, {"device": MISSING}, {"device": "cpu", "precision": "fp16"}]
    for run, more in ((tiny_run / "nothing", {}), *((tiny_run, one) for one in wrong)):
        with pytest.raises(HeadstartError, match=r"no such run folder|from 0 to 1|machine has none|--precision fp16"):
            label(run, many, many / "out", **more)
        assert not (many / "out").exists()


class Odd(Predictor):
    """A predictor that some texts break."""

    def score_alone(self, texts: Sequence[str]) -> predict.Scores:
        if any("odd" in text for text in texts):
            raise ValueError("odd")
        return super().score_alone(texts)


def test_a_text_that_breaks_the_engine_is_alone_with_it(tiny_run: Path) -> None:
    odd = Odd(predict.load(tiny_run, device="cpu", precision="fp32").classifier)
    texts = ["the film was superb", "odd one", "the soup was awful", "odd two", "great"]
    scores, failed = score_each(odd, texts)
    assert failed == {1: "cannot be scored (odd)", 3: "cannot be scored (odd)"}
    fair = odd.predict_proba([texts[0], texts[2], texts[4]])
    np.testing.assert_allclose(scores.probabilities, fair, atol=1e-6)
    with pytest.raises(ValueError, match="odd"):  # then it is not the texts
        score_each(odd, ["odd 1", "odd 2"])


def test_a_part_that_nobody_survives_is_set_aside(tiny_run: Path, many: Path, tmp_path: Path) -> None:
    job = Job(str(tiny_run), str(tmp_path / "out"), precision="fp32", device="cpu")
    (part,) = parts_of([bulk.measure(job, (str(many / "a.parquet"), "1"))])
    scorer = bulk.Scorer(job)
    for i in range(bulk.MOST_ATTEMPTS):
        assert scorer(part)["rows"] == 90
        assert answers(tmp_path / "out").height == 90, i
        (tmp_path / "out" / "part-00000.parquet").unlink()  # as if whoever scored it had died
    (many / "a.parquet").unlink()  # to read it may be what they died of
    scorer(part)
    assert answers(tmp_path / "out").height == 0
    assert [one["reason"] for one in set_aside(tmp_path / "out")] == ["its part never ended"] * 90


def test_tables_and_answers_may_be_elsewhere(tiny_run: Path, many: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in many.iterdir():
        memory.pipe_file(f"/in/{path.name}", path.read_bytes())
    (damaged,) = ["/in/d.csv"]
    memory.pipe_file(damaged, b"id,sentence\n300,great\n301,so,so\n")
    summary = score_tables(Job(str(tiny_run), "memory://out", precision="fp32", device="cpu"), "memory://in/*", quiet)
    assert (summary["rows"], summary["scored"], summary["set_aside"]) == (202, 201, 1)
    parts = [memory.cat_file(path) for path in memory.glob("/out/part-*")]
    ids = [int(i) for content in parts for i in pl.read_parquet(content)["id"]]
    assert ids == [*range(200), 300]
    assert not memory.exists("/out/_begun")
    assert not memory.exists("/out/_mended")


def killed_now_and_then(command: list[str], out: Path, times: int) -> Iterator[int]:
    """Run a command, killed so many times, each a little after it has ended another part; then to its end."""
    for _ in range(times):
        there = len(list(out.glob("part-*")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while len(list(out.glob("part-*"))) == there and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(0.05)  # for the next part to be begun
        yield process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_process_killed_three_times_scores_every_row_once(tiny_run: Path, tmp_path: Path) -> None:
    rows = pl.DataFrame({"id": range(40_000), "sentence": [f"{TEXTS[i % 80]} {i}" for i in range(40_000)]})
    rows.write_parquet(tmp_path / "a.parquet")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "headstart.cli", "predict", str(tiny_run), "--device", "cpu"]
    command += ["--input", str(tmp_path / "*.parquet"), "--output", str(out)]
    assert all(killed_now_and_then(command, out, 3))
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "of 10 parts were there" in ended.stderr
    assert "40,000 of 40,000 rows labelled" in ended.stdout
    assert answers(out)["id"].to_list() == list(range(40_000))
    again = json.loads((out / "_summary.json").read_text())["rows_begun_again"]
    assert 0 < again < 40_000
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
