"""Files to checked frames and their columns, no labels or splits; all that is wrong with a file is told together."""

import codecs
import csv
import glob
import gzip
import importlib.resources
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import polars as pl

from headstart.errors import DataError, count_of

USUAL_COLUMNS = {"text": ("sentence", "text", "review", "content"), "label": ("label", "labels", "target", "sentiment")}
USUAL_NAMES = {name for names in USUAL_COLUMNS.values() for name in names}
FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
ENDING = re.compile(rf"({'|'.join(map(re.escape, FORMATS))})(\.gz)?\Z", re.IGNORECASE)
MOST_ROWS_NAMED = 8
LONE_CR = "\ud80d"  # stands for a carriage return without a line feed; no decoded byte becomes it
REMOTE = "hf://"  # polars has to fetch such a table, so that nobody else can look into it
csv.field_size_limit(2**31 - 1)  # texts may be longer than the 128 kB that Python stops at


def resolve_path(source: str) -> str:
    """The path or address behind what was given as DATA: `sample` is the set shipped with headstart."""
    return str(importlib.resources.files("headstart") / "samples" / "reviews.csv") if source == "sample" else source


def is_remote(source: str) -> bool:
    """Whether a path is an address of elsewhere."""
    return "://" in source and not source.startswith("file://")


def is_many(source: str, output: str | None) -> bool:
    """Whether what is asked for is many tables, or a folder of answers, and not one table into one."""
    if Path(source).is_dir() or (is_remote(source) and not source.startswith("hf://")):
        return True
    if any(sign in source for sign in "*?[") and not Path(source).is_file():
        return True
    return output not in (None, "-") and (not Path(str(output)).suffix or Path(str(output)).is_dir())


def file_format(source: str) -> str:
    """The table format by the name's ending, without `.gz`; a `DataError` on another ending."""
    if found := ENDING.search(source):
        return found[1].lower()
    raise DataError(f"{source}: headstart reads {', '.join(FORMATS)} (also with .gz). Rename or convert the file.")


def is_delimited(source: str) -> bool:
    """Whether the table is delimited text, whose first row is a header."""
    return file_format(source) in (".csv", ".tsv")


