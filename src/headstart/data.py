"""Frames to a checked `Dataset`: labels and their order, blank and repeated rows, and the splits. No file formats."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.config import MIN_ROWS, Problem, ProblemChoice
from headstart.errors import DataError, count_of
from headstart.tables import from_spreadsheets, is_delimited, name_rows, read_columns, resolve_path

Indexes = NDArray[np.int64]
Namings = Sequence[Sequence[str]]  # ways to name the same labels, each in label order
Duplicates = Literal["together", "as they fall"]
SEVERAL = "|"  # stands between the labels of a text; alone, it says that a text has none
STARS = ("1", "2", "3", "4", "5")
FEW = 7  # rows that a 70:15:15 split needs of a label


@dataclass(frozen=True)
class Dataset:
    """n labelled texts in file order, none blank."""

    texts: list[str]
    labels: Indexes  # (n,), into `names`; (n, labels) of 0 and 1 where a text may have several
    names: tuple[str, ...]  # in label order
    rows: Indexes  # (n,), as a spreadsheet counts them
    notices: tuple[str, ...] = ()  # what was found and mended, one sentence each
    columns: tuple[str, ...] = ("sentence", "label")
    source: str = "the table"
    problem: Problem = "single"
    weights: NDArray[np.float32] | None = None  # (n,), of the texts in the loss; None: 1 each

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Indexes) -> "Dataset":
        """The rows at `index`, in that order."""
        weights = None if self.weights is None else self.weights[index]
        part = replace(self, texts=[self.texts[i] for i in index], labels=self.labels[index], rows=self.rows[index])
        return replace(part, weights=weights)

    @property
    def counts(self) -> Indexes:
        """(labels,) texts of each label."""
        several = self.labels.ndim == 2
        return self.labels.sum(axis=0) if several else np.bincount(self.labels, minlength=len(self.names))

    @property
    def written(self) -> list[str]:
        """Each text's label, or labels, as a table has it."""
        return written(self.labels, self.names)


def indicators(labels: Indexes, classes: int) -> Indexes:
    """Label indexes, (n,) or as they are returned, as (n, classes) of 0 and 1."""
    return labels if labels.ndim == 2 else np.eye(classes, dtype=np.int64)[labels]


def written(labels: Indexes, names: Sequence[str]) -> list[str]:
    """(n,) label indexes, or (n, labels) of 0 and 1, as a table has them."""
    if labels.ndim == 1:
        return [names[i] for i in labels.tolist()]
    return [SEVERAL.join(names[i] for i in np.flatnonzero(row).tolist()) for row in labels]


def strata(labels: Indexes) -> Indexes:
    """(n,) classes to stratify by: of several labels the rarest; classes of a few texts join the largest."""
    if labels.ndim == 1:
        return labels
    counts = labels.sum(axis=0)
    rarest = np.where(labels == 1, counts, len(labels)).argmin(axis=1)
    classes, where, sizes = np.unique(
        np.where(labels.any(axis=1), rarest, len(counts)), return_inverse=True, return_counts=True
    )
    return np.where(sizes[where] < FEW, classes[sizes.argmax()], classes[where])


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


def is_number(label: str) -> bool:
    """Whether a label is a whole number, of at most as many digits as Python reads."""
    return re.fullmatch(r"-?\d{1,4000}", label) is not None


def label_order(labels: set[str]) -> tuple[str, ...]:
    """All labels in the one order used everywhere: numbers numerically, strings lexically."""
    numeric = all(map(is_number, labels))
    return tuple(sorted(labels, key=lambda label: (int(label) if numeric else 0, label)))


def shown(text: str, most: int = 40) -> str:
    """A label or text as messages quote it."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def text_key(text: str) -> str:
    """What makes two texts duplicates: the same words, whatever the spaces and capitals."""
    return " ".join(text.split()).casefold()


def label_sets(column: pl.Series, known: Sequence[str] = ()) -> list[tuple[str, ...] | None]:
    """Each text's labels as `label_texts` names them, of a column of lists or of `a|b`; None where blank."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not column.dtype.is_nested():
        stripped = column.cast(pl.String).str.strip_chars()
        column = stripped.set(stripped == "", None).str.split(SEVERAL)
    sizes = column.list.len().fill_null(0).to_list()
    flat = iter(label_texts(column.filter(column.list.len() > 0).explode(), known))
    found = [tuple(dict.fromkeys(filter(None, (next(flat) for _ in range(size))))) for size in sizes]
    return [None if blank else names for names, blank in zip(found, column.is_null(), strict=True)]


