"""Tables in, a checked `Dataset` out, and its splits.

This room knows files, columns, labels and rows. It knows nothing of tokens or models. Everything wrong with a
file is collected and raised together, so that a person mends it once.
"""

import codecs
import csv
import difflib
import gzip
import importlib.resources
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.config import MIN_ROWS
from headstart.errors import DataError

USUAL_COLUMNS = {"text": ("sentence", "text", "review", "content"), "label": ("label", "labels", "target", "sentiment")}
FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
MOST_ROWS_NAMED = 8
Duplicates = Literal["together", "as they fall"]


@dataclass(frozen=True)
class Dataset:
    """Labelled texts in file order.

    Attributes:
        texts: n texts, none blank.
        labels: (n,) int64 indexes into `names`.
        names: the labels' names in label order: numbers numerically, strings lexically.
        rows: (n,) int64 row numbers in the file, as a spreadsheet counts them.
        notices: what was found and mended while reading, one sentence each.
        columns: the columns that the texts and the labels came from.
        source: the file, for messages.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    rows: NDArray[np.int64]
    notices: tuple[str, ...] = ()
    columns: tuple[str, str] = ("sentence", "label")
    source: str = "the table"

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: NDArray[np.int64]) -> "Dataset":
        """The rows at `index`, in that order."""
        texts = [self.texts[i] for i in index]
        return replace(self, texts=texts, labels=self.labels[index], rows=self.rows[index])


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of the labelled texts, and what was done to get them."""

    train: Dataset
    validation: Dataset
    test: Dataset
    notices: tuple[str, ...] = ()


# --- reading a file


def resolve_path(source: str) -> str:
    """The path or address behind what was given as DATA: `sample` is the set shipped with headstart."""
    if source == "sample":
        return str(importlib.resources.files("headstart") / "samples" / "reviews.csv")
    return source


def file_format(source: str) -> str:
    """The table format by the name's ending, without `.gz`.

    Raises:
        DataError: another ending.
    """
    name = source.lower().removesuffix(".gz")
    for ending in FORMATS:
        if name.endswith(ending):
            return ending
    raise DataError(f"{source}: headstart reads {', '.join(FORMATS)} (also with .gz). Rename or convert the file.")


def check_readable(source: str) -> None:
    """Refuse what is no table before a parser sees it.

    Raises:
        DataError: no such file, a folder, empty, binary, or text that is not UTF-8 (names the byte and the row).
    """
    path = Path(source)
    with reading(source):
        if not path.exists():
            near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
            hint = f" Did you mean {near[0]}?" if near else " Check the path."
            raise DataError(f"{source}: no such file.{hint}")
        if path.is_dir():
            tables = [name for name in _names_beside(path / "x") if name.lower().removesuffix(".gz").endswith(FORMATS)]
            hint = f" It holds {', '.join(sorted(tables)[:3])}." if tables else ""
            raise DataError(f"{source}: is a folder; give a file in it.{hint}")
        ending = file_format(source)
        if path.stat().st_size == 0:
            raise DataError(f"{source}: the file is empty.")
        if ending != ".parquet":
            _check_utf8(source)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn the disk's refusals to read `source` inside the block into one sentence."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{source}: cannot be read (no permission).") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source}: is not a whole gzip file; pack it again.") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error}).") from error