def name_rows(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3 and 7`, or `rows 3, 7, … (41 in all)`."""
    if len(rows) > MOST_ROWS_NAMED:
        return f"rows {', '.join(map(str, rows[:MOST_ROWS_NAMED]))}, … ({len(rows):,} in all)"
    return f"rows {', '.join(map(str, rows[:-1]))} and {rows[-1]}" if len(rows) > 1 else f"row {rows[0]}"


def scan(source: str) -> pl.LazyFrame:
    """A table as a lazy frame with clean headers, only strings where delimited; a `DataError` if it is unreadable."""
    remote = source.startswith(REMOTE)
    with parsing(source):
        if not remote:
            _refuse_no_file(source)
        ending = file_format(source)
        if is_delimited(source):
            delimiter = ("\t" if ending == ".tsv" else ",") if remote else read_delimiter(source)
            frame = pl.scan_csv(source, separator=delimiter, infer_schema=False, glob=False)  # `*` in a name is a star
        elif ending in (".jsonl", ".ndjson"):
            marked = not remote and _read(source, 3) == codecs.BOM_UTF8  # polars stumbles over it
            frame = pl.scan_ndjson(_read(source)[3:] if marked else glob.escape(source), infer_schema_length=None)
        elif ending == ".json":
            frame = pl.read_json(_read(source), infer_schema_length=None).lazy()
        else:
            frame = pl.scan_parquet(_read(source) if source.lower().endswith(".gz") else source, glob=False)
        columns = frame.collect_schema().names()
    clean = [column.replace("\ufeff", "").strip() for column in columns]
    names = Counter(re.sub(r"_duplicated_\d+$", "", name) for name in clean)  # by which polars tells them apart
    if repeated := sorted(name for name, count in names.items() if name and count > 1):
        raise DataError(f"{source}: the column {repeated[0]!r} appears twice. Rename one of them.")
    return frame.rename(dict(zip(columns, clean, strict=True)))


def count_rows(source: str) -> float:
    """The rows of a table, or infinity where it would have to be fetched; a `DataError` if it is unreadable."""
    path = resolve_path(source)
    if path.startswith(REMOTE):
        return math.inf
    with parsing(path):
        return float(scan(path).select(pl.len()).collect().item())


def _refuse_no_file(source: str) -> None:
    path = Path(source)
    if not path.exists():
        near = get_close_matches(path.name, [entry.name for entry in path.parent.glob("*")], n=1)
        raise DataError(f"{source}: no such file. " + (f"Did you mean {near[0]}?" if near else "Check the path."))
    if path.is_dir():
        tables = sorted(entry.name for entry in path.iterdir() if ENDING.search(entry.name))
        raise DataError(f"{source}: is a folder; give a file in it. It holds {', '.join(tables[:3]) or 'no table'}.")


def read_delimiter(source: str) -> str:
    """A local file's delimiter: the one that makes most known columns, or else most columns; in `.tsv` a tab."""
    with _open_bytes(source) as file:
        header = next((line for line in file if line.strip(b"\r\n")), b"").decode("utf-8-sig").rstrip("\r\n")
    if (not header.strip() or "\0" in header) and (found := faults(source)):
        raise DataError(found)
    if "\r" in header:
        mend = f"tr '\\r' '\\n' < {Path(source).name} > lines-{Path(source).name}"
        raise DataError(f"{source}: its lines end as on an old Mac. Save it with other line ends, or use: {mend}")
    if file_format(source) == ".tsv":
        return "\t"
    columns = {one: [cell.strip() for cell in next(csv.reader([header], delimiter=one), [])] for one in ",;\t|"}
    return max(columns, key=lambda one: (len(USUAL_NAMES & set(map(str.lower, columns[one]))), len(columns[one])))


def _open_bytes(source: str) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(source) if source.lower().endswith(".gz") else open(source, "rb")


def _read(source: str, size: int = -1) -> bytes:
    with _open_bytes(source) as file:
        return file.read(size)


@contextmanager
def parsing(source: str) -> Iterator[None]:
    """Turn the refusal of the disk or a parser to read `source` into a `DataError`: its `faults`, or else why."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        if source.startswith(REMOTE):
            raise DataError(f"{source}: cannot be fetched ({why}). Download it and give the file.") from error
        if found := faults(source):
            raise DataError(found) from error
        raise DataError(f"{source}: is not a whole {file_format(source)} table ({why}). Export it again.") from error


def faults(source: str) -> list[str]:
    """What is wrong with a local file, one sentence each, by a slow look at all of it; empty if nothing is found."""
    if source.startswith(REMOTE):
        return []
    try:
        content = _read(source)
    except (OSError, EOFError, zlib.error) as error:
        why = "no permission" if isinstance(error, PermissionError) else getattr(error, "strerror", None)
        return [f"{source}: cannot be read ({why})." if why else f"{source}: is not a whole gzip file; pack it again."]
    if not content.strip():
        return [f"{source}: the file is empty."]
    if file_format(source) == ".parquet":
        return []
    # In UTF-16 of Western text every other byte is NUL, also where there is no byte-order mark.
    head = content[:4096]
    nul = max(head[0::2].count(0), head[1::2].count(0))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (len(head) > 7 and nul > 0.4 * len(head)):
        return [f"{source}: is UTF-16, not UTF-8. Save it as UTF-8 (in Excel: «CSV UTF-8»)."]
    if b"\0" in content:
        row = content.count(b"\n", 0, content.index(0)) + 1
        return [f"{source}: is a binary file, or a damaged one: it has a NUL byte near row {row}."]
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return [f"{source}: ends inside a character at byte {error.start}; the file was cut off."]
        name, row = Path(source).name, content.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start} (0x{content[error.start]:02x}, in row {row}) is not UTF-8; probably latin-1"
        return [f"{source}: {where}. Save it as UTF-8, for example with: iconv -f latin1 -t utf-8 {name} > utf8-{name}"]
    return _ragged_rows(source, text) if is_delimited(source) else _broken_json(source, text)


def _ragged_rows(source: str, text: str) -> list[str]:
    """One sentence for each wrong number of fields, or else on quotes that have no partner."""
    # A line ends in a line feed alone, as polars sees it.
    lines = [line.rstrip("\r").replace("\r", " ") + "\n" for line in text.removesuffix("\n").split("\n")]
    expected = 0
    wrong, problems = dict[int, list[int]](), list[str]()
    for row, (cells, odd) in enumerate(_cells(lines, read_delimiter(source)), start=1):
        expected = expected or len(cells)
        if odd and "\n" in cells[-1]:  # only at the end of the file can a field still be open
            problems.append(f"{source}: row {row} opens a quote that is never closed. Close it, or double it.")
        elif odd or (cells and len(cells) != expected):
            wrong.setdefault(len(cells), []).append(row)
    lone = wrong.pop(expected, [])  # as many fields as the header has, and a quote without a partner
    for count, rows in sorted(wrong.items()):
        advice = "Put quotes around texts that hold the delimiter" if count > expected else "Fill in what is missing"
        fields = f"{count_of(count, 'field')} where the header has {expected}"
        problems.append(f"{source}: {name_rows(rows)} {'has' if len(rows) == 1 else 'have'} {fields}. {advice}.")
    if lone and not problems:
        have = f"{name_rows(lone)} {'has' if len(lone) == 1 else 'have'} a lone quote"
        problems.append(f"{source}: {have}. Put quotes around the text, and double the one inside.")
    return problems


def _cells(lines: Iterable[str], delimiter: str) -> Iterator[tuple[list[str], bool]]:
    """The cells of each row, and whether it has a quote without a partner."""
    quotes = 0

    def counted() -> Iterator[str]:
        nonlocal quotes
        for line in lines:
            quotes += line.count('"')
            yield line

    for cells in csv.reader(counted(), delimiter=delimiter):
        yield cells, quotes % 2 == 1
        quotes = 0


def rows_one_by_one(source: str) -> Iterator[tuple[bytes, str | None]]:
    """Each row of a delimited table (header, too) or of JSON lines, as a line of a whole one; what is wrong with it.

    Delimited ones are written anew, as CSV. Of a blank row the line is empty.
    """
    with _open_bytes(source) as file:
        if not is_delimited(source):
            for line in file:
                yield (line.strip() + b"\n" if line.strip() else b""), _wrong_with_json(line)
            return
        expected = 0
        lines = (line.decode("utf-8-sig" if not i else "utf-8", "surrogateescape") for i, line in enumerate(file))
        marked = (re.sub("\r(?!\n)", LONE_CR, line) for line in lines)  # csv refuses it outside quotes
        for cells, odd in _cells(marked, read_delimiter(source)):
            expected = expected or len(cells)
            restored = [cell.replace(LONE_CR, "\r") for cell in cells]
            csv.writer(written := io.StringIO(), lineterminator="\n").writerow(restored)
            record, reason = written.getvalue(), None
            if odd:
                reason = "it has a quote without a partner"
            elif len(cells) != expected:
                reason = f"it has {count_of(len(cells), 'field')} where the header has {expected}"
            elif re.search("[\udc80-\udcff]", record):  # what bytes that are none became
                reason = "it is not UTF-8"
            elif "\0" in record:
                reason = "it has a NUL byte"
            yield (record.encode("utf-8", "surrogateescape"), reason) if cells else (b"", None)


def _refuse(constant: str) -> None:
    raise ValueError(f"it has no {constant}")


def _wrong_with_json(line: bytes) -> str | None:
    try:
        right = not line.strip() or isinstance(json.loads(line, parse_constant=_refuse), dict)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return None if right else "it is no record"


def _broken_json(source: str, text: str) -> list[str]:
    """One sentence on the rows of a JSON table that are no records, or on where it stops being JSON."""
    whole = file_format(source) == ".json"
    records: list[Any] = []
    for part in [text] if whole else text.split("\n"):
        try:
            records.append(json.loads(part) if part.strip() else {})
        except (ValueError, RecursionError) as error:
            if whole:
                return [f"{source}: is not whole JSON ({error}). Mend it there, or export it again."]
            records.append(None)
    rows = [i for i, one in enumerate(records[0] if whole else records, 1) if not isinstance(one, dict)]
    what = "is no record" if len(rows) == 1 else "are no records"
    return [f'{source}: {name_rows(rows)} {what} like {{"sentence": "…", "label": "…"}}.'] if rows else []


def find_column(source: str, columns: Sequence[str], wanted: str | None, role: str) -> str:
    """The `text` or `label` column: as asked, the first usual name, or the only usual one; a `DataError` otherwise."""
    usual, listed = USUAL_COLUMNS[role], ", ".join(map(repr, columns))
    if wanted is not None and wanted not in columns:
        hint = "".join(f" Did you mean {near!r}?" for near in get_close_matches(wanted, columns, n=1, cutoff=0.5))
        raise DataError(f"{source}: has no column {wanted!r}; its columns are {listed}.{hint}")
    first = usual[0] if wanted is None else wanted
    found = [first] if first in columns else [column for column in columns if column.lower() in usual]
    if len(found) == 1:
        return found[0]
    if several := " and ".join(map(repr, found)):
        raise DataError(f"{source}: {several} could both be the {role} column; choose one with --{role} COLUMN.")
    others = [column for column in columns if column.lower() not in USUAL_NAMES]  # a usual name says what it is
    near = [column for column in others if any(name in column.lower() for name in usual)]
    near += [column for column in others if get_close_matches(column.lower(), usual, cutoff=0.7)]
    hint = f"Try --{role} {near[0]}." if near else f"Name it with --{role} COLUMN."
    if any(len(column.split()) > 3 or column.isdigit() for column in columns):
        hint += " (Does the file lack a header row?)"
    raise DataError(f"{source}: has no {role} column ({', '.join(usual)}); its columns are {listed}. {hint}")


def read_columns(source: str, **wanted: str | None) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """A table and its columns for `text`, `label` or both, by name or None; a `DataError` has every problem found."""
    frame = scan(source)
    columns = frame.collect_schema().names()
    problems, found = list[str](), list[str]()
    for role, name in wanted.items():
        try:
            found.append(find_column(source, columns, name, role))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems + faults(source))
    if len(set(found)) < len(found):
        raise DataError(f"{source}: the text and the label cannot both be the column {found[0]!r}.")
    with parsing(source):
        table = frame.collect()
    for role, column in zip(wanted, found, strict=True):
        inner = getattr(table[column].dtype, "inner", pl.List)  # several labels a text are a list
        if table[column].dtype.is_nested() and (role == "text" or inner.is_nested()):
            problems.append(f"{source}: the column {column!r} holds lists or records; give one value a row.")
        elif table[column].dtype == pl.Binary:
            try:
                table = table.with_columns(pl.col(column).cast(pl.String))
            except pl.exceptions.PolarsError:
                problems.append(f"{source}: the column {column!r} holds bytes that are no UTF-8 text; decode them.")
    if not table.height:
        problems.append(f"{source}: has a header and no rows.")
    elif is_delimited(source) and (
        table[columns[-1]].null_count() or any(table[column].str.contains("\0").any() for column in found)
    ):
        problems = faults(source)  # slow; polars fills up a row that ends early with empty cells, and takes NUL bytes
    if problems:
        raise DataError(problems)
    return table, tuple(found)


def refuse_nested(source: str, schema: pl.Schema, ending: str) -> None:
    """A `DataError` if a table holds what the format with that ending cannot."""
    if ending in (".csv", ".tsv") and (nested := [name for name, dtype in schema.items() if dtype.is_nested()]):
        raise DataError(f"{source}: the column {nested[0]!r} holds lists or records; write .jsonl or .parquet.")


def for_spreadsheets(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame to write as CSV, with an apostrophe before what a spreadsheet would compute (CSV injection, OWASP)."""
    text = pl.selectors.string()
    number = text.str.contains(r"^[+-]?[\d.,]+$")
    return frame.with_columns(pl.when(number).then(text).otherwise(text.str.replace(r"^([=+\-@\t\r])", "'$1")))


def from_spreadsheets(column: pl.Series) -> pl.Series:
    """A column of texts without the apostrophes that `for_spreadsheets` adds."""
    return column.str.replace(r"^'([=+\-@\t\r])", "$1")
