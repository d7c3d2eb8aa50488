"""Scoring many tables into a folder, part by part: what is done stays done, and every row comes out exactly once.

A *part* is some thousand rows. Whoever computes it writes its file whole or not at all, under a name that the plan has
given it, so that a part is there or is to be done, however often it was begun and whoever died over it. Rows that
cannot be scored are set aside with their reason. Tables and folders are here, or where fsspec finds them. This room
does not know who computes parts, nor where.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import platform
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headstart.config import Device, Precision
from headstart.errors import DataError, HeadstartError, InputError, RunError, StoppedEarlyError, count_of
from headstart.folders import file_sha256
from headstart.parts import PART_ROWS, Part, Table, parts_of, records, texts_of
from headstart.places import Place, find_tables, near
from headstart.predict import Predictor, Scores, load, read_parts
from headstart.progress import bar
from headstart.runs import HUB_FILES, read_json
from headstart.tables import count_rows, file_format, find_column, is_delimited, rows_one_by_one, scan

MOST_ATTEMPTS = 10  # a part that so many have begun and none has ended is set aside: it is what ends them
PLAN, SUMMARY = "_plan.json", "_summary.json"
ASIDE, BEGUN, MENDED = "_bad", "_begun", "_mended"  # rows set aside; who began what; copies of tables without bad rows
NOTED = ("rows", "cut", "read", "score", "write")  # of each part; the last three are seconds of one worker
UNREADABLE = (DataError, OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)
MENDABLE = (".csv", ".tsv", ".jsonl", ".ndjson")
Json = dict[str, Any]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # as `map`, in any order


@dataclass(frozen=True)
class Job:
    """What decides the answers: the run folder, where they go, and the settings of `predict.load`.

    Paths are absolute, since others may compute it, from other folders; `rows` of all tables decide the precision.
    """

    run: str
    output: str
    text: str | None = None
    min_confidence: float | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    rows: float = 0

    @property
    def place(self) -> Place:
        """The folder of the answers."""
        return Place(self.output)

    def load(self) -> Predictor:
        """The classifier that scores it."""
        options: Json = {"device": self.device, "precision": self.precision, "min_confidence": self.min_confidence}
        return load(self.run, texts=self.rows, **options)

    def key(self, tables: dict[str, str]) -> str:
        """A sha256 of all that decides the answers."""
        files = [path for pattern in (*HUB_FILES, "onnx/export.json") for path in sorted(Path(self.run).glob(pattern))]
        sums = [file_sha256(path) for path in files if path.name != "metrics.json"]
        parts = [PART_ROWS, sums, {**asdict(self), "run": "", "output": "", "rows": 0}, tables]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def measure(job: Job, found: tuple[str, str]) -> Table:
    """Look at a table, by its name and version: its rows are counted, its text is found, bad rows are set aside.

    An `InputError` if it has no text column. What cannot be read is no reason to stop.
    """
    table = Table(*found, read=found[0])
    try:
        return _measured(job, table)
    except UNREADABLE as error:
        problem = str(error)
    name = hashlib.sha256(os.fsencode(table.source)).hexdigest()[:16]
    with contextlib.suppress(*UNREADABLE):  # then nothing of it can be saved, and `problem` has been told above
        mended = _mended(job, table, name)
        if mended is not None:
            return mended
    job.place.remove(f"{MENDED}/{name}.csv")
    job.place.write(f"{ASIDE}/{name}.jsonl", records([{"source": table.source, "row": None, "reason": problem}]))
    return table._replace(problem=problem)


def _mended(job: Job, table: Table, name: str) -> Table | None:
    """The same of a copy without the rows that are in the way, which are set aside; None where it cannot be made."""
    if (ending := file_format(table.source)) not in MENDABLE:
        return None
    good, bad, gaps = list[bytes](), list[Json](), list[int]()
    with near(table.source) as path:
        for row, (line, reason) in enumerate(rows_one_by_one(path), start=1):
            if reason is None and line:
                good.append(line)
                continue
            gaps.append(row)
            if row == 1 and reason is not None and ending in (".csv", ".tsv"):
                return None  # it says what the columns are
            if reason is not None:
                record = line.decode("utf-8", "replace").rstrip("\n")
                bad.append({"source": table.source, "row": row, "reason": reason, "record": record})
    copy = f"{MENDED}/{name}{'.csv' if ending in ('.csv', '.tsv') else '.jsonl'}"
    job.place.write(copy, b"".join(good))
    found = _measured(job, table._replace(read=f"{job.output}/{copy}", bad=len(bad), gaps=gaps))
    job.place.write(f"{ASIDE}/{name}.jsonl", records(bad))
    return found


def _measured(job: Job, table: Table) -> Table:
    with near(table.read) as path:
        frame = scan(path)
        schema = frame.collect_schema()
        whole = file_format(path) != ".parquet"  # which knows its rows; of others all is read, to see whether it can be
        rows = sum(part.height for part in read_parts(frame, path)) if whole else int(count_rows(path))
        if not rows and is_delimited(path):  # polars takes all to be the header if that has half a quote
            for _, reason in rows_one_by_one(path):
                if reason is not None:
                    raise DataError(f"{table.source}: has no rows that can be told apart ({reason}).")
    trained_on = _trained_on(job.run)
    try:
        wanted = trained_on if job.text is None and trained_on in schema else job.text
        text = find_column(table.source, schema.names(), wanted, "text")
    except DataError as error:
        raise InputError(str(error)) from error  # of the job, and not of one table
    if schema[text].is_nested():
        raise InputError(f"{table.source}: the column {text!r} holds lists or records; give one value a row.")
    shape = hashlib.sha256(json.dumps([[name, str(kind)] for name, kind in schema.items()]).encode()).hexdigest()
    return table._replace(rows=rows, text=text, shape=shape)


@functools.lru_cache(maxsize=1)
def _trained_on(run: str) -> str | None:
    """The text column of the table that a run was trained on, where headstart trained it."""
    there = (Path(run) / "headstart.json").is_file()
    return read_json(Path(run), "headstart.json").get("columns", [None])[0] if there else None


class Scorer:
    """Scores parts of a job, one after the other or several at once."""

    def __init__(self, job: Job) -> None:
        self.job, self.place, self.predictor = job, job.place, job.load()

    def __call__(self, part: Part) -> Json:
        """Score a part, and write what is set aside, then its file; what it came to, with wall seconds."""
        begun, attempts = time.perf_counter(), len(self.place.names(f"{BEGUN}/{part.name}"))
        if self.place.has(f"{part.name}.parquet"):  # by another, who was thought to be lost
            return {"name": part.name, **dict.fromkeys(NOTED, 0), "rows": part.rows}
        marker = f"{BEGUN}/{part.name}/{uuid.uuid4().hex}"
        self.place.write(marker, f"{platform.node()} {os.getpid()}".encode())
        try:
            return self.score(part, attempts, begun)
        except BaseException:
            self.place.remove(marker)  # it counts who died of it
            raise

    def score(self, part: Part, attempts: int, begun: float) -> Json:
        """The same, of a part that so many have begun before."""
        frames, origins, aside = list[pl.DataFrame](), list[Json](), list[Json]()
        for piece in part.slices:
            frame, kept, others = texts_of(piece, "its part never ended" if attempts >= MOST_ATTEMPTS else "")
            frames.append(frame)
            origins += kept
            aside += others
        whole, text, read = pl.concat(frames, how="diagonal_relaxed"), part.slices[0].table.text, time.perf_counter()
        texts = whole[text].cast(pl.String).to_list() if whole.height else []
        scores, failed = score_each(self.predictor, texts)
        aside += [{**origins[i], "reason": why, "record": whole.row(i, named=True)} for i, why in failed.items()]
        answers, scored = self.predictor.columns(scores.probabilities), time.perf_counter()
        table = whole.filter(~pl.int_range(whole.height, eager=True).is_in(list(failed))).with_columns(**answers)
        table.write_parquet(file := io.BytesIO())
        if aside:
            self.place.write(f"{ASIDE}/{part.name}.jsonl", records(aside))
        else:
            self.place.remove(f"{ASIDE}/{part.name}.jsonl")  # what could not be read then may be now
        self.place.write(f"{part.name}.parquet", file.getvalue())
        seconds = {"read": read - begun, "score": scored - read, "write": time.perf_counter() - scored}
        return {"name": part.name, "rows": part.rows, "cut": int(scores.cut.sum()), **seconds}


def score_each(predictor: Predictor, texts: Sequence[str]) -> tuple[Scores, dict[int, str]]:
    """Scores of texts, without those that cannot be scored, and why those cannot, by their places.

    If none can be scored the error is passed on: then it is not the texts.
    """
    failed = dict[int, str]()

    def score(some: range) -> list[Scores]:
        try:
            return [predictor.score_alone([texts[i] for i in some])]
        except Exception as error:  # whatever one odd text causes shall not stop the others
            if len(some) > 1:
                half = len(some) // 2
                return [*score(some[:half]), *score(some[half:])]
            if len(failed) + 1 == len(texts) > 1:
                raise
            failed[some[0]] = f"cannot be scored ({error})"
            return []

    found = [predictor.score_alone([]), *score(range(len(texts)))]
    return Scores(*(np.concatenate(columns) for columns in zip(*found, strict=True))), failed


def in_process(job: Job, parts: Sequence[Part]) -> Iterator[Json]:
    """Score parts by this process, a core each."""
    scorer = Scorer(job)
    yield from scorer.predictor.classifier.side_by_side(scorer, parts)


def score_tables(
    job: Job,
    source: str,
    announce: Callable[[str], None],
    each: Each = map,
    score: Callable[[Job, Sequence[Part]], Iterator[Json]] = in_process,
    check: Callable[[Job], object] = Job.load,
) -> Json:
    """Score tables into parquet files, or go on where that was interrupted; returns what is in `_summary.json`.

    `each` looks at tables and `score` scores parts, here or elsewhere, in any order; `check` loads the classifier
    there, so that what is amiss with it is told before anything is written. An `InputError`, and nothing is scored, if
    there are no tables, one lacks a text column, or the folder holds something else.
    """
    place, found = job.place, find_tables(source, job.output)
    names, key = place.names(), job.key(found)
    plan = json.loads(place.read(PLAN)) if PLAN in names else {}
    if set(names) - {ASIDE, MENDED} and plan.get("key") != key:  # those two a kill may leave before there is a plan
        what = "answers for another classifier, other tables or settings" if plan else "something else"
        raise RunError(f"{job.output}: holds {what}. Choose another --output, or delete it.")
    if SUMMARY in names:
        announce(f"{job.output}: is finished; nothing is left to do.")
        return dict(json.loads(place.read(SUMMARY)))
    tables = [Table(*one) for one in plan.get("tables", ())]
    if not plan:
        check(job)
        tables = look_at(job, found, each)
        place.write(PLAN, json.dumps({"key": key, "tables": tables}).encode())
    parts = parts_of(tables)
    left = [part for part in parts if f"{part.name}.parquet" not in names]
    if len(left) < len(parts):
        announce(f"Resumed   {len(parts) - len(left):,} of {count_of(len(parts), 'part')} were there.")
    rows, counts, begun = sum(one.rows for one in tables), Counter[str](), time.monotonic()
    try:
        with bar("scoring", sum(part.rows for part in left), "texts") as advance:
            for one in score(replace(job, rows=rows), left) if left else ():
                counts.update({name: one[name] for name in NOTED})
                advance(one["rows"], "")
    except KeyboardInterrupt:
        raise StoppedEarlyError(f"Ctrl-C: {job.output} keeps what was scored; the same command goes on.") from None
    return summarise(job, tables, parts, {**counts, "seconds": time.monotonic() - begun})


def look_at(job: Job, found: Mapping[str, str], each: Each) -> list[Table]:
    """`measure` each table, in order; a `DataError`, and nothing is left there, if there is nothing to score."""
    seen = dict[str, Table]()
    try:
        job.place.remove(ASIDE)
        with bar("looking at tables", len(found), "tables") as advance:
            for one in each(functools.partial(measure, job), found.items()):
                seen[one.source] = one
                advance(1, "")
        if not any(one.rows for one in seen.values()):
            raise DataError([seen[name].problem or f"{name}: has no rows." for name in found])
    except HeadstartError:
        for name in (ASIDE, MENDED):
            job.place.remove(name)
        raise
    return [seen[source] for source in found]


def summarise(job: Job, tables: Sequence[Table], parts: Sequence[Part], now: Json) -> Json:
    """Count what is there, write it down, and tidy up; a `RunError` if it is not every row once."""
    place = job.place
    there, rows_of = set(place.names()), {part.name: part.rows for part in parts}
    begun = [rows_of[one.split("/")[-2]] for one in place.fs.find(f"{place.path}/{BEGUN}")]
    aside = sum(place.read(f"{ASIDE}/{name}").count(b"\n") for name in place.names(ASIDE))
    unread = sum(one.problem is not None for one in tables)
    rows = sum(one.rows + one.bad for one in tables)
    scored = 0
    for part in parts:
        if f"{part.name}.parquet" in there:
            with place.fs.open(f"{place.path}/{part.name}.parquet", "rb") as file:
                scored += int(pl.scan_parquet(file).select(pl.len()).collect().item())
    if scored + aside - unread != rows:
        raise RunError(f"{job.output}: {scored:,} rows and {aside:,} set aside are not the {rows:,} that there are.")
    summary: Json = {"tables": len(tables), "unreadable": unread, "rows": rows, "scored": scored}
    summary |= {
        "set_aside": aside - unread,
        "parts": len(parts),
        "rows_begun_again": max(0, sum(begun) - sum(rows_of.values())),
    }
    summary |= {"now": {name: round(now.get(name, 0), 3) for name in (*NOTED, "seconds")}}
    place.write(SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
    for name in (BEGUN, MENDED):
        place.remove(name)
    place.tidy()
    return summary
