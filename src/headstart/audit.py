"""What is wrong with a table, before any training: its rows' problems, and labels that a classifier contradicts.

This room knows tables, stored features and out-of-fold probabilities. It changes nothing: a person decides.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
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
from headstart.targets import Targets
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


class Finding(NamedTuple):
    """An issue of a row, by its number: its kind, what more there is to say, and the label it probably should have."""

    row: int
    kind: str
    more: str | None = None
    suggested_label: str | None = None


def audit(config: TrainConfig, out: Path) -> Audit:
    """Audit the table of a configuration, and its texts that stand in `validation` or `test`, too, into a table `out`.

    A `DataError` if a table cannot be read, a `ModelError` without such an encoder, an `InputError` without cleanlab.
    """
    if missing := [name for name in ("cleanlab", "py3langid") if find_spec(name) is None]:
        raise InputError(f"audit needs {' and '.join(missing)}. Install with: pip install 'headstart[audit]'")
    path, ending = resolve_path(config.data), file_format(str(out))
    if out.resolve() == Path(path).resolve():
        raise DataError(f"{out}: is the table itself; choose another --out.")
    table, columns = read_columns(path, text=config.text, label=config.label)
    if set(ADDED) <= set(table.columns):
        table = table.drop(ADDED)  # an earlier audit's
    if there := [name for name in ADDED if name in table.columns]:
        raise DataError(f"{path}: has a column {there[0]!r}, as the audit would add one. Rename it.")
    refuse_nested(path, table.schema, ending)
    dataset = data.load(config.data, config.text, config.label, problem=config.problem)
    if dataset.problem == "multi":
        raise InputError(f"{config.data}: audit takes tables with one label a text, and here a text may have several.")
    given = [name for name in (config.validation, config.test) if name]
    others = {name: data.load(name, config.text, config.label, least_rows=1) for name in given}
    encoder = Encoder(config.model, choose_placement(config.device, config.precision))
    tokens = encoder.tokenizer(dataset.texts, progress="tokenizing")
    most = config.max_length or advise_length(tokens.lengths, limit=encoder.max_length, hidden=encoder.hidden).advised
    features = frozen_features(encoder, encoder.tokenizer.truncate(tokens, most))
    labels = meant_labels(dataset)
    task = Task(encoder, features, features, Targets(labels), Targets(labels), dataset.names, config)
    quality, contradicted = _contradictions(task, dataset)
    rows = np.arange(table.height) + (2 if is_delimited(path) else 1)
    used = np.isin(rows, dataset.rows)
    found = [Finding(row, "blank text or label") for row in rows[~used].tolist()]
    found += [*_misspelt(dataset, labels), *_copies(dataset, others), *_odd_texts(dataset)]
    found += [*_near_copies(dataset, features), *contradicted]
    scores = np.zeros(table.height)
    scores[used] = quality
    ranked = _ranked(table, rows, scores, found)
    written = for_spreadsheets(ranked) if ending in (".csv", ".tsv") else ranked
    with disk_errors(out), whole_file(out) as temporary, open(temporary, "wb") as file:
        write_frames(file, ending, iter([written]), written.clear())
    sizes = np.bincount(dataset.labels, minlength=len(dataset.names)).tolist()
    counts = Counter(one.kind for one in found)
    return Audit(ranked, dict(counts.most_common()), dict(zip(dataset.names, sizes, strict=True)), columns)


def _ranked(table: pl.DataFrame, rows: Labels, scores: Shares, found: Sequence[Finding]) -> pl.DataFrame:
    """The table, whose rows have numbers and scores (NaN: none), with `ADDED`, the worst row first."""
    schema = {"row": pl.Int64, "kind": pl.String, "more": pl.String, "suggested_label": pl.String}
    issue = pl.concat_str("kind", "more", separator=": ", ignore_nulls=True).str.join("; ").alias("issue")
    findings = pl.DataFrame(found, schema, orient="row").group_by("row")
    issues = findings.agg(issue, pl.col("suggested_label").drop_nulls().first())
    numbered = table.with_columns(row=rows, score=pl.Series(scores).fill_nan(None).round(4))
    whole = numbered.join(issues, on="row", how="left").select(*table.columns, *ADDED)
    return whole.sort("score", "row", nulls_last=True)


def _contradictions(task: Task, dataset: Dataset) -> tuple[Shares, list[Finding]]:
    """(n,) quality of each label, 1 being best, by heads that have not seen it, and those that are probably wrong.

    As cleanlab finds them (Northcutt et al. 2021); NaN where a label is too rare to be learnt.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    labels, rows = task.wanted.labels, dataset.rows.tolist()
    counts = np.bincount(labels, minlength=len(task.names))[labels]
    quality, rare = np.full(len(labels), np.nan), np.flatnonzero(counts < FOLDS).tolist()
    found = [Finding(rows[i], "label too rare to be learnt", f"{counts[i]} of it") for i in rare]
    learnt = np.flatnonzero(counts >= FOLDS)
    known, own = np.unique(labels[learnt], return_inverse=True)
    if len(known) < 2:
        return quality, found
    names = tuple(task.names[label] for label in known.tolist())
    part = replace(task, train=task.train.take(learnt), wanted=Targets(own), names=names)
    probabilities = out_of_fold(part, dataset.take(learnt).texts)
    quality[learnt] = get_label_quality_scores(own, probabilities, method="normalized_margin")
    for place in np.flatnonzero(find_label_issues(own, probabilities, n_jobs=1)).tolist():
        found.append(Finding(rows[learnt[place]], WRONG, suggested_label=names[probabilities[place].argmax()]))
    return quality, found


