"""What a classifier said of the test part to all that is told of it: metrics.json and the figures of the report.

This room knows which numbers go together. It knows nothing of models, and computes none of the numbers itself.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from headstart import metrics
from headstart.config import Calibration
from headstart.data import Dataset, Splits
from headstart.metrics import Labels, Shares
from headstart.predict import probabilities_of

Json = dict[str, Any]
MISTAKES = 8  # the most confident ones that are shown
SURE = 0.95  # who contradicts a label so confidently has often found a wrong label


class Judgement(NamedTuple):
    """The test's part of metrics.json, what only the report shows, (n, labels) probabilities, and the temperature."""

    numbers: Json
    figures: Json
    probabilities: Shares
    temperature: float


def judge(splits: Splits, held: torch.Tensor, tested: torch.Tensor, calibration: Calibration) -> Judgement:
    """Judge (n, labels) logits of the validation part, on which a temperature is fitted, and of the test part."""
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
    return Judgement(found, figures, said, heat)


def mistakes(test: Dataset, predicted: Labels, confidence: Shares) -> list[Json]:
    """The most confident wrong answers: their place in the test part, row, text, label, prediction, confidence."""
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
