"""Truth and probabilities to numbers and intervals, beside baselines: scikit-learn's and scipy's where they have it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.errors import printable

ECE_BINS = 15
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
PRIOR = 0.5  # standard deviation of the temperature's logarithm, before any text is seen
DRAWS, POINTS, LEAST_ROWS = 10_000, 60, 20
WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
NEGATION = re.compile(r"(?i)\b(?:not?|never|none|nobody|nothing|nowhere|neither|nor|cannot|without)\b|n\s?['\u2019]t\b")
Labels = NDArray[np.int64]  # (n,) label indexes
Shares = NDArray[np.float64]  # (n, labels) probabilities


def evaluate(probabilities: Shares, truth: Labels, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of `metrics.json`, from (n, labels) probabilities, (n,) true label indexes, names in label order."""
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    classes, predicted = range(len(names)), probabilities.argmax(axis=1)
    columns = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    rows = pl.DataFrame(columns, schema=["precision", "recall", "f1", "support"]).to_dicts()
    per_label = dict(zip(names, rows, strict=True))
    return {
        "n": len(truth),
        **scores(predicted, truth),
        "accuracy_ci95": accuracy_interval(int((predicted == truth).sum()), len(truth)),
        "log_loss": float(log_loss(truth, probabilities, labels=classes)),
        "ece": calibration_error(probabilities, truth),
        "per_label": per_label,
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),
        "labels": list(names),
    }


def accuracy_interval(correct: int, n: int) -> list[float]:
    """Wilson's 95% interval of a share (Wilson 1927), as scipy computes it."""
    from scipy.stats import binomtest

    return [float(end) for end in binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")]


def calibration_error(probabilities: Shares, truth: Labels) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, equation 3)."""
    bins = reliability(probabilities, truth)
    return sum(one["n"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(truth)


def reliability(probabilities: Shares, truth: Labels) -> list[dict[str, float]]:
    """Mean confidence and accuracy in each of 15 equal bins of confidence that has texts, and how many those are."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return [
        {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean()), "n": int(here.sum())}
        for here in (bins == one for one in np.unique(bins))
    ]


def temperature(logits: NDArray[np.float64], truth: Labels) -> float:
    """What to divide (n, labels) logits by so that their softmax is calibrated (Guo et al. 2017): the least log loss.

    A normal prior on its logarithm keeps it near 1 where texts are few.
    """
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
    """By how much (n,) predictions are more often right than others, with a 95% interval, and McNemar's exact p."""
    from scipy.stats import binomtest

    right, others = mine == truth, other == truth
    n, one, two = len(truth), int((right & ~others).sum()), int((others & ~right).sum())  # those only one has right
    draws = np.random.default_rng(0).multinomial(n, np.array([one, two, n - one - two]) / n, size=DRAWS)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975))
    p = float(binomtest(one, one + two).pvalue) if one + two else 1.0
    return {"difference": (one - two) / n, "difference_ci95": [float(low), float(high)], "p_value": p}


def f1_intervals(matrix: Sequence[Sequence[int]]) -> dict[str, Any]:
    """95% intervals of macro F1, and of each label's, by the bootstrap: rows are drawn from a confusion matrix."""
    counts = np.array(matrix)
    truth, said = np.nonzero(counts)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts[truth, said] / counts.sum(), size=DRAWS // 10)
    is_true, is_said = (np.float64(side[:, None] == np.arange(len(counts))) for side in (truth, said))
    support, f1 = drawn @ is_true, 2 * (drawn @ (is_true * is_said)) / np.maximum(drawn @ (is_true + is_said), 1)
    macro = np.nanmean(np.where(support > 0, f1, np.nan), axis=1)
    ends = [np.quantile(one, (0.025, 0.975), axis=0).T.tolist() for one in (macro, f1)]
    return {"macro_f1": ends[0], "f1": ends[1]}


def precision_recall(probabilities: Shares, truth: Labels) -> list[dict[str, Any]]:
    """For each label against the rest: average precision, and at most `POINTS` points (recall, precision)."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    curves = []
    for label in range(probabilities.shape[1]):
        is_it, share = truth == label, probabilities[:, label]
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
    kinds = {f"label {name}": truth == label for label, name in enumerate(names)}
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
    truth, said = (np.repeat(side.ravel(), counts.ravel()) for side in np.indices(counts.shape))
    classes = range(len(shown))
    return str(classification_report(truth, said, labels=classes, target_names=shown, digits=3, zero_division=0.0))


def baselines(train_texts: Sequence[str], train_labels: Labels, test_texts: Sequence[str]) -> dict[str, Labels]:
    """What the commonest label, and TF-IDF (words and pairs) with logistic regression, say of the test texts."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    majority = DummyClassifier(strategy="most_frequent")
    # Single characters are words in some languages, so the default pattern of two or more will not do.
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    tfidf = make_pipeline(words, LogisticRegression(C=10.0, solver="sag", max_iter=1000, random_state=0))
    worded = any(re.search(r"\w", text) for text in train_texts)  # else there is nothing for TF-IDF to go by
    models = {"majority": majority, "tfidf_logreg": tfidf if worded else majority}
    return {name: model.fit(train_texts, train_labels).predict(test_texts) for name, model in models.items()}


def scores(said: Labels, truth: Labels) -> dict[str, float]:
    """Accuracy and macro F1 (over the labels that are there) of (n,) predictions."""
    from sklearn.metrics import f1_score

    f1 = f1_score(truth, said, labels=np.unique(truth), average="macro", zero_division=0.0)
    return {"accuracy": float((said == truth).mean()), "macro_f1": float(f1)}