def meant_labels(dataset: Dataset) -> Labels:
    """(n,) label indexes, those that are a rarer spelling of another one read as that."""
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
    return meant[dataset.labels]


def _misspelt(dataset: Dataset, meant: Labels) -> Iterator[Finding]:
    """Labels that are another one's spelling."""
    for i in np.flatnonzero(meant != dataset.labels).tolist():
        name = dataset.names[meant[i]]
        yield Finding(int(dataset.rows[i]), "label spelt otherwise", f"meant is probably {name}", name)


def _copies(dataset: Dataset, others: Mapping[str, Dataset]) -> Iterator[Finding]:
    """Texts that stand in the table more than once, with one label or several, or in another table too."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(dataset.texts):
        groups[text_key(text)].append(i)
    for members in (members for members in groups.values() if len(members) > 1):
        rows = dataset.rows[members].tolist()
        conflict = len(set(dataset.labels[members].tolist())) > 1
        for row in rows if conflict else rows[1:]:
            rest = name_rows([other for other in rows if other != row])
            yield Finding(row, "same text with another label" if conflict else "repeats another row", rest)
    for name, other in others.items():
        for there, text in zip(other.rows.tolist(), other.texts, strict=True):
            for i in groups.get(text_key(text), ()):
                yield Finding(int(dataset.rows[i]), "stands in another file, too", f"{name}, row {there}")


def _odd_texts(dataset: Dataset) -> Iterator[Finding]:
    """Texts without words, much longer than the others, or in another language than most."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    words = np.array([len(WORD.findall(text)) for text in dataset.texts])
    low, middle, high = np.quantile(words, (0.25, 0.5, 0.75))
    longest = max(high + 3 * (high - low), 2 * middle)
    identify = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    said = [identify(text) if sum(map(str.isalpha, text)) >= LEAST_LETTERS else ("", 0.0) for text in dataset.texts]
    usual = Counter(language for language, _ in said if language).most_common(1)
    for row, count, (language, share) in zip(dataset.rows.tolist(), words.tolist(), said, strict=True):
        if not count:
            yield Finding(row, "no word in it")
        elif count > longest:
            yield Finding(row, "much longer than the others", f"{count:,} words, usual are {middle:.0f}")
        if share >= SURE_LANGUAGE and language != usual[0][0]:
            yield Finding(row, "probably another language", f"{language}, most are {usual[0][0]}")


def _near_copies(dataset: Dataset, features: Features) -> Iterator[Finding]:
    """Texts that say nearly the same, in nearly the same words, as an earlier row."""
    vectors = torch.from_numpy(features.columns([features.layout[-1]])[:, 0])
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    for start in range(0, len(vectors), AT_ONCE):
        alike = (vectors[start : start + AT_ONCE] @ vectors[: start + AT_ONCE].T).tril(start - 1)
        cosines, earlier = alike.max(dim=1)
        for i in torch.nonzero(cosines >= NEAR).flatten().tolist():
            pair = [start + i, int(earlier[i])]
            keys = [text_key(dataset.texts[j]) for j in pair]
            one, other = (set(WORD.findall(key)) for key in keys)
            if keys[0] != keys[1] and len(one & other) >= ALIKE * len(one | other):
                row, copied = dataset.rows[pair].tolist()
                yield Finding(row, "nearly repeats another row", name_rows([copied]))


def out_of_fold(task: Task, texts: Sequence[str]) -> Shares:
    """(n, labels) probabilities of a task's n training texts by heads that have not seen them, nor copies of them."""
    order = np.random.default_rng(task.config.seed).permutation(len(texts))
    held, rest = (np.sort(part) for part in np.split(order, [max(1, round(HELD * len(order)))]))
    head = train_head(task.fold(rest, held))
    _, groups = np.unique([text_key(text) for text in texts], return_inverse=True)
    total = np.zeros((len(texts), len(task.names)))
    for repeat in range(REPEATS):
        settings: dict[str, Any] = {"folds": FOLDS, "seed": task.config.seed + repeat}
        total += probabilities_of(in_folds(replace(task, config=replace(task.config, **settings)), head, groups)[0])
    return total / REPEATS
