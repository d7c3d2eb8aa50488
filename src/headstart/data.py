"""Frames to a checked `Dataset`: labels and their order, blank and repeated rows, and the splits. No file formats."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.config import MIN_ROWS
from headstart.errors import DataError, count_of
from headstart.tables import from_spreadsheets, is_delimited, name_rows, read_columns, resolve_path

Indexes = NDArray[np.int64]
Namings = Sequence[Sequence[str]]  # ways to name the same labels, each in label order
Duplicates = Literal["together", "as they fall"]


@dataclass(frozen=True)
class Dataset:
    """n labelled texts in file order, none blank."""

    texts: list[str]
    labels: Indexes  # (n,), into `names`
    names: tuple[str, ...]  # in label order
    rows: Indexes  # (n,), as a spreadsheet counts them
    notices: tuple[str, ...] = ()  # what was found and mended, one sentence each
    columns: tuple[str, ...] = ("sentence", "label")
    source: str = "the table"

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Indexes) -> "Dataset":
        """The rows at `index`, in that order."""
        return replace(self, texts=[self.texts[i] for i in index], labels=self.labels[index], rows=self.rows[index])


class Splits(NamedTuple):
    """Three disjoint parts of the labelled texts, and what was done to get them."""

    train: Dataset
    validation: Dataset
    test: Dataset
    notices: tuple[str, ...] = ()


def label_texts(column: pl.Series, known: Sequence[str] = ()) -> list[str]:
    """Each label as its name, empty where blank: strings without spaces around them, whole numbers in plain digits.

    Numbers lose `.0` and leading zeros where all labels are whole numbers, or, given `known` labels, if known only so.
    """
    column = column.fill_nan(None) if column.dtype.is_float() else column
    written = from_spreadsheets(column.cast(pl.String)).str.strip_chars().fill_null("").to_list()
    present = set(written) - {""}
    plain = {label: str(int(label.split(".")[0])) for label in present if re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", label)}
    if known:
        plain = {label: number for label, number in plain.items() if label not in known and number in known}
    elif len(plain) < len(present):
        plain = {}
    return [plain.get(label, label) for label in written]


def label_order(labels: set[str]) -> tuple[str, ...]:
    """All labels in the one order used everywhere: numbers numerically, strings lexically."""
    numeric = all(re.fullmatch(r"-?\d{1,4000}", label) for label in labels)  # Python reads no longer numbers
    return tuple(sorted(labels, key=lambda label: (int(label) if numeric else 0, label)))


def shown(text: str, most: int = 40) -> str:
    """A label or text as messages quote it."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def text_key(text: str) -> str:
    """What makes two texts duplicates: the same words, whatever the spaces and capitals."""
    return " ".join(text.split()).casefold()


