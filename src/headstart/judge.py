"""What a classifier says of the test part, or of another table, to all that is told of it.

This room knows which numbers go together. It knows nothing of how a model comes to its answers, and computes none of
the numbers itself.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart import config, data, metrics, tables
from headstart.data import Dataset, Splits, written
from headstart.metrics import Calibration, Shares
from headstart.predict import Decisions, Predictor, decide, probabilities_of
from headstart.runs import Classifier

Json = dict[str, Any]
MISTAKES = 8  # the most confident ones that are shown
SURE = 0.95  # who contradicts a label so confidently has often found a wrong label


@dataclass(frozen=True)
class Judged:
    """The calibration that was fitted, thresholds (of several labels a text), and the test's part of metrics.json.

    `figures` is what only the report shows, `probabilities` are the test part's, (n, labels).
    """

    calibration: Calibration
    thresholds: tuple[float, ...]
    numbers: Json
    figures: Json
    probabilities: Shares


def calibrated(held: Shares, validation: Dataset, method: config.Calibration) -> tuple[Calibration, tuple[float, ...]]:
    """What to calibrate a classifier by, and its thresholds, from its (n, labels) logits of validation texts."""
    labels = held.shape[1]
    fitted = Calibration(np.ones(labels), np.zeros(labels))
    if method == "temperature":
        fitted = metrics.calibrate(held, validation.labels)
    if validation.problem != "multi":
        return fitted, ()
    return fitted, metrics.thresholds_of(probabilities_of(fitted(held), "multi"), validation.labels)


def judge(splits: Splits, held: Shares, tested: Shares, method: config.Calibration) -> Judged:
    """Judge (n, labels) logits of the validation part, on which the calibration is fitted, and of the test part."""
    train, validation, test, *_ = splits
    names, truth, problem = train.names, test.labels, train.problem
    fitted, thresholds = calibrated(held, validation, method)
    raw, said = probabilities_of(tested, problem), probabilities_of(fitted(tested), problem)
    decided = decide(said, thresholds)
    right, before = metrics.are_right(decided.labels, truth), decide(raw, thresholds and (0.5,) * len(names))
    was_right = metrics.are_right(before.labels, truth)
    numbers = metrics.evaluate(said, truth, names, problem, thresholds)
    own = probabilities_of(fitted(held), problem)
    others = metrics.baselines(train.texts, train.labels, test.texts)
    intervals = metrics.f1_intervals(decided.labels, truth, len(names))
    errors = {"ece_before": metrics.calibration_error(before.confidence, was_right), "ece_after": numbers["ece"]}
    found: Json = {
        "test": numbers,
        "validation": metrics.evaluate(own, validation.labels, names, problem, thresholds),
        "baselines": {name: metrics.scores(other, truth) for name, other in others.items()},
        "comparisons": {name: metrics.comparison(decided.labels, other, truth) for name, other in others.items()},
        "intervals": {**intervals, "f1": dict(zip(names, intervals["f1"], strict=True))},
        "calibration": {"method": method, **fitted.described(), **errors},
        "coverage": metrics.coverage(decided.confidence, right),
        "slices": metrics.slices(test.texts, truth, right, names, train.texts),
        "contradicted": int((decided.confidence[~right] >= SURE).sum()),
    }
    curves = {"before": (before.confidence, was_right), "after": (decided.confidence, right)}
    figures = {
        "reliability": {when: metrics.reliability(*pair) for when, pair in curves.items()},
        "precision_recall": metrics.precision_recall(said, truth),
        "mistakes": mistakes(test, decided),
    }
    return Judged(fitted, thresholds, found, figures, said)


def mistakes(test: Dataset, decided: Decisions) -> list[Json]:
    """The most confident wrong answers: their row, text, label, prediction and confidence."""
    wrong = np.flatnonzero(~metrics.are_right(decided.labels, test.labels))
    worst = wrong[np.argsort(-decided.confidence[wrong], kind="stable")][:MISTAKES]
    some = test.take(worst)
    said = written(decided.labels[worst], test.names)
    columns = (some.rows.tolist(), some.texts, some.written, said, decided.confidence[worst].tolist())
    keys = ("row", "text", "label", "prediction", "confidence")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def labelled(
    classifier: Classifier, source: str, text: str | None = None, label: str | None = None, least_rows: int = 1
) -> Dataset:
    """A table labelled in one of a classifier's `namings`, else a `DataError`; columns not named as in training."""
    columns = tables.scan(tables.resolve_path(source)).collect_schema().names()
    usual = (name if name in columns else None for name in classifier.info.get("columns", (None, None)))
    text, label = (given or trained for given, trained in zip((text, label), usual, strict=True))
    how: Json = {"problem": classifier.problem, "known": classifier.namings, "least_rows": least_rows}
    return data.load(source, text, label, **how)


def evaluate(
    predictor: Predictor, source: str, text: str | None = None, label: str | None = None
) -> tuple[Json, list[str]]:
    """Test a classifier on a table: see `labelled`.

    Returns its numbers (see `metrics.evaluate`), and a sentence for each thing found in the table.
    """
    classifier = predictor.classifier
    table = labelled(classifier, source, text, label)
    scores = predictor.score(table.texts, progress="scoring")
    notices = list(table.notices)
    if cut := int(scores.cut.sum()):
        notices.append(f"{cut:,} of {len(table):,} texts were cut to {classifier.max_length} tokens.")
    about = (classifier.names, classifier.problem, classifier.thresholds)
    return metrics.evaluate(scores.probabilities, table.labels, *about), notices
