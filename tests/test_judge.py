"""What is told of a classifier hangs together: one temperature, one set of predictions, the mistakes among them."""

import json

import numpy as np
import pytest
import torch

from headstart import metrics
from headstart.config import Calibration
from headstart.data import Dataset, Splits
from headstart.judge import MISTAKES, Judgement, judge
from headstart.predict import probabilities_of

NAMES = ("bad", "good", "so-so")


def part(n: int, first_row: int) -> Dataset:
    labels = np.arange(n) % 3
    texts = [f"text {i} is {NAMES[label]}" for i, label in enumerate(labels.tolist(), start=first_row)]
    return Dataset(texts, labels, NAMES, np.arange(first_row, first_row + n))


def logits(labels: torch.Tensor, seed: int, sharpness: float) -> torch.Tensor:
    """Right some four times in five, and as much too sure of it as `sharpness` says."""
    noise = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed))
    return sharpness * (noise + 2 * torch.nn.functional.one_hot(labels, 3))


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits(part(60, 2), part(600, 62), part(900, 662))


def judged(splits: Splits, calibration: Calibration, sharpness: float = 4.0) -> tuple[torch.Tensor, Judgement]:
    held, tested = (
        logits(torch.from_numpy(one.labels), seed, sharpness)
        for seed, one in enumerate((splits.validation, splits.test))
    )
    return tested, judge(splits, held, tested, calibration)


def test_calibration_changes_how_sure_it_is_and_not_what_it_says(splits: Splits) -> None:
    tested, got = judged(splits, "temperature")
    assert got.temperature > 2
    np.testing.assert_allclose(got.probabilities, probabilities_of(tested / got.temperature))
    calibration = got.numbers["calibration"]
    assert calibration["temperature"] == got.temperature
    assert calibration["ece_before"] == metrics.calibration_error(probabilities_of(tested), splits.test.labels)
    assert calibration["ece_after"] == got.numbers["test"]["ece"]
    assert calibration["ece_after"] < 0.5 * calibration["ece_before"]
    _, raw = judged(splits, "none")
    assert (raw.temperature, raw.numbers["calibration"]["method"]) == (1.0, "none")
    assert raw.numbers["test"]["accuracy"] == got.numbers["test"]["accuracy"]
    assert raw.numbers["calibration"]["ece_before"] == raw.numbers["calibration"]["ece_after"]


def test_the_temperature_is_of_the_validation_part_alone(splits: Splits) -> None:
    held, tested = logits(torch.from_numpy(splits.validation.labels), 0, 1.0), torch.zeros(900, 3)
    assert judge(splits, held, tested, "temperature").temperature == metrics.temperature(
        held.double().numpy(), splits.validation.labels
    )


def test_the_most_confident_mistakes_are_mistakes_and_the_surest_first(splits: Splits) -> None:
    _, got = judged(splits, "temperature")
    shown = got.figures["mistakes"]
    wrong = got.probabilities.argmax(axis=1) != splits.test.labels
    assert len(shown) == MISTAKES < wrong.sum()
    sureness = [one["confidence"] for one in shown]
    assert sureness == sorted(got.probabilities.max(axis=1)[wrong], reverse=True)[:MISTAKES]
    for one in shown:
        place = one["row"] - 662
        assert one["text"] == splits.test.texts[place]
        assert one["label"] == NAMES[splits.test.labels[place]] != one["prediction"]
        assert one["prediction"] == NAMES[got.probabilities[place].argmax()]
    assert got.numbers["contradicted"] == int((got.probabilities.max(axis=1)[wrong] >= 0.95).sum())


def test_a_faultless_classifier_has_no_mistakes(splits: Splits) -> None:
    held, tested = (9.0 * torch.eye(3)[torch.from_numpy(one.labels)] for one in (splits.validation, splits.test))
    got = judge(splits, held, tested, "temperature")
    assert got.figures["mistakes"] == []
    assert got.numbers["contradicted"] == 0
    assert got.numbers["comparisons"]["majority"]["difference"] == pytest.approx(2 / 3)


def test_every_number_can_be_written(splits: Splits) -> None:
    _, got = judged(splits, "temperature")
    written = json.loads(json.dumps([got.numbers, got.figures], allow_nan=False))
    assert set(written[0]) == {
        *("test", "validation", "baselines", "comparisons", "intervals", "calibration"),
        *("coverage", "slices", "contradicted"),
    }
