"""The one place where logits become probabilities and labels: of lists, of streams, of files.

This room knows a loaded classifier and tables; it knows nothing of training.
"""

import contextlib
import gzip
import hashlib
import itertools
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from headstart.config import Device, Precision
from headstart.encoder import choose_placement
from headstart.engine import side_by_side
from headstart.errors import DataError, disk_errors
from headstart.model import Classifier, load_run
from headstart.progress import bar
from headstart.tables import file_format, find_column, parsing, resolve_path, scan
from headstart.tokens import like_length_batches

CHUNK_ROWS = 2048
SMALLEST_CHUNK = 64
"""Fewer texts than this are not worth another thread."""

MOST_REMEMBERED = 50_000
"""Answers kept, some 300 bytes each, so that a text that comes again is not scored again."""

MOST_TOKENS = 2048
READ_AHEAD = {"POLARS_CSV_CHUNK_SIZE": "1000000", "POLARS_CSV_CHUNK_PREFETCH_LIMIT": "1"}
"""Left to itself polars reads a few hundred megabytes of a CSV ahead of a slow reader, which scoring is."""


def probabilities_of(logits: torch.Tensor) -> NDArray[np.float64]:
    """Softmax of (n, labels) logits, in double precision so that rows sum to 1."""
    return torch.softmax(logits.double(), dim=1).numpy()


@dataclass(frozen=True)
class Scores:
    """What was said of n texts: (n, labels) probabilities, and (n,) whether a text lost its end to max_length."""

    probabilities: NDArray[np.float64]
    cut: NDArray[np.bool_]


class Predictor:
    """A trained classifier, ready to score texts."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.names = classifier.names
        self.remembered: dict[bytes, tuple[NDArray[np.float64], bool]] = {}

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text."""
        return [self.names[i] for i in self.predict_proba(texts).argmax(axis=1)]

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(n, labels) probabilities, columns in label order."""
        return self.score(texts).probabilities

    def score(self, texts: Sequence[str], *, progress: str | None = None) -> Scores:
        """Probabilities of each text; a text that occurs twice, or was scored not long ago, is not scored again.

        `progress` labels a bar.
        """
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        answers = {key: answer for key in keys if (answer := self.remembered.get(key))}
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in answers}
        pending = list(fresh.values())
        size = min(CHUNK_ROWS, max(SMALLEST_CHUNK, -(-len(pending) // torch.get_num_threads())))
        chunks = (pending[start : start + size] for start in range(0, len(pending), size))
        rows: list[tuple[NDArray[np.float64], bool]] = []
        with bar(progress, len(fresh), "texts") as advance:
            for scores in side_by_side(self._score, chunks):
                rows.extend(zip(scores.probabilities, scores.cut.tolist(), strict=True))
                advance(len(scores.cut), "")
        answers |= zip(fresh, rows, strict=True)
        if len(self.remembered) + len(fresh) > MOST_REMEMBERED:
            self.remembered = {}
        self.remembered |= itertools.islice(((key, answers[key]) for key in fresh), MOST_REMEMBERED)
        probabilities = np.array([answers[key][0] for key in keys]).reshape(len(keys), len(self.names))
        return Scores(probabilities, np.array([answers[key][1] for key in keys], dtype=bool))

    def _score(self, texts: Sequence[str]) -> Scores:
        """Scores of distinct texts, computed on one thread."""
        tokenizer, limit = self.classifier.tokenizer, self.classifier.max_length
        whole = tokenizer(texts)
        tokens = tokenizer.truncate(whole, limit)
        logits = torch.empty(len(tokens), len(self.names))
        for index in like_length_batches(tokens.lengths, most_tokens=MOST_TOKENS):
            logits[index] = self.classifier.logits(*tokens.padded(index, tokenizer.pad_id))
        return Scores(probabilities_of(logits), whole.lengths > limit)


def load(run: str | Path, *, device: Device = "auto", precision: Precision = "auto") -> Predictor:
    """Load a run folder to predict with.

    Raises:
        RunError: it is not one, or a file in it is missing or damaged.
    """
    return Predictor(load_run(run, choose_placement(device, precision)))


# --- files


@dataclass(frozen=True)
class FileSummary:
    """What scoring a file came to: rows written, blank ones among them (they get no label), texts cut."""

    rows: int
    blank: int
    cut: int


def score_columns(predictor: Predictor, texts: Sequence[str | None]) -> tuple[dict[str, pl.Series], int, int]:
    """The contract's columns for a list of texts, how many were blank (null in each), and how many were cut."""
    kept = [i for i, text in enumerate(texts) if text is not None and text.strip()]
    scores = predictor.score([text for i in kept if (text := texts[i]) is not None])
    whole = np.full((len(texts), len(predictor.names)), np.nan)
    whole[kept] = scores.probabilities
    best = np.array(predictor.names, dtype=object)[scores.probabilities.argmax(axis=1)]
    labels: list[str | None] = [None] * len(texts)
    for i, name in zip(kept, best, strict=True):
        labels[i] = name
    columns = {
        "prediction": pl.Series(labels, dtype=pl.String),
        "confidence": pl.Series(whole.max(axis=1), dtype=pl.Float64),
        **{f"p_{name}": pl.Series(whole[:, i], dtype=pl.Float64) for i, name in enumerate(predictor.names)},
    }
    return (
        {name: series.fill_nan(None) if series.dtype.is_float() else series for name, series in columns.items()},
        len(texts) - len(kept),
        int(scores.cut.sum()),
    )


