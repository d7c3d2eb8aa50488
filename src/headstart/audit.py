"""What is wrong with a table, before any training: its rows' problems, and labels that a classifier contradicts.

This room knows tables, stored features and out-of-fold probabilities. It changes nothing: a person decides.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from headstart import data
from headstart.config import TrainConfig
from headstart.data import Dataset, text_key
from headstart.encoder import Encoder, choose_placement
from headstart.errors import DataError, InputError, disk_errors
from headstart.features import Features, frozen_features
from headstart.folders import whole_file
from headstart.metrics import WORD, Labels, Shares
from headstart.predict import probabilities_of, write_frames
from headstart.tables import (
    file_format,
    for_spreadsheets,
    is_delimited,
    name_rows,
    read_columns,
    refuse_nested,
    resolve_path,
)
from headstart.tokens import advise_length
from headstart.trials import Task, in_folds, train_head

ADDED = ("row", "issue", "suggested_label", "score")
WRONG = "label may be wrong"
HELD = 0.15  # of the rows, on which the head is chosen that then goes through the folds
REPEATS = 3  # times that the table is cut into folds, whose probabilities are averaged
FOLDS = 5
NEAR, ALIKE = 0.95, 0.8  # cosine of features, and share of words in common, of texts that nearly repeat each other
SPELT_ALIKE, RARE = 0.85, 0.05  # likeness of a misspelt label to another one, and its count beside that one's
LEAST_LETTERS, SURE_LANGUAGE = 25, 0.9  # shorter texts have no sure language
AT_ONCE = 1024  # rows compared with all others together


class Audit(NamedTuple):
    """A table's columns and `ADDED`, worst rows first, and how many rows have each kind of issue.

    `score` is the out-of-fold probability that speaks for a row's label, against that of the likeliest other (1: sure
    of it, 0: sure of the other), null where a label is too rare to be learnt.
    """

    table: pl.DataFrame
    counts: dict[str, int]
    labels: dict[str, int]
    columns: tuple[str, ...]


class Findings:
    """What is found of each of a table's rows: issues, a label suggested, a score; `places` are the dataset's rows."""

    def __init__(self, places: Sequence[int], rows: int) -> None:
        self.places = places
        self.issues: list[list[str]] = [[] for _ in range(rows)]
        self.suggested: list[str | None] = [None] * rows
        self.scores = np.full(rows, np.nan)
        self.counts: Counter[str] = Counter()
        for place in set(range(rows)) - set(places):
            self.issues[place].append("blank text or label")
            self.counts["blank text or label"] += 1
            self.scores[place] = 0.0

    def add(self, i: int, kind: str, more: str = "") -> None:
        """Note an issue of the dataset's text `i`: its kind, and what more there is to say."""
        self.issues[self.places[i]].append(f"{kind}: {more}" if more else kind)
        self.counts[kind] += 1

    def suggest(self, i: int, label: str) -> None:
        """Suggest a label for text `i`, unless another has been."""
        self.suggested[self.places[i]] = self.suggested[self.places[i]] or label

    def ranked(self, table: pl.DataFrame, first: int) -> pl.DataFrame:
        """The table with `ADDED`, the worst row first; `first` is the number of its first row."""
        rows, issues = np.arange(table.height) + first, ["; ".join(some) or None for some in self.issues]
        scores = pl.Series(self.scores).fill_nan(None).round(4)
        columns = zip(ADDED, (rows, issues, self.suggested, scores), strict=True)
        added = pl.DataFrame(dict(columns), schema_overrides={"issue": pl.String, "suggested_label": pl.String})
        whole = table.with_columns(added.get_columns())
        return whole.sort("score", nulls_last=True, maintain_order=True)


