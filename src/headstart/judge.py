"""What a classifier says of the test part, or of another table, to all that is told of it.

This room knows which numbers go together. It knows nothing of how a model comes to its answers, and computes none of
the numbers itself.
"""

from typing import Any

import numpy as np
import torch

from headstart import data, metrics, tables
from headstart.config import Calibration
from headstart.data import Dataset, Splits
from headstart.metrics import Labels, Shares
from headstart.predict import Predictor, probabilities_of

Json = dict[str, Any]
MISTAKES = 8  # the most confident ones that are shown
SURE = 0.95  # who contradicts a label so confidently has often found a wrong label


def judge(
    splits: Splits, held: torch.Tensor, tested: torch.Tensor, calibration: Calibration
) -> tuple[Json, Json, Shares]:
    """Judge (n, labels) logits of the validation part, on which a temperature is fitted, and of the test part.

    Returns the test's part of metrics.json, what only the report shows, and the test part's (n, labels) probabilities.
    """
    train, validation, test, *_ = splits
    names, truth = train.names, test.labels
    heat = metrics.temperature(held.double().numpy(), validation.labels) if calibration == "temperature" else 1.0
    raw, said = (probabilities_of(tested / degrees) for degrees in (1.0, heat))
    predicted, confidence = said.argmax(axis=1), said.max(axis=1)
    right = predicted == truth
    numbers = metrics.evaluate(said, truth, names)
    others = metrics.baselines(train.texts, train.labels, test.texts)
    after, before = numbers["ece"], metrics.calibration_error(raw, truth)
    intervals = metrics.f1_intervals(numbers["confusion_matrix"])
    found: Json = {
        "test": numbers,
        "validation": metrics.evaluate(probabilities_of(held / heat), validation.labels, names),
        "baselines": {name: metrics.scores(other, truth) for name, other in others.items()},
        "comparisons": {name: metrics.comparison(predicted, other, truth) for name, other in others.items()},
        "intervals": {**intervals, "f1": dict(zip(names, intervals["f1"], strict=True))},
        "calibration": {"method": calibration, "temperature": heat, "ece_before": before, "ece_after": after},
        "coverage": metrics.coverage(confidence, right),
        "slices": metrics.slices(test.texts, truth, right, names, train.texts),
        "contradicted": int((confidence[~right] >= SURE).sum()),
    }
    figures = {
        "reliability": {"before": metrics.reliability(raw, truth), "after": metrics.reliability(said, truth)},
        "precision_recall": metrics.precision_recall(said, truth),
        "mistakes": mistakes(test, predicted, confidence),
    }
    return found, figures, said


def mistakes(test: Dataset, predicted: Labels, confidence: Shares) -> list[Json]:
    """The most confident wrong answers: their row, text, label, prediction and confidence."""
    wrong = np.flatnonzero(predicted != test.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES].tolist()
    return [
        {
            "row": int(test.rows[i]),
            "text": test.texts[i],
            "label": test.names[test.labels[i]],
            "prediction": test.names[predicted[i]],
            "confidence": float(confidence[i]),
        }
        for i in worst
    ]


def evaluate(
    predictor: Predictor, source: str, text: str | None = None, label: str | None = None
) -> tuple[Json, list[str]]:
    """Test a classifier on a table labelled all as in training, or all as the run shows labels; else a `DataError`.

    Returns its numbers (see `metrics.evaluate`), and a sentence for each thing found in the table.
    """
    info, names = predictor.classifier.info, predictor.names
    columns = tables.scan(tables.resolve_path(source)).collect_schema().names()
    usual = (name if name in columns else None for name in info.get("columns", (None, None)))
    text, label = (given or trained for given, trained in zip((text, label), usual, strict=True))
    table = data.load(source, text, label, known=(info.get("labels", names), names), least_rows=1)
    scores = predictor.score(table.texts, progress="scoring")
    notices = list(table.notices)
    if cut := int(scores.cut.sum()):
        notices.append(f"{cut:,} of {len(table):,} texts were cut to {predictor.classifier.max_length} tokens.")
    return metrics.evaluate(scores.probabilities, table.labels, names), notices
