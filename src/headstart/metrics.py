"""Truth and probabilities to numbers and intervals; the baselines they stand beside.

Everything here is scikit-learn and scipy where they have it. This room knows no model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ECE_BINS = 15


def evaluate(probabilities: NDArray[np.float64], truth: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """All numbers of one part of the data, as `metrics.json` has them.

    Args:
        probabilities: (n, labels), rows sum to 1.
        truth: (n,) label indexes.
        names: the labels' names in label order.
    """
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    classes = np.arange(len(names))
    predicted = probabilities.argmax(axis=1)
    correct = int((predicted == truth).sum())
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0.0
    )
    return {
        "n": len(truth),
        "accuracy": correct / len(truth),
        "accuracy_ci95": list(accuracy_interval(correct, len(truth))),
        "macro_f1": float(f1[support > 0].mean()),
        "log_loss": float(log_loss(truth, probabilities, labels=classes)),
        "ece": calibration_error(probabilities, truth),
        "per_label": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(names)
        },
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),
        "labels": list(names),
    }


def accuracy_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927), as scipy computes it."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def calibration_error(probabilities: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, equation 3)."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    error = 0.0
    for k in np.unique(bins):
        inside = bins == k
        error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(error)


def report_text(probabilities: NDArray[np.float64], truth: NDArray[np.int64], names: Sequence[str]) -> str:
    """scikit-learn's classification report."""
    from sklearn.metrics import classification_report

    return str(
        classification_report(
            truth,
            probabilities.argmax(axis=1),
            labels=range(len(names)),
            target_names=list(names),
            digits=3,
            zero_division=0.0,
        )
    )


def baselines(
    train_texts: Sequence[str],
    train_labels: NDArray[np.int64],
    test_texts: Sequence[str],
    test_labels: NDArray[np.int64],
) -> dict[str, dict[str, float]]:
    """Scores on test of the commonest label, and of TF-IDF (words and pairs) with logistic regression."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    majority = DummyClassifier(strategy="most_frequent").fit(train_texts, train_labels)
    tfidf = make_pipeline(
        # Single characters are words in some languages, so the default pattern of two or more will not do.
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(max_iter=1000, C=10.0),
    )
    try:
        tfidf.fit(train_texts, train_labels)
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        tfidf = majority  # texts without a single word: nothing for TF-IDF to go by
    return {
        "majority": _score(majority.predict(test_texts), test_labels),
        "tfidf_logreg": _score(tfidf.predict(test_texts), test_labels),
    }


def _score(predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    present = np.unique(truth)
    return {
        "accuracy": float((predicted == truth).mean()),
        "macro_f1": float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0)),
    }
