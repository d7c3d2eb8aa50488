"""The one place where logits become probabilities and labels (of lists, streams, files); knows nothing of training."""

import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from gzip import GzipFile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from polars.io.plugins import register_io_source

from headstart.config import Device, Precision, Problem
from headstart.data import written
from headstart.errors import DataError, InputError, disk_errors
from headstart.folders import whole_file
from headstart.onnx import is_exported, load_exported
from headstart.progress import bar
from headstart.runs import Classifier
from headstart.tables import file_format, find_column, parsing, refuse_nested, resolve_path, scan
from headstart.tokens import Tokens, like_length_batches

CHUNK_ROWS = 2048
EXACT_ROWS = 4096  # up to so many texts are scored in fp32, which takes seconds, and gives what transformers gives
ABSTAIN = "abstain"  # the answer where confidence is under the least asked for
SMALLEST_CHUNK = 64  # fewer texts than this are not worth another thread
MOST_REMEMBERED = 50_000  # answers kept, some 300 bytes each, so that a text that comes again is not scored again
READ_AHEAD = {"POLARS_CSV_CHUNK_SIZE": "1000000", "POLARS_CSV_CHUNK_PREFETCH_LIMIT": "1"}
"""Left to itself polars reads a few hundred megabytes of a CSV ahead of a slow reader, which scoring is."""