def load(
    source: str, text: str | None = None, label: str | None = None, *, known: Namings = (), least_rows: int = MIN_ROWS
) -> Dataset:
    """Read and check a table of labelled texts: a path, an hf:// address, or `sample`; columns not named are found.

    `known` are ways to name the labels: the first that fits is read, the last shown. A `DataError` has every problem.
    """
    path = resolve_path(source)
    table, columns = read_columns(path, text=text, label=label)
    texts = from_spreadsheets(table[columns[0]].cast(pl.String)).fill_null("").to_list()
    readings = [(names, label_texts(table[columns[1]], names)) for names in known or [()]]
    names, labels = min(readings, key=lambda reading: len(set(reading[1]) - {"", *reading[0]}))
    pairs = zip(texts, labels, strict=True)
    lacking = np.array(["text" if not one.strip() else "" if name else "label" for one, name in pairs])
    rows = np.arange(len(texts)) + (2 if is_delimited(path) else 1)  # as a spreadsheet counts: the header is row 1
    notices = list[str]()
    for what in ("text", "label"):
        if empty := rows[lacking == what].tolist():
            notices.append(f"{path}: dropped {count_of(len(empty), 'row')} with an empty {what} ({name_rows(empty)}).")
    kept = np.flatnonzero(lacking == "")
    rows, texts, labels = rows[kept], [texts[i] for i in kept], [labels[i] for i in kept]
    present = set(labels)
    too_few = f"{path}: has {count_of(len(texts), 'usable row')}, and at least {least_rows} are needed."
    problems = [too_few] if len(texts) < least_rows else []
    if not known:
        known = [names := label_order(present)]
        if len(names) == 1:
            problems.append(f"{path}: every row has the label {shown(names[0])}; at least two labels are needed.")
        elif len(names) > max(2, len(texts) // 2):
            many = f"the column {columns[1]!r} has {len(names):,} different values in {len(texts):,} rows"
            problems.append(f"{path}: {many}, so it is no label. Choose the label's column with --label COLUMN.")
    trained_on = ", ".join(names)
    for one in sorted(present - set(names)):
        where = name_rows([row for row, name in zip(rows.tolist(), labels, strict=True) if name == one])
        problems.append(f"{path}: the label {shown(one)} ({where}) is not one of those trained on: {trained_on}.")
    if problems:
        raise DataError(problems)
    place = {name: i for i, name in enumerate(names)}
    if any(present <= set(other) and any(other[place[one]] != one for one in present) for other in known):
        not_so = f"not as the names shown for them ({', '.join(known[-1])})"
        notices.append(f"{path}: its labels are read as those trained on ({trained_on}), {not_so}.")
    found = Counter(key for key, _ in dict.fromkeys(zip(map(text_key, texts), labels, strict=True)))
    if repeats := len(texts) - len(found):
        notices.append(f"{path}: {repeats:,} row{'s repeat' if repeats != 1 else ' repeats'} an earlier row's text.")
    if conflicts := [key for key, labels in found.items() if labels > 1]:
        stand = f"{count_of(len(conflicts), 'text')} stand{'s' if len(conflicts) == 1 else ''} there"
        notices.append(f"{path}: {stand} with different labels (for example {shown(conflicts[0], 60)}).")
    indexes = np.array([place[one] for one in labels])
    return Dataset(texts, indexes, tuple(known[-1]), rows, tuple(notices), columns, path)


def load_texts(source: str, text: str | None = None) -> list[str]:
    """The texts of a table that need not be labelled, blank ones left out; a `DataError` if there are none."""
    path = resolve_path(source)
    table, (column,) = read_columns(path, text=text)
    texts = [value for value in table[column].cast(pl.String).to_list() if value and value.strip()]
    if not texts:
        raise DataError(f"{path}: has no text in the column {column!r}.")
    return texts


def split(
    dataset: Dataset, validation: Dataset | None, test: Dataset | None, *, seed: int, duplicates: Duplicates
) -> Splits:
    """Train, validation and test parts: 70:15:15 as the article does it, or the tables given.

    Scikit-learn's stratified `train_test_split` takes 30% off and halves that with the same seed, or takes 15 of 85 if
    one table is given. `duplicates="together"` then moves all copies of a text to one part, if possible to training.
    """
    given = {name: table for name, table in (("validation", validation), ("test", test)) if table is not None}
    parts = {"train": np.arange(len(dataset))}
    if not given:
        parts["train"], rest = _cut(dataset, parts["train"], 0.3, seed)
        parts["validation"], parts["test"] = _cut(dataset, rest, 0.5, seed)
    elif len(given) == 1:
        missing = "test" if "validation" in given else "validation"
        parts["train"], parts[missing] = _cut(dataset, parts["train"], round(len(dataset) * 15 / 85), seed)
    notices = [notice for table in (dataset, *given.values()) for notice in table.notices]
    rows = np.concatenate(list(parts.values()))
    old = np.repeat(list(parts), [len(part) for part in parts.values()])
    home: dict[str, str] = {}  # of each text, the first part that has it
    new = np.array([home.setdefault(text_key(dataset.texts[i]), part) for i, part in zip(rows, old, strict=True)])
    if duplicates == "together" and (moved := int((new != old).sum())):
        notices.append(f"{count_of(moved, 'row')} moved so that copies of a text share one part.")
        parts = {name: rows[new == name] for name in parts}
        for name, part in parts.items():
            if not len(part):
                raise DataError(f"{dataset.source}: too many rows repeat another's text: nothing is left for {name}.")
            if lost := [shown(label) for i, label in enumerate(dataset.names) if i not in dataset.labels[part]]:
                notices.append(f"After that, no row in the {name} part has the label {', '.join(lost[:6])}.")
    for name, table in given.items():
        if leaked := sum(home.get(text_key(text)) == "train" for text in table.texts):
            stand = f"{leaked:,} of the {len(table):,} {name} texts also stand{'s' if leaked == 1 else ''}"
            notices.append(f"{stand} in the training table: the {name} score may flatter.")
    return Splits(**{name: dataset.take(part) for name, part in parts.items()}, **given, notices=tuple(notices))


def _cut(dataset: Dataset, rows: Indexes, share: float, seed: int) -> tuple[Indexes, Indexes]:
    from sklearn.model_selection import train_test_split

    try:
        kept, off = train_test_split(rows, random_state=seed, test_size=share, stratify=dataset.labels[rows])
        if any(len(np.unique(dataset.labels[side])) < len(dataset.names) for side in (kept, off)):
            raise ValueError("a label is not on both sides")
    except ValueError as error:
        counts = np.bincount(dataset.labels, minlength=len(dataset.names))
        rarest = [i for i in np.argsort(counts, kind="stable").tolist() if counts[i] < 7] or [int(counts.argmin())]
        named = ", ".join(f"{shown(dataset.names[i])} has {count_of(counts[i], 'row')}" for i in rarest[:6])
        more = f" (and {len(rarest) - 6:,} more labels are as rare)" if len(rarest) > 6 else ""
        why = f"too few rows to put each label in training, validation and test: the label {named}{more}"
        mend = "Merge it with another label, add rows, or give files with --validation and --test."
        raise DataError(f"{dataset.source}: {why}. {mend}") from error
    return kept, off
