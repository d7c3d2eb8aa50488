"""Truth and probabilities to numbers and intervals; the baselines they stand beside.

Everything here is scikit-learn and scipy where they have it. This room knows no model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.errors import printable

ECE_BINS = 15


def evaluate(probabilities: NDArray[np.float64], truth: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """All numbers of one part of the data, as `metrics.json` has them.

    Args:
        probabilities: (n, labels), rows sum to 1.
        truth: (n,) label indexes.
        names: the labels in label order.
    """
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    classes = range(len(names))
    predicted = probabilities.argmax(axis=1)
    correct = int((predicted == truth).sum())
    scores = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    per_label = {
        name: {"precision": precision, "recall": recall, "f1": f1, "support": int(support)}
        for name, (precision, recall, f1, support) in zip(names, np.stack(scores, axis=1).tolist(), strict=True)
    }
    return {
        "n": len(truth),
        "accuracy": correct / len(truth),
        "accuracy_ci95": list(accuracy_interval(correct, len(truth))),
        "macro_f1": float(np.mean([one["f1"] for one in per_label.values() if one["support"]])),
        "log_loss": float(log_loss(truth, probabilities, labels=classes)),
        "ece": calibration_error(probabilities, truth),
        "per_label": per_label,
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
    gaps = (probabilities.argmax(axis=1) == truth) - confidence
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return float(np.abs(np.bincount(bins, gaps)).sum() / len(truth))


def report_text(probabilities: NDArray[np.float64], truth: NDArray[np.int64], names: Sequence[str]) -> str:
    """scikit-learn's classification report; a label has one line whatever is in its name."""
    from sklearn.metrics import classification_report

    shown, classes = list(map(printable, names)), range(len(names))
    predicted = probabilities.argmax(axis=1)
    return str(classification_report(truth, predicted, labels=classes, target_names=shown, digits=3, zero_division=0.0))


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
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    majority = DummyClassifier(strategy="most_frequent").fit(train_texts, train_labels)
    tfidf = make_pipeline(
        # Single characters are words in some languages, so the default pattern of two or more will not do.
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(C=10.0, solver="sag", max_iter=1000, random_state=0),
    )
    try:
        tfidf.fit(train_texts, train_labels)
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        tfidf = majority  # texts without a single word: nothing for TF-IDF to go by
    scores = {}
    for name, model in (("majority", majority), ("tfidf_logreg", tfidf)):
        said = model.predict(test_texts)
        f1 = f1_score(test_labels, said, labels=np.unique(test_labels), average="macro", zero_division=0.0)
        scores[name] = {"accuracy": float((said == test_labels).mean()), "macro_f1": float(f1)}
    return scores