def problem_of(column: pl.Series) -> Problem:
    """The kind of problem that a column of labels looks like.

    A `|` parts labels if its parts come again in other cells; a single label may have one in its name.
    """
    if column.dtype.is_nested():
        return "multi"
    if column.dtype == pl.String and column.str.contains(SEVERAL, literal=True).any():
        cells = {frozenset(one) for one in label_sets(column) if one is not None}
        return "multi" if len(frozenset().union(*cells)) <= len(cells) else "single"
    return "ordered" if set(label_texts(column)) - {""} == set(STARS) else "single"


def load(
    source: str,
    text: str | None = None,
    label: str | None = None,
    *,
    problem: ProblemChoice = "auto",
    known: Namings = (),
    least_rows: int = MIN_ROWS,
) -> Dataset:
    """Read and check a table of labelled texts: a path, an hf:// address, or `sample`; columns not named are found.

    `known` are ways to name the labels: the first that fits is read, the last shown. A `DataError` has every problem.
    """
    path = resolve_path(source)
    table, columns = read_columns(path, text=text, label=label)
    texts = from_spreadsheets(table[columns[0]].cast(pl.String)).fill_null("").to_list()
    column = table[columns[1]]
    kind = problem_of(column) if problem == "auto" else problem
    if column.dtype.is_nested() and kind != "multi":
        raise DataError(f"{path}: the column {columns[1]!r} holds lists, and each text was to have one label.")
    if kind == "multi":
        readings = [(names, label_sets(column, names)) for names in known or [()]]
    else:
        alone = [(names, label_texts(column, names)) for names in known or [()]]
        readings = [(names, [(one,) if one else None for one in found]) for names, found in alone]
    names, labels = min(readings, key=lambda reading: len(present_in(reading[1]) - set(reading[0])))
    pairs = zip(texts, labels, strict=True)
    lacking = np.array(["text" if not one.strip() else "label" if own is None else "" for one, own in pairs])
    rows = np.arange(len(texts)) + (2 if is_delimited(path) else 1)  # as a spreadsheet counts: the header is row 1
    notices = list[str]()
    for what in ("text", "label"):
        if empty := rows[lacking == what].tolist():
            notices.append(f"{path}: dropped {count_of(len(empty), 'row')} with an empty {what} ({name_rows(empty)}).")
    kept = np.flatnonzero(lacking == "")
    rows, texts, own = rows[kept], [texts[i] for i in kept], [labels[i] or () for i in kept]
    present = present_in(own)
    if kind == "multi" and problem == "auto" and not column.dtype.is_nested():
        notices.append(f"{path}: {SEVERAL!r} parts a text's labels (with --problem single each cell is one label).")
    elif problem == "auto" and any(SEVERAL in one for one in present):
        notices.append(
            f"{path}: {SEVERAL!r} is part of a label's name (with --problem multi it parts a text's labels)."
        )
    too_few = f"{path}: has {count_of(len(texts), 'usable row')}, and at least {least_rows} are needed."
    problems = [too_few] if len(texts) < least_rows else []
    if not known:
        known = [names := label_order(present)]
        if len(names) < 2:
            what = f"every row has the label {shown(names[0])}" if names else "no row has a label"
            problems.append(f"{path}: {what}; at least two labels are needed.")
        elif kind == "ordered" and not all(map(is_number, names)):
            why = f"--problem ordered takes whole numbers as labels, such as 1 to 5, not {', '.join(names[:6])}"
            problems.append(f"{path}: {why}.")
        elif len(names) > max(2, len(texts) // 2):
            many = f"the column {columns[1]!r} has {len(names):,} different values in {len(texts):,} rows"
            problems.append(f"{path}: {many}, so it is no label. Choose the label's column with --label COLUMN.")
    trained_on = ", ".join(names)
    for one in sorted(present - set(names)):
        where = name_rows([row for row, held in zip(rows.tolist(), own, strict=True) if one in held])
        problems.append(f"{path}: the label {shown(one)} ({where}) is not one of those trained on: {trained_on}.")
    if problems:
        raise DataError(problems)
    place = {name: i for i, name in enumerate(names)}
    if any(present <= set(other) and any(other[place[one]] != one for one in present) for other in known):
        not_so = f"not as the names shown for them ({', '.join(known[-1])})"
        notices.append(f"{path}: its labels are read as those trained on ({trained_on}), {not_so}.")
    found = Counter(key for key, _ in dict.fromkeys(zip(map(text_key, texts), map(frozenset, own), strict=True)))
    if repeats := len(texts) - len(found):
        notices.append(f"{path}: {repeats:,} row{'s repeat' if repeats != 1 else ' repeats'} an earlier row's text.")
    if conflicts := [key for key, labels in found.items() if labels > 1]:
        stand = f"{count_of(len(conflicts), 'text')} stand{'s' if len(conflicts) == 1 else ''} there"
        notices.append(f"{path}: {stand} with different labels (for example {shown(conflicts[0], 60)}).")
    indexes = np.array([place[one] for one, *_ in own]) if kind != "multi" else np.zeros((len(own), len(names)), int)
    if kind == "multi":
        indexes[np.repeat(np.arange(len(own)), list(map(len, own))), [place[one] for held in own for one in held]] = 1
    return Dataset(texts, indexes, tuple(known[-1]), rows, tuple(notices), columns, path, kind)


def present_in(labels: Sequence[Sequence[str] | None]) -> set[str]:
    """All labels that stand in a column."""
    return {one for own in labels for one in own or ()}


def load_texts(source: str, text: str | None = None) -> list[str]:
    """The texts of a table that need not be labelled, blank ones left out; a `DataError` if there are none."""
    path = resolve_path(source)
    table, (column,) = read_columns(path, text=text)
    texts = [value for value in table[column].cast(pl.String).to_list() if value and value.strip()]
    if not texts:
        raise DataError(f"{path}: has no text in the column {column!r}.")
    return texts


def split(
    dataset: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    *,
    seed: int,
    duplicates: Duplicates,
    held: float = 15 / 85,
) -> Splits:
    """Train, validation and test parts: 70:15:15 as the article does it, or the tables given.

    Scikit-learn's stratified `train_test_split` takes 30% off and halves that with the same seed, or takes
    the share `held` if one table is given. `duplicates="together"` then moves all copies of a text to one part, if
    possible to training.
    """
    given = {name: table for name, table in (("validation", validation), ("test", test)) if table is not None}
    parts = {"train": np.arange(len(dataset))}
    if not given:
        parts["train"], rest = _cut(dataset, parts["train"], 0.3, seed)
        parts["validation"], parts["test"] = _cut(dataset, rest, 0.5, seed)
    elif len(given) == 1:
        missing = "test" if "validation" in given else "validation"
        parts["train"], parts[missing] = _cut(dataset, parts["train"], round(len(dataset) * held), seed)
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
            counts = dataset.take(part).counts
            if lost := [shown(label) for label, count in zip(dataset.names, counts, strict=True) if not count]:
                notices.append(f"After that, no row in the {name} part has the label {', '.join(lost[:6])}.")
    for name, table in given.items():
        if leaked := sum(home.get(text_key(text)) == "train" for text in table.texts):
            stand = f"{leaked:,} of the {len(table):,} {name} texts also stand{'s' if leaked == 1 else ''}"
            notices.append(f"{stand} in the training table: the {name} score may flatter.")
    return Splits(**{name: dataset.take(part) for name, part in parts.items()}, **given, notices=tuple(notices))


def _cut(dataset: Dataset, rows: Indexes, share: float, seed: int) -> tuple[Indexes, Indexes]:
    from sklearn.model_selection import train_test_split

    try:
        kept, off = train_test_split(rows, random_state=seed, test_size=share, stratify=strata(dataset.labels[rows]))
        if not all(dataset.take(side).counts.all() for side in (kept, off)):
            raise ValueError("a label is not on both sides")
    except ValueError as error:
        counts = dataset.counts
        rarest = [i for i in np.argsort(counts, kind="stable").tolist() if counts[i] < FEW] or [int(counts.argmin())]
        named = ", ".join(f"{shown(dataset.names[i])} has {count_of(counts[i], 'row')}" for i in rarest[:6])
        more = f" (and {len(rarest) - 6:,} more labels are as rare)" if len(rarest) > 6 else ""
        why = f"too few rows to put each label in training, validation and test: the label {named}{more}"
        mend = "Merge it with another label, add rows, or give files with --validation and --test."
        raise DataError(f"{dataset.source}: {why}. {mend}") from error
    return kept, off
