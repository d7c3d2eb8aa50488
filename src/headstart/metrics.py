"""Truth and probabilities to numbers and intervals, beside baselines: scikit-learn's and scipy's where they have it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.errors import printable

ECE_BINS = 15
Labels = NDArray[np.int64]


def evaluate(probabilities: NDArray[np.float64], truth: Labels, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of `metrics.json`, from (n, labels) probabilities, (n,) true label indexes, names in label order."""
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    classes, predicted = range(len(names)), probabilities.argmax(axis=1)
    correct = int((predicted == truth).sum())
    columns = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    rows = pl.DataFrame(columns, schema=["precision", "recall", "f1", "support"]).to_dicts()
    per_label = dict(zip(names, rows, strict=True))
    return {
        "n": len(truth),
        "accuracy": correct / len(truth),
        "accuracy_ci95": accuracy_interval(correct, len(truth)),
        "macro_f1": float(np.mean([one["f1"] for one in per_label.values() if one["support"]])),
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


def calibration_error(probabilities: NDArray[np.float64], truth: Labels) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, equation 3)."""
    confidence = probabilities.max(axis=1)
    gaps = (probabilities.argmax(axis=1) == truth) - confidence
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return float(np.abs(np.bincount(bins, gaps)).sum() / len(truth))


def report_text(probabilities: NDArray[np.float64], truth: Labels, names: Sequence[str]) -> str:
    """scikit-learn's classification report; a label has one line whatever is in its name."""
    from sklearn.metrics import classification_report

    shown, classes = list(map(printable, names)), range(len(names))
    predicted = probabilities.argmax(axis=1)
    return str(classification_report(truth, predicted, labels=classes, target_names=shown, digits=3, zero_division=0.0))


def baselines(
    train_texts: Sequence[str], train_labels: Labels, test_texts: Sequence[str], test_labels: Labels
) -> dict[str, dict[str, float]]:
    """Scores on test of the commonest label, and of TF-IDF (words and pairs) with logistic regression."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    majority = DummyClassifier(strategy="most_frequent")
    # Single characters are words in some languages, so the default pattern of two or more will not do.
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    tfidf = make_pipeline(words, LogisticRegression(C=10.0, solver="sag", max_iter=1000, random_state=0))
    worded = any(re.search(r"\w", text) for text in train_texts)  # else there is nothing for TF-IDF to go by
    scores = {}
    for name, model in (("majority", majority), ("tfidf_logreg", tfidf if worded else majority)):
        said = model.fit(train_texts, train_labels).predict(test_texts)
        f1 = f1_score(test_labels, said, labels=np.unique(test_labels), average="macro", zero_division=0.0)
        scores[name] = {"accuracy": float((said == test_labels).mean()), "macro_f1": float(f1)}
    return scores
