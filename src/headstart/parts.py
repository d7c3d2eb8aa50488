"""Tables cut into parts of some thousand rows, each of which knows which rows of which tables it holds.

This room knows where rows are and reads them. It knows nothing of classifiers, nor who computes a part.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from headstart.errors import DataError, RunError
from headstart.places import near
from headstart.tables import is_delimited, parsing, scan

PART_ROWS = 4096  # seconds of work, so that little is lost with whoever dies; a million rows make some 250 files
Json = dict[str, Any]


class Table(NamedTuple):
    """A table in a version: its rows, what is read of it (itself, or a copy without bad rows), its text column.

    `shape` is equal where columns are. So many `bad` rows were set aside at once; `gaps` are the numbers of rows that
    the copy lacks, blank ones, too; `problem` is why nothing of the table can be read.
    """

    source: str
    version: str
    read: str
    rows: int = 0
    text: str = ""
    shape: str = ""
    bad: int = 0
    gaps: Sequence[int] = ()
    problem: str | None = None


class Slice(NamedTuple):
    """So many rows of what is read of a table, from `start`, counted from 0, on.

    `first` is the number of the first in the table as it was; the table's gaps are those between its rows alone.
    """

    table: Table
    start: int
    rows: int
    first: int


class Part(NamedTuple):
    """The rows of one file of the output."""

    name: str
    slices: Sequence[Slice]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(one.rows for one in self.slices)


def parts_of(tables: Iterable[Table]) -> list[Part]:
    """Cut tables into parts of `PART_ROWS` rows, in order; small ones with the same columns share a part."""
    found, slices = list[list[Slice]](), list[Slice]()
    for table in tables:
        start = 0
        while start < table.rows:
            room = PART_ROWS - sum(one.rows for one in slices)
            if not room or (slices and slices[0].table[4:6] != table[4:6]):  # another text, or shape
                found.append(slices)
                slices, room = [], PART_ROWS
            slices.append(slice_of(table, start, min(room, table.rows - start)))
            start += slices[-1].rows
    found += [slices] if slices else []
    width = max(5, len(str(len(found))))
    return [Part(f"part-{number:0{width}}", some) for number, some in enumerate(found)]


def slice_of(table: Table, start: int, rows: int) -> Slice:
    """So many rows of a table from `start` on, with the numbers they have in it."""
    first, gaps = start + (2 if is_delimited(table.source) else 1), table.gaps  # as a header is row 1
    without = np.asarray(gaps, dtype=np.int64) - np.arange(len(gaps))  # where each gap would be without those before it
    begin, end = np.searchsorted(without, [first, first + rows - 1], side="right").tolist()
    return Slice(table._replace(gaps=gaps[begin:end]), start, rows, first + begin)


def numbers_of(piece: Slice) -> list[int]:
    """Which rows of the table as it was they are."""
    gaps = np.asarray(piece.table.gaps, dtype=np.int64)
    return np.delete(piece.first + np.arange(piece.rows + len(gaps)), gaps - piece.first).tolist()


def texts_of(piece: Slice, refused: str = "") -> tuple[pl.DataFrame, list[Json], list[Json]]:
    """The rows of a slice that have a text, where each is from, and the others, as they are set aside.

    All are others where `refused` says why, or where they cannot be read. A `RunError` if the table has changed.
    """
    table = piece.table
    origins = [{"source": table.source, "row": row} for row in numbers_of(piece)]
    frame = pl.DataFrame()
    if not refused:  # reading may be what ends whoever does it
        try:
            with near(table.read) as path, parsing(path):
                frame = scan(path).slice(piece.start, piece.rows).collect(engine="streaming")
        except DataError as error:
            refused = str(error)
    if refused:
        return frame, [], [{**one, "reason": refused} for one in origins]
    if frame.height != piece.rows:
        raise RunError(f"{table.source}: has other rows than when the job began. Choose another --output.")
    if frame[table.text].dtype == pl.Binary:
        frame = frame.with_columns(pl.Series(table.text, map(_decoded, frame[table.text]), dtype=pl.String))
    empty = frame[table.text].cast(pl.String).str.strip_chars().fill_null("") == ""
    blank, kept = empty.arg_true(), (~empty).arg_true()
    others = [{**origins[i], "reason": "its text is empty", "record": frame.row(i, named=True)} for i in blank]
    return frame.filter(~empty), [origins[i] for i in kept], others


def _decoded(content: bytes | None) -> str | None:
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode() if content is not None else None
    return None


def records(found: Sequence[Json]) -> bytes:
    """JSON, a record a line."""
    return b"".join(
        json.dumps(one, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n" for one in found
    )
