"""Files to frames: finding, checking and opening a table, its columns, and a close look at one that is broken.

This room knows formats, encodings, delimiters and headers. It knows nothing of labels or splits. All that is wrong
with a file is collected and raised together, so that a person mends it once.
"""

import codecs
import csv
import difflib
import gzip
import importlib.resources
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import polars as pl

from headstart.errors import DataError

USUAL_COLUMNS = {"text": ("sentence", "text", "review", "content"), "label": ("label", "labels", "target", "sentiment")}
FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
MOST_ROWS_NAMED = 8


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


# --- columns


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