def audit(config: TrainConfig, out: Path) -> Audit:
    """Audit the table of a configuration, and its texts that stand in `validation` or `test`, too, into a table `out`.

    A `DataError` if a table cannot be read, a `ModelError` without such an encoder, an `InputError` without cleanlab.
    """
    path, ending = resolve_path(config.data), file_format(str(out))
    if out.resolve() == Path(path).resolve():
        raise DataError(f"{out}: is the table itself; choose another --out.")
    table, columns = read_columns(path, text=config.text, label=config.label)
    if set(ADDED) <= set(table.columns):
        table = table.drop(ADDED)  # an earlier audit's
    if there := [name for name in ADDED if name in table.columns]:
        raise DataError(f"{path}: has a column {there[0]!r}, as the audit would add one. Rename it.")
    refuse_nested(path, table.schema, ending)
    dataset = data.load(config.data, config.text, config.label)
    given = [name for name in (config.validation, config.test) if name]
    others = {name: data.load(name, config.text, config.label, least_rows=1) for name in given}
    first = 2 if is_delimited(path) else 1
    found = Findings((dataset.rows - first).tolist(), table.height)
    labels = _spellings(dataset, found)
    _copies(dataset, others, found)
    _odd_texts(dataset, found)
    encoder = Encoder(config.model, choose_placement(config.device, config.precision))
    tokens = encoder.tokenizer(dataset.texts, progress="tokenizing")
    most = config.max_length or advise_length(tokens.lengths, limit=encoder.max_length, hidden=encoder.hidden).advised
    features = frozen_features(encoder, encoder.tokenizer.truncate(tokens, most))
    _near_copies(dataset, features, found)
    _contradictions(Task(encoder, features, features, labels, labels, dataset.names, config), dataset.texts, found)
    ranked = found.ranked(table, first)
    written = for_spreadsheets(ranked) if ending in (".csv", ".tsv") else ranked
    with disk_errors(out), whole_file(out) as temporary, open(temporary, "wb") as file:
        write_frames(file, ending, iter([written]), written.clear())
    sizes = np.bincount(dataset.labels, minlength=len(dataset.names)).tolist()
    return Audit(ranked, dict(found.counts.most_common()), dict(zip(dataset.names, sizes, strict=True)), columns)


def _contradictions(task: Task, texts: Sequence[str], found: Findings) -> None:
    """Score each label by what heads say that have not seen it, and note those that are probably wrong."""
    labels = task.train_labels
    counts = np.bincount(labels, minlength=len(task.names))[labels]
    for place in np.flatnonzero(counts < FOLDS).tolist():
        found.add(place, "label too rare to be learnt", f"{counts[place]} of it")
    learnt = np.flatnonzero(counts >= FOLDS)
    known, own = np.unique(labels[learnt], return_inverse=True)
    if len(known) < 2:
        return
    names = tuple(task.names[label] for label in known.tolist())
    part = replace(task, train=task.train.take(learnt), train_labels=own, names=names)
    probabilities = out_of_fold(part, [texts[place] for place in learnt.tolist()])
    quality_and_verdict = _label_quality(own, probabilities)
    for i, quality, wrong, said in zip(learnt.tolist(), *quality_and_verdict, probabilities, strict=True):
        found.scores[found.places[i]] = quality
        if wrong:
            found.add(i, WRONG)
            found.suggest(i, names[said.argmax()])


def _spellings(dataset: Dataset, found: Findings) -> Labels:
    """Note labels that are another one's spelling; (n,) label indexes with those read as meant."""
    counts = Counter(dataset.labels.tolist())
    usual: dict[str, int] = {}  # the commonest label of each spelling without case and punctuation
    meant = np.arange(len(dataset.names))
    for i in sorted(counts, key=lambda i: (-counts[i], i)):
        plain = re.sub(r"[\W_]+", "", dataset.names[i].casefold()) or dataset.names[i]
        near = get_close_matches(plain, usual, n=1, cutoff=SPELT_ALIKE) if plain.isalpha() and len(plain) > 3 else []
        if plain in usual:
            meant[i] = usual[plain]
        elif near and counts[i] <= RARE * counts[usual[near[0]]]:
            meant[i] = usual[near[0]]
        else:
            usual[plain] = i
    for i, label in enumerate(dataset.labels.tolist()):
        if meant[label] != label:
            found.suggest(i, name := dataset.names[meant[label]])
            found.add(i, "label spelt otherwise", f"meant is probably {name}")
    return meant[dataset.labels]