def _names_beside(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []


def _open_bytes(source: str) -> BinaryIO:
    if source.lower().endswith(".gz"):
        return gzip.open(source, "rb")  # type: ignore[return-value]  # GzipFile is a BinaryIO in all but name
    return open(source, "rb")


def _check_utf8(source: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, row = 0, 1
    with _open_bytes(source) as file:
        head = file.read(4096)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _looks_utf16(head):
            raise DataError(f"{source}: is UTF-16, not UTF-8. Save it as UTF-8 (in Excel: «CSV UTF-8»).")
        if b"\0" in head:
            raise DataError(f"{source}: is a binary file, not a table of text.")
        if not head.strip():
            raise DataError(f"{source}: the file is empty.")
        chunk = head
        while chunk:
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                byte = position - pending + error.start
                row += chunk.count(b"\n", 0, max(0, error.start - pending))
                bad = error.object[error.start]
                raise DataError(
                    f"{source}: byte {byte} (0x{bad:02x}, in row {row}) is not UTF-8; the file is probably "
                    f"latin-1 (Windows-1252). Save it as UTF-8, for example with: "
                    f"iconv -f latin1 -t utf-8 {Path(source).name} > utf8-{Path(source).name}"
                ) from error
            position += len(chunk)
            row += chunk.count(b"\n")
            if b"\0" in chunk:
                raise DataError(f"{source}: has a NUL byte near row {row}: a binary file, or a damaged one.")
            chunk = file.read(1 << 20)
        if decoder.getstate()[0]:
            raise DataError(f"{source}: ends inside a character at byte {position}; the file was cut off.")


def _looks_utf16(head: bytes) -> bool:
    """Whether every other byte is NUL, as in UTF-16 of Western text without a byte-order mark."""
    sample = head[: len(head) // 2 * 2]
    half = len(sample) // 2
    return half > 3 and max(sample[0::2].count(0), sample[1::2].count(0)) > 0.8 * half


def detect_delimiter(source: str) -> str:
    """The delimiter of a delimited file: the one that makes most known columns of the header, or most columns.

    Reads the header only; `.tsv` is tabs.
    """
    if file_format(source) == ".tsv":
        return "\t"
    header = header_line(source)

    def fitness(delimiter: str) -> tuple[int, int]:
        cells = cells_of(header, delimiter)
        known = sum(cell.lower() in USUAL_COLUMNS["text"] + USUAL_COLUMNS["label"] for cell in cells)
        return known, len(cells)

    return max(",;\t|", key=fitness)


def header_line(source: str) -> str:
    """The first line of a delimited file that is not empty.

    Raises:
        DataError: lines end in a carriage return alone, so that there is only one.
    """
    with _open_bytes(source) as file:
        line = b"\n"
        while line.strip(b"\r\n") == b"" != line:
            line = file.readline(1 << 20)
    header = line.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if "\r" in header:
        raise DataError(
            f"{source}: its lines end as on an old Mac (in a carriage return alone). Save it with other line ends, "
            f"for example with: tr '\\r' '\\n' < {Path(source).name} > lines-{Path(source).name}"
        )
    return header


def cells_of(header: str, delimiter: str) -> list[str]:
    """The clean cells of a header line."""
    return [clean_name(cell) for cell in next(csv.reader([header], delimiter=delimiter), [])]


def clean_name(name: str) -> str:
    """A header without byte-order mark and stray spaces."""
    return name.replace("\ufeff", "").strip()


def is_delimited(source: str) -> bool:
    """Whether the table is delimited text, whose first row is a header."""
    return file_format(source) in (".csv", ".tsv")


def scan(source: str) -> pl.LazyFrame:
    """A table as a lazy frame with clean headers, for streaming; delimited files give strings only.

    Raises:
        DataError: the file is not a readable table.
    """
    if not source.startswith("hf://"):
        check_readable(source)
    ending = file_format(source)
    with parsing(source):
        if is_delimited(source):
            # Brackets and stars in a path are its name, not a pattern.
            frame = pl.scan_csv(source, separator=detect_delimiter(source), infer_schema=False, glob=False)
        elif ending in (".jsonl", ".ndjson"):
            frame = pl.scan_ndjson(_json_lines(source), infer_schema_length=None)
        elif ending == ".json":
            with _open_bytes(source) as file:
                frame = pl.read_json(file.read(), infer_schema_length=None).lazy()
        elif source.lower().endswith(".gz"):
            with _open_bytes(source) as file, reading(source):
                frame = pl.read_parquet(file.read()).lazy()
        else:
            frame = pl.scan_parquet(source, glob=False)
        columns = frame.collect_schema().names()
    clean = [clean_name(column) for column in columns]
    # polars renames a repeated column, so the header itself is asked.
    names = cells_of(header_line(source), detect_delimiter(source)) if is_delimited(source) else clean
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{source}: the column {repeated[0]!r} appears twice. Rename one of them.")
    return frame.rename(dict(zip(columns, clean, strict=True)))


def _json_lines(source: str) -> str | bytes:
    """What polars shall scan: the path, or the content where polars would stumble over its mark or its name."""
    if source.startswith("hf://"):
        return source
    with _open_bytes(source) as file:
        marked = file.read(3) == codecs.BOM_UTF8
    if not marked and not set(source) & set("*?["):
        return source
    with _open_bytes(source) as file:
        return file.read().removeprefix(codecs.BOM_UTF8)


@contextmanager
def parsing(source: str) -> Iterator[None]:
    """Turn a parser's refusal of `source` into one sentence: its ragged rows if it has any, else why.

    Raises:
        DataError: in place of what polars raised.
    """
    try:
        yield
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{source}: the file is empty.") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        if source.startswith("hf://"):
            raise DataError(
                f"{source}: cannot be fetched ({_first_line(error)}). Download it and give the file."
            ) from error
        if is_delimited(source) and (broken := ragged_rows(source) or lone_quotes(source)):
            raise DataError(broken) from error
        if file_format(source) in (".jsonl", ".ndjson", ".json") and (broken := broken_json(source)):
            raise DataError(broken) from error
        raise DataError(
            f"{source}: is not a whole {file_format(source)} table ({_first_line(error)}). Export it again."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


def ragged_rows(source: str) -> list[str]:
    """One sentence for each way in which rows have another number of fields than the header; else empty."""
    expected = 0
    wrong: dict[int, list[int]] = {}
    problems: list[str] = []
    for row, cells, odd in _records(source):
        if cells and not expected:
            expected = len(cells)
        elif odd and "\n" in cells[-1]:  # only at the end of the file can a field still be open
            problems.append(f"{source}: row {row} opens a quote that is never closed. Close it, or double it.")
        elif cells and len(cells) != expected:
            wrong.setdefault(len(cells), []).append(row)
    return problems + [
        f"{source}: {name_rows(rows)} {'has' if len(rows) == 1 else 'have'} {count} "
        f"field{'s' if count != 1 else ''} where the header has {expected}. "
        + ("Put quotes around texts that hold the delimiter." if count > expected else "Fill in what is missing.")
        for count, rows in sorted(wrong.items())
    ]


def lone_quotes(source: str) -> list[str]:
    """One sentence on the rows with a quote that has no partner, over which polars stumbles; else empty."""
    rows = [row for row, _, odd in _records(source) if odd]
    advice = "Put quotes around the text, and double the one inside."
    return [f"{source}: {name_rows(rows)} {'has' if len(rows) == 1 else 'have'} a lone quote. {advice}"] if rows else []


def _records(source: str) -> Iterator[tuple[int, list[str], bool]]:
    """The row number and cells of each record, and whether it has an odd number of quotes."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    quotes = 0

    def counted(lines: Iterable[str]) -> Iterator[str]:  # a line ends in a line feed alone, as polars sees it
        nonlocal quotes
        for line in lines:
            quotes += line.count('"')
            yield line.rstrip("\r\n").replace("\r", " ") + "\n"

    with _open_bytes(source) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n") as lines:
        for row, cells in enumerate(csv.reader(counted(lines), delimiter=detect_delimiter(source)), start=1):
            yield row, cells, quotes % 2 == 1
            quotes = 0


def broken_json(source: str) -> list[str]:
    """One sentence on the rows of a JSON table that are no records, or on where it stops being JSON; else empty."""
    with _open_bytes(source) as file:
        if file_format(source) == ".json":
            try:
                records = json.loads(file.read())
            except (ValueError, RecursionError) as error:
                where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
                return [f"{source}: is not whole JSON{where}. Mend it there, or export it again."]
            rows = (
                [i for i, one in enumerate(records, start=1) if not isinstance(one, dict)]
                if isinstance(records, list)
                else []
            )
        else:
            rows = [i for i, line in enumerate(file, start=1) if line.strip() and not _is_record(line)]
    what = "is no record" if len(rows) == 1 else "are no records"
    return [f'{source}: {name_rows(rows)} {what} like {{"sentence": "…", "label": "…"}}.'] if rows else []


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False


def name_rows(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3 and 7`, or `rows 3, 7, … (41 in all)`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    if len(rows) <= MOST_ROWS_NAMED:
        return "rows " + ", ".join(str(row) for row in rows[:-1]) + f" and {rows[-1]}"
    return "rows " + ", ".join(str(row) for row in rows[:MOST_ROWS_NAMED]) + f", … ({len(rows):,} in all)"


# --- columns and labels


def find_column(source: str, columns: Sequence[str], wanted: str | None, role: str) -> str:
    """The column to use: the one asked for, else the usual first name, else the only usual one.

    Args:
        source: named in messages.
        columns: the table's columns.
        wanted: the person's choice, or None.
        role: `text` or `label`.

    Raises:
        DataError: none or several fit.
    """
    option, usual = f"--{role}", USUAL_COLUMNS[role]
    listed = ", ".join(repr(column) for column in columns)
    if wanted is not None:
        if wanted in columns:
            return wanted
        near = difflib.get_close_matches(wanted, columns, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{source}: has no column {wanted!r}; its columns are {listed}.{hint}")
    if usual[0] in columns:
        return usual[0]
    candidates = [column for column in columns if column.lower() in usual]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise DataError(
            f"{source}: {' and '.join(repr(name) for name in candidates)} could both be the {role} column; "
            f"choose one with {option} COLUMN."
        )
    others = [name for names in USUAL_COLUMNS.values() for name in names]  # each says what it is
    near = [
        column
        for column in columns
        for name in usual
        if (difflib.SequenceMatcher(None, column.lower(), name).ratio() > 0.7 or name in column.lower())
        and column.lower() not in others
    ]
    hint = f"Try {option} {near[0]}." if near else f"Name it with {option} COLUMN."
    if any(len(column.split()) > 3 or column.isdigit() for column in columns):
        hint += " (Does the file lack a header row?)"
    raise DataError(f"{source}: has no {role} column ({', '.join(usual)}); its columns are {listed}. {hint}")


def label_texts(column: pl.Series) -> list[str | None]:
    """Each label as its name, None where blank: whole numbers lose `.0` and leading zeros, strings their spaces."""
    if column.dtype.is_float():
        values = column.fill_nan(None).to_list()
        whole = all(value is None or float(value).is_integer() for value in values)
        return [None if value is None else str(int(value)) if whole else str(value) for value in values]
    strings = column.cast(pl.String).str.strip_chars()
    values = [value or None for value in strings.to_list()]
    present = {value for value in values if value is not None}
    if present and all(re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", value) for value in present):
        return [None if value is None else str(int(value.split(".")[0])) for value in values]
    return values


def label_order(labels: set[str]) -> tuple[str, ...]:
    """All labels in the one order used everywhere: numbers numerically, strings lexically."""
    if all(re.fullmatch(r"-?\d{1,4000}", label) for label in labels):  # Python reads no longer numbers
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def shown(label: str) -> str:
    """A label as messages quote it."""
    return repr(label if len(label) <= 40 else label[:39] + "…")


def text_key(text: str) -> str:
    """What makes two texts duplicates: the same words, whatever the spaces and capitals."""
    return " ".join(text.split()).casefold()


def load(
    source: str,
    text: str | None = None,
    label: str | None = None,
    *,
    index: Mapping[str, int] | None = None,
    least_rows: int = MIN_ROWS,
) -> Dataset:
    """Read and check a table of labelled texts.

    Args:
        source: a path, an hf:// address, or `sample`.
        text: the text column; None: find it.
        label: the label column; None: find it.
        index: the labels that there may be and their places, when another table has decided them.
        least_rows: fewer usable rows are refused.

    Raises:
        DataError: with every problem found in the table.
    """
    path = resolve_path(source)
    table, columns = read_columns(path, {"text": text, "label": label})
    return _checked(
        path,
        table[columns[0]].cast(pl.String).to_list(),
        label_texts(table[columns[1]]),
        index=index,
        least_rows=least_rows,
        columns=columns,
    )


def load_texts(source: str, text: str | None = None) -> list[str]:
    """The texts of a table that need not be labelled, blank ones left out.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    path = resolve_path(source)
    frame = scan(path)
    column = find_column(path, frame.collect_schema().names(), text, "text")
    with parsing(path):
        values = frame.select(column).collect()[column].cast(pl.String).to_list()
    texts = [value for value in values if value is not None and value.strip()]
    if not texts:
        raise DataError(f"{path}: has no text in the column {column!r}.")
    return texts


def read_columns(path: str, wanted: Mapping[str, str | None]) -> tuple[pl.DataFrame, tuple[str, str]]:
    """A whole table and the names of its text and label columns.

    Raises:
        DataError: with every problem found.
    """
    frame = scan(path)
    columns = frame.collect_schema().names()
    problems: list[str] = []
    found: list[str] = []
    for role in ("text", "label"):
        try:
            found.append(find_column(path, columns, wanted[role], role))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems + (ragged_rows(path) if is_delimited(path) else []))
    if found[0] == found[1]:
        raise DataError(f"{path}: the text and the label cannot both be the column {found[0]!r}.")
    with parsing(path):
        table = frame.collect()
    for column in found:
        if table[column].dtype.is_nested():
            problems.append(f"{path}: the column {column!r} holds lists or records; give one value a row.")
        elif table[column].dtype == pl.Binary:
            try:
                table = table.with_columns(pl.col(column).cast(pl.String))
            except pl.exceptions.PolarsError:
                problems.append(f"{path}: the column {column!r} holds bytes that are no UTF-8 text; decode them first.")
    if problems:
        raise DataError(problems)
    if table.height == 0:
        raise DataError(f"{path}: has a header and no rows.")
    # A row that ends early reads as empty last cells, and a quote left open has no partner: only then is the slower
    # look worth its time.
    suspect = is_delimited(path) and (table[columns[-1]].null_count() or _odd_quotes(path))
    if suspect and (ragged := ragged_rows(path)):
        raise DataError(ragged)
    return table, (found[0], found[1])


def _odd_quotes(source: str) -> bool:
    with _open_bytes(source) as file:
        return sum(chunk.count(b'"') for chunk in iter(lambda: file.read(1 << 20), b"")) % 2 == 1


def _checked(
    source: str,
    texts: list[str | None],
    labels: list[str | None],
    *,
    index: Mapping[str, int] | None,
    least_rows: int,
    columns: tuple[str, str],
) -> Dataset:
    first_row = 2 if is_delimited(source) else 1  # as a spreadsheet counts: the header is row 1
    problems: list[str] = []
    notices: list[str] = []
    kept: list[tuple[int, str, str]] = []
    blank: dict[str, list[int]] = {"text": [], "label": []}
    for row, (text, label) in enumerate(zip(texts, labels, strict=True), start=first_row):
        if text is None or not text.strip():
            blank["text"].append(row)
        elif label is None:
            blank["label"].append(row)
        else:
            kept.append((row, text, label))
    for what, rows in blank.items():
        if rows:
            some = f"{len(rows):,} row{'s' if len(rows) != 1 else ''}"
            notices.append(f"{source}: dropped {some} with an empty {what} ({name_rows(rows)}).")
    present = {label for _, _, label in kept}
    if len(kept) < least_rows:
        problems.append(
            f"{source}: has {len(kept)} usable row{'s' if len(kept) != 1 else ''}, "
            f"and at least {least_rows} are needed."
        )
    if index is None:
        names = label_order(present)
        index = {label: place for place, label in enumerate(names)}
        if len(names) == 1:
            problems.append(f"{source}: every row has the label {shown(names[0])}; at least two labels are needed.")
        elif len(names) > max(2, len(kept) // 2):
            problems.append(
                f"{source}: the column {columns[1]!r} has {len(names):,} different values in {len(kept):,} rows, "
                f"so it is no label. Choose the label's column with --label COLUMN."
            )
    else:
        names = tuple(label for label, _ in sorted(index.items(), key=lambda item: item[1]))
        for strange in sorted(present - set(index)):
            rows = [row for row, _, label in kept if label == strange]
            problems.append(
                f"{source}: the label {shown(strange)} ({name_rows(rows)}) is not one of those trained on: "
                f"{', '.join(names)}."
            )
    if problems:
        raise DataError(problems)
    notices.extend(_duplicates(source, kept))
    return Dataset(
        [text for _, text, _ in kept],
        np.array([index[label] for _, _, label in kept], dtype=np.int64),
        names,
        np.array([row for row, _, _ in kept], dtype=np.int64),
        tuple(notices),
        columns,
        source,
    )


def _duplicates(source: str, kept: list[tuple[int, str, str]]) -> Iterator[str]:
    seen: dict[str, set[str]] = {}
    repeats = 0
    for _, text, label in kept:
        known = seen.setdefault(text_key(text), set())
        repeats += bool(known)
        known.add(label)
    if repeats:
        yield f"{source}: {repeats:,} row{'s repeat' if repeats != 1 else ' repeats'} an earlier row's text."
    conflicts = [key for key, known in seen.items() if len(known) > 1]
    if conflicts:
        example = conflicts[0] if len(conflicts[0]) <= 60 else conflicts[0][:59] + "…"
        yield (
            f"{source}: {len(conflicts):,} text{'s stand' if len(conflicts) != 1 else ' stands'} there with "
            f"different labels (for example {example!r})."
        )


# --- splits


def split(
    dataset: Dataset, validation: Dataset | None, test: Dataset | None, *, seed: int, duplicates: Duplicates
) -> Splits:
    """Train, validation and test parts: 70:15:15 as the article does it, or the tables given.

    Without tables, scikit-learn's `train_test_split` is called twice, stratified: 30% off with
    `random_state=seed`, and that halved with the same seed. With one table given, 15 of the remaining 85 parts
    become the other.

    Args:
        dataset: the rows to split.
        validation: its own table, or None.
        test: its own table, or None.
        seed: scikit-learn's `random_state`.
        duplicates: `together` moves all copies of a text to one part afterwards, to training if one is there.

    Raises:
        DataError: a class has too few rows to be in each part.
    """
    rest = np.arange(len(dataset), dtype=np.int64)
    parts = {"train": rest}
    if validation is None and test is None:
        parts["train"], rest = _cut(dataset, rest, 0.3, seed)
        parts["validation"], parts["test"] = _cut(dataset, rest, 0.5, seed)
    elif validation is None or test is None:
        missing = "validation" if validation is None else "test"
        parts["train"], parts[missing] = _cut(dataset, rest, round(len(rest) * 15 / 85), seed)
    notices = []
    if duplicates == "together" and len(parts) > 1 and (moved := _gather_duplicates(dataset, parts)):
        notices.append(
            f"{moved:,} row{'s were' if moved != 1 else ' was'} moved so that copies of a text share one part."
        )
        for name, part in parts.items():
            if not len(part):
                raise DataError(f"{dataset.source}: too many rows repeat another's text: nothing is left for {name}.")
            if lost := _absent(dataset, part):
                names = ", ".join(shown(dataset.names[i]) for i in lost[:6])
                notices.append(f"After that, no row in the {name} part has the label {names}.")
    given = {"validation": validation, "test": test}
    tables = {name: table for name, table in given.items() if table is not None}
    tables |= {name: dataset.take(part) for name, part in parts.items()}
    known = {text_key(text) for text in tables["train"].texts}
    for name, table in given.items():
        if table is not None and (leaked := sum(text_key(text) in known for text in table.texts)):
            notices.append(
                f"{leaked:,} of the {len(table):,} {name} texts also stand{'s' if leaked == 1 else ''} "
                f"in the training table: the {name} score may flatter."
            )
    return Splits(tables["train"], tables["validation"], tables["test"], tuple(notices))


def _cut(
    dataset: Dataset, rows: NDArray[np.int64], share: float | int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.model_selection import train_test_split

    labels = dataset.labels[rows]
    try:
        kept, off = train_test_split(rows, random_state=seed, test_size=share, stratify=labels)
    except ValueError as error:
        raise _too_few(dataset) from error
    if _absent(dataset, kept) or _absent(dataset, off):
        raise _too_few(dataset)
    return kept, off


def _absent(dataset: Dataset, part: NDArray[np.int64]) -> list[int]:
    """The labels that no row of a part has."""
    return np.flatnonzero(np.bincount(dataset.labels[part], minlength=len(dataset.names)) == 0).tolist()


def _too_few(dataset: Dataset) -> DataError:
    counts = np.bincount(dataset.labels, minlength=len(dataset.names))
    rarest = [int(i) for i in np.argsort(counts, kind="stable") if counts[i] < 7] or [int(counts.argmin())]
    named = ", ".join(
        f"{shown(dataset.names[i])} has {counts[i]} row{'s' if counts[i] != 1 else ''}" for i in rarest[:6]
    )
    more = f" (and {len(rarest) - 6:,} more labels are as rare)" if len(rarest) > 6 else ""
    return DataError(
        f"{dataset.source}: too few rows to put each label in training, validation and test: the label {named}{more}. "
        f"Merge it with another label, add rows, or give files with --validation and --test."
    )


def _gather_duplicates(dataset: Dataset, parts: dict[str, NDArray[np.int64]]) -> int:
    """Move copies of a text to the first part that has one; returns how many rows moved."""
    home: dict[str, str] = {}
    moved = 0
    for name in parts:
        stay = []
        for row in parts[name].tolist():
            place = home.setdefault(text_key(dataset.texts[row]), name)
            if place == name:
                stay.append(row)
            else:
                parts[place] = np.append(parts[place], row)
                moved += 1
        parts[name] = np.array(stay, dtype=np.int64)
    return moved
