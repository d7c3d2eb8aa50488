"""Frames to a checked `Dataset`: labels and their order, blank and repeated rows, and the splits.

This room knows texts, labels, rows and parts. It knows nothing of file formats, tokens or models.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.config import MIN_ROWS
from headstart.errors import DataError
from headstart.tables import find_column, is_delimited, name_rows, parsing, read_columns, resolve_path, scan

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


# --- labels and rows


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
