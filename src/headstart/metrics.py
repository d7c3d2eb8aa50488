"""Truth and probabilities to numbers and intervals, beside baselines: scikit-learn's and scipy's where they have it."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.config import Problem
from headstart.data import indicators, is_number
from headstart.errors import printable
from headstart.predict import decide

ECE_BINS = 15
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
PRIOR = 0.5  # standard deviation of the logarithm of what logits are multiplied by, and of what is added to them
LEAST_POSITIVE = 5  # validation texts of a label, with fewer of which its threshold stays at one half
DRAWS, POINTS, LEAST_ROWS = 10_000, 60, 20
WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
NEGATION = re.compile(r"(?i)\b(?:not?|never|none|nobody|nothing|nowhere|neither|nor|cannot|without)\b|n\s?['\u2019]t\b")
Labels = NDArray[np.int64]  # (n,) label indexes, or (n, labels) of 0 and 1 where a text may have several
Shares = NDArray[np.float64]  # (n, labels) probabilities


def evaluate(
    probabilities: Shares,
    truth: Labels,
    names: Sequence[str],
    problem: Problem = "single",
    thresholds: Sequence[float] = (),
) -> dict[str, Any]:
    """The numbers of `metrics.json`, from (n, labels) probabilities, true labels, names in label order.

    With several labels a text accuracy is the share of texts whose labels are all right; the confusion matrix is then
    one of two rows (texts without the label, texts with it) for each label.
    """
    from sklearn import metrics

    several, classes = problem == "multi", range(len(names))
    said, confidence = decide(probabilities, thresholds)
    right = are_right(said, truth)
    columns = metrics.precision_recall_fscore_support(truth, said, labels=classes, zero_division=0.0)
    rows = pl.DataFrame(columns, schema=["precision", "recall", "f1", "support"]).to_dicts()
    if several:
        shares, own = np.stack([1 - probabilities, probabilities], axis=-1).reshape(-1, 2), truth.flatten()
        more: dict[str, Any] = {"micro_f1": float(metrics.f1_score(truth, said, average="micro", zero_division=0.0))}
        more |= {"log_loss": float(metrics.log_loss(own, shares, labels=(0, 1))), "thresholds": list(thresholds)}
        matrix = metrics.multilabel_confusion_matrix(truth, said)
    else:
        more = {"log_loss": float(metrics.log_loss(truth, probabilities, labels=classes))}
        matrix = metrics.confusion_matrix(truth, said, labels=classes)
    if problem == "ordered":
        grades = np.array(names, np.float64) if all(map(is_number, names)) else np.arange(len(names))
        more["mean_absolute_error"] = float(np.abs(grades[said] - grades[truth]).mean())
        is_defined = len(np.unique([truth, said])) > 1
        kappa = metrics.cohen_kappa_score(truth, said, labels=classes, weights="quadratic") if is_defined else 0.0
        more["quadratic_kappa"] = float(kappa)
    return {
        "n": len(truth),
        **scores(said, truth),
        "accuracy_ci95": accuracy_interval(int(right.sum()), len(truth)),
        **more,
        "ece": calibration_error(confidence, right),
        "per_label": dict(zip(names, rows, strict=True)),
        "confusion_matrix": matrix.tolist(),
        "labels": list(names),
    }


def are_right(said: Labels, truth: Labels) -> NDArray[np.bool_]:
    """(n,) whether each text was given its label, or all its labels and no other."""
    return said == truth if truth.ndim == 1 else (said == truth).all(axis=1)


def accuracy_interval(correct: int, n: int) -> list[float]:
    """Wilson's 95% interval of a share (Wilson 1927), as scipy computes it."""
    from scipy.stats import binomtest

    return [float(end) for end in binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")]


def calibration_error(confidence: Shares, right: NDArray[np.bool_]) -> float:
    """Expected calibration error over 15 equal bins of (n,) confidence (Guo et al. 2017, equation 3)."""
    bins = reliability(confidence, right)
    return sum(one["n"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(right)


def reliability(confidence: Shares, right: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Mean confidence and accuracy in each of 15 equal bins of confidence that has texts, and how many those are."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return [
        {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean()), "n": int(here.sum())}
        for here in (bins == one for one in np.unique(bins))
    ]


class Calibration(NamedTuple):
    """What (n, labels) logits are multiplied by, and what is then added, (labels,) each, to be calibrated."""

    scale: Shares
    shift: Shares

    def __call__(self, logits: Shares) -> Shares:
        """The calibrated logits."""
        return logits * self.scale + self.shift

    def described(self) -> dict[str, Any]:
        """For metrics.json: the temperature that all logits are divided by, or each label's scale and shift."""
        if not self.shift.any() and (self.scale == self.scale[0]).all():
            return {"temperature": float(1 / self.scale[0])}
        return {"scale": self.scale.tolist(), "shift": self.shift.tolist()}


def calibrate(logits: Shares, truth: Labels) -> Calibration:
    """What makes probabilities of (n, labels) logits those that validation texts bear out: the least log loss.

    With one label a text all logits are divided by a temperature (Guo et al. 2017); with several, each label's are
    scaled and shifted (Platt 1999). A normal prior keeps both near what they are where texts are few.
    """
    from scipy.optimize import minimize

    if truth.ndim == 1:
        labels = logits.shape[1]
        return Calibration(np.full(labels, 1 / temperature(logits, truth)), np.zeros(labels))

    def loss(given: Shares, own: Shares, is_it: Labels) -> float:
        margin = np.where(is_it == 1, 1, -1) * (own * math.exp(given[0]) + given[1])
        return float(0.5 * (given**2).sum() / PRIOR**2 + np.logaddexp(0, -margin).sum())

    found = [minimize(loss, np.zeros(2), args=pair).x for pair in zip(logits.T, truth.T, strict=True)]
    logs, shift = np.array(found).T
    return Calibration(np.exp(logs), shift)


def thresholds_of(probabilities: Shares, truth: Labels) -> tuple[float, ...]:
    """For each of several labels, the least probability at which to give it: the best F1 on validation texts."""
    from sklearn.metrics import precision_recall_curve

    found = []
    for share, is_it in zip(probabilities.T, truth.T, strict=True):
        threshold = 0.5
        if is_it.sum() >= LEAST_POSITIVE:
            precision, recall, at = precision_recall_curve(is_it, share)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            best = int(f1[:-1].argmax())
            threshold = float((at[best] + at[best - 1]) / 2) if best else float(at[0])
        found.append(threshold)
    return tuple(found)


def temperature(logits: Shares, truth: Labels) -> float:
    """What to divide (n, labels) logits by so that their softmax is calibrated; on its logarithm there is a prior."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        said = log_softmax(logits / math.exp(log_temperature), axis=1)[np.arange(len(truth)), truth]
        return float(0.5 * (log_temperature / PRIOR) ** 2 - said.sum())

    return math.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x)


def coverage(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """For each least confidence, the share of texts that are answered, and the accuracy on them (None if none is)."""
    rows = []
    for least in CONFIDENCES:
        answered = confidence >= least
        accuracy = float(right[answered].mean()) if answered.any() else None
        rows.append({"min_confidence": least, "coverage": float(answered.mean()), "accuracy": accuracy})
    return rows


def comparison(mine: Labels, other: Labels, truth: Labels) -> dict[str, Any]:
    """By how much predictions are more often right than others, with a 95% interval, and McNemar's exact p."""
    from scipy.stats import binomtest

    right, others = are_right(mine, truth), are_right(other, truth)
    n, one, two = len(truth), int((right & ~others).sum()), int((others & ~right).sum())  # those only one has right
    draws = np.random.default_rng(0).multinomial(n, np.array([one, two, n - one - two]) / n, size=DRAWS)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975))
    p = float(binomtest(one, one + two).pvalue) if one + two else 1.0
    return {"difference": (one - two) / n, "difference_ci95": [float(low), float(high)], "p_value": p}