def predict_file(predictor: Predictor, source: str, output: str, text: str | None = None) -> FileSummary:
    """Score a table into a table, chunk by chunk, so that memory does not grow with the file.

    The output keeps the table's columns and adds `prediction`, `confidence` and `p_NAME` for each label. It is
    written beside its place and renamed when whole.

    Args:
        predictor: a loaded classifier.
        source: any table headstart reads.
        output: any table headstart reads (the ending decides), or `-` for CSV on stdout.
        text: the text column; None: the one trained on, or else found.

    Raises:
        DataError: the table cannot be read.
        DiskError: the output cannot be written.
    """
    path = resolve_path(source)
    frame = scan(path)
    schema = frame.collect_schema()
    trained_on = predictor.classifier.info.get("columns", [None])[0]
    wanted = text if text is not None or trained_on not in schema.names() else trained_on
    column = find_column(path, schema.names(), wanted, "text")
    ending = ".csv" if output == "-" else file_format(output)
    if output != "-" and Path(output).resolve() == Path(path).resolve():
        raise DataError(f"{output}: is the input; choose another --output.")
    if ending in (".csv", ".tsv") and (nested := [name for name, dtype in schema.items() if dtype.is_nested()]):
        raise DataError(f"{path}: the column {nested[0]!r} holds lists or records; write .jsonl or .parquet.")
    totals = {"rows": 0, "blank": 0, "cut": 0}

    def parts() -> Iterator[pl.DataFrame]:
        with parsing(path), environment(READ_AHEAD):
            for chunk in frame.collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
                yield from chunk.iter_slices(CHUNK_ROWS)

    def with_scores(part: pl.DataFrame) -> tuple[pl.DataFrame, int, int]:
        columns, blank, cut = score_columns(predictor, part[column].cast(pl.String).to_list())
        return part.with_columns(**columns), blank, cut

    def scored() -> Iterator[pl.DataFrame]:  # this thread reads and writes, others tokenise and compute
        with bar("scoring", None, "texts") as advance:
            for part, blank, cut in side_by_side(with_scores, parts()):
                totals["rows"] += part.height
                totals["blank"] += blank
                totals["cut"] += cut
                advance(part.height, "")
                yield part

    empty = pl.DataFrame(schema=schema).with_columns(**score_columns(predictor, [])[0])
    if output == "-":
        write_frames(sys.stdout.buffer, ending, scored(), empty)
    else:
        with whole_file(Path(output)) as temporary:
            if ending == ".parquet":
                write_parquet(temporary, scored(), empty)
            else:
                with open(temporary, "wb") as plain, _maybe_gzip(plain, output) as file:
                    write_frames(file, ending, scored(), empty)
    return FileSummary(**totals)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block; what the person has set stays."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it at the end, removed if anything failed."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _maybe_gzip(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    if name.lower().endswith(".gz"):
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
            yield packed  # type: ignore[misc]  # a BinaryIO in all but name
    else:
        yield file


def write_frames(file: BinaryIO, ending: str, frames: Iterable[pl.DataFrame], empty: pl.DataFrame) -> None:
    """Write frames, all with the columns of `empty`, one after the other as CSV, TSV, JSON lines or one JSON array."""
    if ending in (".csv", ".tsv"):
        separator = "\t" if ending == ".tsv" else ","
        file.write(empty.write_csv(separator=separator).encode())
        for frame in frames:
            file.write(frame.write_csv(separator=separator, include_header=False).encode())
    elif ending == ".json":
        joint = b"["
        for frame in frames:
            file.write(joint + frame.write_json().encode()[1:-1])
            joint = b","
        file.write(b"[]" if joint == b"[" else b"]")
    else:
        for frame in frames:
            file.write(frame.write_ndjson().encode())
    file.flush()


def write_parquet(path: Path, frames: Iterator[pl.DataFrame], empty: pl.DataFrame) -> None:
    """Write frames into one parquet file, streaming."""
    from polars.io.plugins import register_io_source

    def source(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        del with_columns, predicate, n_rows, batch_size  # a plain sink asks for everything
        yield from frames

    register_io_source(source, schema=empty.schema).sink_parquet(path)


@dataclass(frozen=True)
class Answer:
    """One labelled line."""

    text: str
    label: str
    confidence: float
    cut: bool


def label_lines(predictor: Predictor, lines: Iterable[str], at_once: int = 1) -> Iterator[Answer]:
    """Label a text a line, of lines without end perhaps; blank ones are passed over.

    `at_once` lines are read before the first is answered: 1 for a person who waits, more for a pipe.
    """
    texts = (text for line in lines if (text := line.strip()))
    while chunk := list(itertools.islice(texts, at_once)):
        scores = predictor.score(chunk)
        for text, row, cut in zip(chunk, scores.probabilities, scores.cut, strict=True):
            best = int(row.argmax())
            yield Answer(text, predictor.names[best], float(row[best]), bool(cut))