def probabilities_of(logits: ArrayLike, problem: Problem = "single") -> NDArray[np.float64]:
    """Softmax of (n, labels) logits, in double precision so that rows sum to 1; with `multi`, each label's own."""
    exact = np.asarray(logits, np.float64)
    if problem == "multi":
        return np.exp(-np.logaddexp(0, -exact))
    powers = np.exp(exact - exact.max(axis=1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(axis=1, keepdims=True)


class Decisions(NamedTuple):
    """Of n texts the label, (n,) indexes, or (n, labels) of 0 and 1; and (n,) the probability that it is right."""

    labels: NDArray[np.int64]
    confidence: NDArray[np.float64]


def decide(probabilities: NDArray[np.float64], thresholds: Sequence[float] = ()) -> Decisions:
    """The likeliest label; or, where there are `thresholds`, all labels whose probability is no less than theirs.

    Those are then as likely to be all right as if they were independent of each other.
    """
    if not thresholds:
        return Decisions(probabilities.argmax(axis=1), probabilities.max(axis=1))
    said = probabilities >= np.array(thresholds)
    return Decisions(said.astype(np.int64), np.where(said, probabilities, 1 - probabilities).prod(axis=1))


def token_logits(
    classifier: Classifier, tokens: Tokens, most_tokens: int = 2048, apply: Callable[..., Iterable[Any]] = map
) -> NDArray[np.float32]:
    """(n, labels) logits of truncated texts, in batches of like length that `apply` computes, one by one or at once."""
    logits = np.empty((len(tokens), len(classifier.names)), np.float32)

    def one(index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return index, classifier.logits(*tokens.padded(index, classifier.tokenizer.pad_id))

    for index, found in apply(one, like_length_batches(tokens.lengths, most_tokens=most_tokens)):
        logits[index] = found
    return logits


def text_logits(
    classifier: Classifier, texts: Sequence[str], apply: Callable[..., Iterable[Any]] = map
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(n, labels) logits of texts, as `token_logits`, and (n,) whether a text lost its end to max_length."""
    whole, limit, long = classifier.tokenizer(texts), classifier.max_length, classifier.long
    read = classifier.tokenizer.pieces(whole, limit, long)
    return read.mean(token_logits(classifier, read.tokens, apply=apply)), (whole.lengths > limit) & (long != "windows")


class Scores(NamedTuple):
    """What was said of n texts: (n, labels) probabilities, and (n,) whether a text lost its end to max_length."""

    probabilities: NDArray[np.float64]
    cut: NDArray[np.bool_]


class Predictor:
    """A trained classifier, ready to score texts."""

    def __init__(self, classifier: Classifier, min_confidence: float = 0.0) -> None:
        self.classifier, self.names, self.min_confidence = classifier, classifier.names, min_confidence
        if min_confidence and ABSTAIN in self.names:
            raise InputError(f"--min-confidence answers {ABSTAIN!r}, and that is one of the labels.")
        self.remembered: dict[bytes, tuple[NDArray[np.float64], bool]] = {}

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The label of each text, or labels as `a|b`; `abstain` below `min_confidence`."""
        return self.columns(self.predict_proba(texts))["prediction"].to_list()

    def columns(self, probabilities: NDArray[np.float64]) -> dict[str, pl.Series]:
        """`answer_columns`, with `abstain` for a label below `min_confidence`."""
        columns = answer_columns(probabilities, self.names, self.classifier.thresholds)
        sure = columns["confidence"] >= self.min_confidence
        return {**columns, "prediction": columns["prediction"].zip_with(sure, pl.Series([ABSTAIN]))}

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(n, labels) probabilities, columns in label order; they sum to 1 where a text has one label."""
        return self.score(texts).probabilities

    def score(self, texts: Sequence[str], *, progress: str | None = None) -> Scores:
        """Probabilities of each text, scored once if it occurs twice or came not long ago; `progress` labels a bar."""
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        answers = {key: answer for key in keys if (answer := self.remembered.get(key))}
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in answers}

        def score(some: Sequence[bytes]) -> dict[bytes, tuple[NDArray[np.float64], bool]]:
            return dict(zip(some, zip(*self.score_alone([fresh[key] for key in some]), strict=True), strict=True))

        pending = list(fresh)
        size = min(CHUNK_ROWS, max(SMALLEST_CHUNK, -(-len(pending) // self.classifier.workers)))
        chunks = (pending[start : start + size] for start in range(0, len(pending), size))
        with bar(progress, len(fresh), "texts") as advance:
            for found in self.classifier.side_by_side(score, chunks):
                answers |= found
                advance(len(found), "")
        if len(self.remembered) + len(fresh) > MOST_REMEMBERED:
            self.remembered = {}
        self.remembered |= itertools.islice(((key, answers[key]) for key in fresh), MOST_REMEMBERED)
        probabilities = np.array([answers[key][0] for key in keys]).reshape(len(keys), len(self.names))
        return Scores(probabilities, np.array([answers[key][1] for key in keys], dtype=bool))

    def score_alone(self, texts: Sequence[str]) -> Scores:
        """The same on this thread, with nothing remembered: what comes out is a function of these texts only."""
        if not texts:
            return Scores(np.empty((0, len(self.names))), np.empty(0, dtype=bool))
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        logits, cut = text_logits(self.classifier, list(places))
        index = [places[text] for text in texts]
        return Scores(probabilities_of(logits, self.classifier.problem)[index], cut[index])


def load(
    run: str | Path,
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    min_confidence: float | None = None,
    texts: float = 0,
) -> Predictor:
    """Load a run folder to predict with; a `RunError` if it is none, or a file in it is missing or damaged.

    What `headstart export` made of it is used, without torch, unless a device or precision is asked for. Otherwise,
    where more than `EXACT_ROWS` `texts` are to come, the fastest precision is taken, else fp32.
    """
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise InputError(f"--min-confidence takes a number from 0 to 1, and {min_confidence} was given.")
    if is_by_onnx(run, device, precision):
        return Predictor(load_exported(run), min_confidence or 0.0)
    from headstart.encoder import choose_placement
    from headstart.model import load_run

    exact = precision == "auto" and texts <= EXACT_ROWS
    classifier = load_run(run, choose_placement(device, "fp32" if exact else precision))
    return Predictor(classifier, min_confidence or 0.0)


def is_by_onnx(run: str | Path, device: Device, precision: Precision) -> bool:
    """Whether a run is computed by onnxruntime: it was exported, and nothing is asked for that only torch does."""
    return device in ("auto", "cpu") and precision == "auto" and is_exported(run)


def answered_in_test(run: Path, min_confidence: float) -> tuple[float, float] | None:
    """The share of its test texts that a run answers at that confidence, and of those rightly; None without any."""
    path = run / "predictions.csv"
    if not path.is_file():
        return None
    rows = pl.read_csv(path, infer_schema=False)
    answered = rows.filter(pl.col("confidence").cast(pl.Float64) >= min_confidence)
    right = answered["label"].eq_missing(answered["prediction"]).mean()  # of no label, both are null
    return (answered.height / rows.height, float(right)) if isinstance(right, float) else None


class FileSummary(NamedTuple):
    """What scoring a file came to: rows written, blank ones among them (they get no label), texts cut."""

    rows: int
    blank: int
    cut: int


def answer_columns(
    probabilities: NDArray[np.float64], names: Sequence[str], thresholds: Sequence[float] = ()
) -> dict[str, pl.Series]:
    """`prediction`, `confidence` and `p_NAME` for each label, from (n, labels) probabilities."""
    said = decide(probabilities, thresholds)
    best = pl.Series(written(said.labels, names), dtype=pl.String)
    shares = {f"p_{name}": pl.Series(probabilities[:, i]) for i, name in enumerate(names)}
    return {"prediction": best, "confidence": pl.Series(said.confidence), **shares}


def predict_file(predictor: Predictor, source: str, output: str, text: str | None = None) -> FileSummary:
    """Score a table into a table, chunk by chunk, so that memory does not grow with the file.

    The output (its ending decides the format; `-` is CSV on stdout) keeps the table's columns and adds `prediction`,
    `confidence` and `p_NAME` for each label; it is written beside its place and renamed when whole. `text` is the text
    column; None: the one trained on, or else found. A `DataError` or `DiskError` if a file cannot be read or written.
    """
    path = resolve_path(source)
    frame = scan(path)
    schema = frame.collect_schema()
    trained_on = predictor.classifier.info.get("columns", [None])[0]
    wanted = trained_on if text is None and trained_on in schema else text
    column = find_column(path, schema.names(), wanted, "text")
    ending = ".csv" if output == "-" else file_format(output)
    if output != "-" and Path(output).resolve() == Path(path).resolve():
        raise DataError(f"{output}: is the input; choose another --output.")
    refuse_nested(path, schema, ending)

    def score(part: pl.DataFrame) -> tuple[pl.DataFrame, Counter[str]]:  # the answer to a blank text is null
        texts = part[column].cast(pl.String).to_list()
        kept = {i: place for place, i in enumerate(i for i, text in enumerate(texts) if text and text.strip())}
        scores = predictor.score([texts[i] for i in kept])
        rows = pl.Series([kept.get(i) for i in range(len(texts))], dtype=pl.UInt32)
        added = pl.DataFrame(predictor.columns(scores.probabilities)).select(pl.all().gather(rows))
        counts = Counter(rows=len(texts), blank=len(texts) - len(kept), cut=int(scores.cut.sum()))
        return part.with_columns(added.get_columns()), counts

    empty, totals = score(pl.DataFrame(schema=schema))

    def scored() -> Iterator[pl.DataFrame]:  # this thread reads and writes, others tokenise and compute
        with bar("scoring", None, "texts") as advance:
            for part, counts in predictor.classifier.side_by_side(score, read_parts(frame, path)):
                totals.update(counts)
                advance(part.height, "")
                yield part

    if output == "-":
        write_frames(sys.stdout.buffer, ending, scored(), empty)
        return FileSummary(**totals)
    with disk_errors(Path(output)), whole_file(Path(output)) as temporary, open(temporary, "wb") as file:
        packs = output.lower().endswith(".gz") and ending != ".parquet"
        with GzipFile("", "wb", fileobj=file, mtime=0) if packs else nullcontext(file) as target:
            write_frames(target, ending, scored(), empty)
    return FileSummary(**totals)


def read_parts(frame: pl.LazyFrame, path: str) -> Iterator[pl.DataFrame]:
    """The rows of a table, `CHUNK_ROWS` at a time, read ahead as little as the person's environment leaves to us."""
    with ExitStack() as stack, parsing(path):
        for name in READ_AHEAD.keys() - os.environ.keys():
            os.environ[name] = READ_AHEAD[name]
            stack.callback(os.environ.pop, name, None)
        for chunk in frame.collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
            yield from chunk.iter_slices(CHUNK_ROWS)


def write_frames(file: IO[bytes] | GzipFile, ending: str, frames: Iterator[pl.DataFrame], empty: pl.DataFrame) -> None:
    """Write frames, all with the columns of `empty`, one after the other as a table of the format."""
    if ending == ".parquet":
        whole = register_io_source(lambda *_: frames, schema=empty.schema)  # a plain sink asks for all of it
        whole.sink_parquet(file)  # type: ignore[arg-type]  # a GzipFile is an IO in all but name
    elif ending in (".csv", ".tsv"):
        separator = "\t" if ending == ".tsv" else ","
        file.write(empty.write_csv(separator=separator).encode())
        file.writelines(frame.write_csv(separator=separator, include_header=False).encode() for frame in frames)
    elif ending == ".json":
        records = (frame.write_json()[1:-1].encode() for frame in frames)
        file.write(b"[" + next(records, b""))
        file.writelines(b"," + some for some in records)
        file.write(b"]")
    else:
        file.writelines(frame.write_ndjson().encode() for frame in frames)
    file.flush()


class Answer(NamedTuple):
    """One labelled line."""

    text: str
    label: str
    confidence: float
    cut: bool


def label_lines(predictor: Predictor, lines: Iterable[str], at_once: int = 1) -> Iterator[Answer]:
    """Label each line that is not blank, `at_once` read before the first is answered: 1 where a person waits."""
    texts = (text for line in lines if (text := line.strip()))
    while chunk := list(itertools.islice(texts, at_once)):
        scores = predictor.score(chunk)
        said = predictor.columns(scores.probabilities)
        yield from map(Answer, chunk, said["prediction"], said["confidence"], scores.cut.tolist())