def f1_intervals(said: Labels, truth: Labels, classes: int) -> dict[str, Any]:
    """95% intervals of macro F1, and of each label's, by the bootstrap over texts."""
    both = np.hstack([indicators(truth, classes), indicators(said, classes)])
    kinds, counts = np.unique(both, axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(truth), counts / counts.sum(), size=DRAWS // 10)
    is_true, is_said = np.float64(kinds[:, :classes]), np.float64(kinds[:, classes:])
    support, f1 = drawn @ is_true, 2 * (drawn @ (is_true * is_said)) / np.maximum(drawn @ (is_true + is_said), 1)
    macro = np.nanmean(np.where(support > 0, f1, np.nan), axis=1)
    ends = [np.quantile(one, (0.025, 0.975), axis=0).T.tolist() for one in (macro, f1)]
    return {"macro_f1": ends[0], "f1": ends[1]}


def precision_recall(probabilities: Shares, truth: Labels) -> list[dict[str, Any]]:
    """For each label against the rest: average precision, and at most `POINTS` points (recall, precision)."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    curves, own = [], indicators(truth, probabilities.shape[1])
    for label in range(probabilities.shape[1]):
        is_it, share = own[:, label] == 1, probabilities[:, label]
        if is_it.any():
            precision, recall, _ = precision_recall_curve(is_it, share)
            some = np.unique(np.linspace(0, len(recall) - 1, POINTS).astype(int))
            points = np.column_stack([recall, precision])[some].tolist()
            curves.append({"label": label, "average": float(average_precision_score(is_it, share)), "points": points})
    return curves


def slices(
    texts: Sequence[str], truth: Labels, right: NDArray[np.bool_], names: Sequence[str], train_texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Accuracy on kinds of texts (by label, length, negation, words unseen in training), the worst first.

    Kinds of fewer than `LEAST_ROWS` texts are left out.
    """
    seen = {word for text in train_texts for word in WORD.findall(text.casefold())}
    words = [WORD.findall(text.casefold()) for text in texts]
    lengths = np.array([len(some) for some in words])
    short, long = np.quantile(lengths, (0.25, 0.75), method="nearest").tolist()
    own = indicators(truth, len(names)) == 1
    kinds = {f"label {name}": own[:, label] for label, name in enumerate(names)}
    kinds |= {f"at most {short} words": lengths <= short, f"at least {long} words": lengths >= long}
    kinds["a negation (not, never, n't, …)"] = np.array([bool(NEGATION.search(text)) for text in texts])
    kinds["a word that training never shows"] = np.array([not seen.issuperset(some) for some in words])
    rows = []
    for kind, here in kinds.items():
        if (n := int(here.sum())) >= LEAST_ROWS:
            correct = int(right[here].sum())
            rows.append(
                {"slice": kind, "n": n, "accuracy": correct / n, "accuracy_ci95": accuracy_interval(correct, n)}
            )
    return sorted(rows, key=lambda row: row["accuracy"])


def report_text(numbers: Mapping[str, Any]) -> str:
    """scikit-learn's classification report of what `evaluate` found; a label has one line whatever is in its name."""
    from sklearn.metrics import classification_report

    shown, counts = list(map(printable, numbers["labels"])), np.array(numbers["confusion_matrix"])
    options: dict[str, Any] = {"target_names": shown, "digits": 3, "zero_division": 0.0}
    if counts.ndim == 2:
        truth, said = (np.repeat(side.ravel(), counts.ravel()) for side in np.indices(counts.shape))
        return str(classification_report(truth, said, labels=range(len(shown)), **options))
    # Each label's column by itself, which is all but the last line, on texts, goes by.
    truth, said = (
        np.transpose([np.repeat(side, one.ravel()) for one in counts]) for side in ((0, 0, 1, 1), (0, 1, 0, 1))
    )
    return str(classification_report(truth, said, **options)).rstrip().rpartition("\n")[0]


def baselines(train_texts: Sequence[str], train_labels: Labels, test_texts: Sequence[str]) -> dict[str, Labels]:
    """What the commonest label, and TF-IDF (words and pairs) with logistic regression, say of the test texts."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    majority = DummyClassifier(strategy="most_frequent")
    # Single characters are words in some languages, so the default pattern of two or more will not do.
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    regression = LogisticRegression(C=10.0, solver="sag", max_iter=1000, random_state=0)
    tfidf = make_pipeline(words, regression if train_labels.ndim == 1 else OneVsRestClassifier(regression))
    worded = any(re.search(r"\w", text) for text in train_texts)  # else there is nothing for TF-IDF to go by
    models = {"majority": majority, "tfidf_logreg": tfidf if worded else majority}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Label .* is present in", category=UserWarning)
        return {
            name: model.fit(train_texts, train_labels).predict(test_texts).astype(np.int64)
            for name, model in models.items()
        }


def scores(said: Labels, truth: Labels) -> dict[str, float]:
    """Accuracy and macro F1 (over the labels that are there) of predictions."""
    from sklearn.metrics import f1_score

    there = np.unique(truth) if truth.ndim == 1 else np.flatnonzero(truth.any(axis=0))
    f1 = f1_score(truth, said, labels=there, average="macro", zero_division=0.0) if len(there) else 0.0
    return {"accuracy": float(are_right(said, truth).mean()), "macro_f1": float(f1)}