def _copies(dataset: Dataset, others: Mapping[str, Dataset], found: Findings) -> None:
    """Note texts that stand in the table more than once, with one label or several, or in another table too."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(dataset.texts):
        groups[text_key(text)].append(i)
    for members in (members for members in groups.values() if len(members) > 1):
        rows = dataset.rows[members].tolist()
        conflict = len({int(dataset.labels[i]) for i in members}) > 1
        for i in members if conflict else members[1:]:
            rest = name_rows([row for row in rows if row != dataset.rows[i]])
            found.add(i, "same text with another label" if conflict else "repeats another row", rest)
    for name, other in others.items():
        for row, text in zip(other.rows.tolist(), other.texts, strict=True):
            for i in groups.get(text_key(text), ()):
                found.add(i, "stands in another file, too", f"{name}, row {row}")


def _odd_texts(dataset: Dataset, found: Findings) -> None:
    """Note texts without words, much longer than the others, or in another language than most."""
    words = np.array([len(WORD.findall(text)) for text in dataset.texts])
    low, middle, high = np.quantile(words, (0.25, 0.5, 0.75))
    longest = max(high + 3 * (high - low), 2 * middle)
    identify = _identifier()
    said = [identify(text) if sum(map(str.isalpha, text)) >= LEAST_LETTERS else ("", 0.0) for text in dataset.texts]
    usual = Counter(language for language, _ in said if language).most_common(1)
    for i, (count, (language, share)) in enumerate(zip(words.tolist(), said, strict=True)):
        if not count:
            found.add(i, "no word in it")
        elif count > longest:
            found.add(i, "much longer than the others", f"{count:,} words, usual are {middle:.0f}")
        if share >= SURE_LANGUAGE and language != usual[0][0]:
            found.add(i, "probably another language", f"{language}, most are {usual[0][0]}")


def _near_copies(dataset: Dataset, features: Features, found: Findings) -> None:
    """Note texts that say nearly the same, in nearly the same words, as an earlier row."""
    vectors = torch.from_numpy(features.columns([features.layout[-1]])[:, 0])
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    for start in range(0, len(vectors), AT_ONCE):
        alike = (vectors[start : start + AT_ONCE] @ vectors[: start + AT_ONCE].T).tril(start - 1)
        cosines, earlier = alike.max(dim=1)
        for i in torch.nonzero(cosines >= NEAR).flatten().tolist():
            keys = [text_key(dataset.texts[j]) for j in (start + i, int(earlier[i]))]
            one, other = (set(WORD.findall(key)) for key in keys)
            if keys[0] != keys[1] and len(one & other) >= ALIKE * len(one | other):
                found.add(start + i, "nearly repeats another row", name_rows([int(dataset.rows[earlier[i]])]))


def out_of_fold(task: Task, texts: Sequence[str]) -> Shares:
    """(n, labels) probabilities of a task's n training texts by heads that have not seen them, nor copies of them."""
    order = np.random.default_rng(task.config.seed).permutation(len(texts))
    held, rest = (np.sort(part) for part in np.split(order, [max(1, round(HELD * len(order)))]))
    parts = task.train.take(rest), task.train.take(held), task.train_labels[rest], task.train_labels[held]
    head = train_head(Task(task.encoder, *parts, task.names, task.config))
    _, groups = np.unique([text_key(text) for text in texts], return_inverse=True)
    total = np.zeros((len(texts), len(task.names)))
    for repeat in range(REPEATS):
        settings: dict[str, Any] = {"folds": FOLDS, "seed": task.config.seed + repeat}
        total += probabilities_of(in_folds(replace(task, config=replace(task.config, **settings)), head, groups)[0])
    return total / REPEATS


def _label_quality(labels: Labels, probabilities: Shares) -> tuple[Shares, Any]:
    """(n,) quality of each label, 1 being best, and whether cleanlab finds that it is wrong (Northcutt et al. 2021)."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise InputError("audit needs cleanlab. Install it with: pip install 'headstart[audit]'") from error
    quality = get_label_quality_scores(labels, probabilities, method="normalized_margin")
    return quality, find_label_issues(labels, probabilities, n_jobs=1)


def _identifier() -> Any:
    """A function of a text to its language and how sure that is."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError("audit needs py3langid. Install it with: pip install 'headstart[audit]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
