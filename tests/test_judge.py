"""What is told of a classifier hangs together: one temperature, one set of predictions, the mistakes among them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from headstart import config, metrics, predict
from headstart.config import Calibration
from headstart.data import Dataset, Splits
from headstart.errors import DataError
from headstart.judge import MISTAKES, Judged, evaluate, judge
from headstart.metrics import Shares
from headstart.predict import probabilities_of
from headstart.run import Run
from headstart.run import train as run_train
from tests.conftest import EXACT, GOOD, NOUNS, QUICK, SMALL_ROWS, write_csv

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


def judged(splits: Splits, calibration: Calibration) -> tuple[Shares, Judged]:
    held, tested = (
        logits(torch.from_numpy(one.labels), seed, 4.0).double().numpy()
        for seed, one in enumerate((splits.validation, splits.test))
    )
    return tested, judge(splits, held, tested, calibration)


def test_calibration_changes_how_sure_it_is_and_not_what_it_says(splits: Splits) -> None:
    tested, found = judged(splits, "temperature")
    numbers, probabilities = found.numbers, found.probabilities
    calibration = numbers["calibration"]
    assert calibration["temperature"] > 2
    np.testing.assert_allclose(probabilities, probabilities_of(tested / calibration["temperature"]))
    before, right = probabilities_of(tested), tested.argmax(axis=1) == splits.test.labels
    assert calibration["ece_before"] == metrics.calibration_error(before.max(axis=1), right)
    assert calibration["ece_after"] == numbers["test"]["ece"]
    assert calibration["ece_after"] < 0.5 * calibration["ece_before"]
    raw = judged(splits, "none")[1].numbers
    assert (raw["calibration"]["temperature"], raw["calibration"]["method"]) == (1.0, "none")
    assert raw["test"]["accuracy"] == numbers["test"]["accuracy"]
    assert raw["calibration"]["ece_before"] == raw["calibration"]["ece_after"]


def test_the_temperature_is_of_the_validation_part_alone(splits: Splits) -> None:
    held = logits(torch.from_numpy(splits.validation.labels), 0, 1.0).double().numpy()
    found = judge(splits, held, np.zeros((900, 3)), "temperature")
    expected = metrics.temperature(held, splits.validation.labels)
    assert found.numbers["calibration"]["temperature"] == pytest.approx(expected)


def test_the_most_confident_mistakes_are_mistakes_and_the_surest_first(splits: Splits) -> None:
    found = judged(splits, "temperature")[1]
    numbers, probabilities, shown = found.numbers, found.probabilities, found.figures["mistakes"]
    wrong = probabilities.argmax(axis=1) != splits.test.labels
    assert len(shown) == MISTAKES < wrong.sum()
    sureness = [one["confidence"] for one in shown]
    assert sureness == sorted(probabilities.max(axis=1)[wrong], reverse=True)[:MISTAKES]
    for one in shown:
        place = one["row"] - 662
        assert one["text"] == splits.test.texts[place]
        assert one["label"] == NAMES[splits.test.labels[place]] != one["prediction"]
        assert one["prediction"] == NAMES[probabilities[place].argmax()]
    assert numbers["contradicted"] == int((probabilities.max(axis=1)[wrong] >= 0.95).sum())


def test_a_faultless_classifier_has_no_mistakes(splits: Splits) -> None:
    held, tested = (9.0 * np.eye(3)[one.labels] for one in (splits.validation, splits.test))
    found = judge(splits, held, tested, "temperature")
    assert found.figures["mistakes"] == []
    assert found.numbers["contradicted"] == 0
    assert found.numbers["comparisons"]["majority"]["difference"] == pytest.approx(2 / 3)


def test_every_number_can_be_written(splits: Splits) -> None:
    found = judged(splits, "temperature")[1]
    written = json.loads(json.dumps([found.numbers, found.figures], allow_nan=False))
    assert set(written[0]) == {
        *("test", "validation", "baselines", "comparisons", "intervals", "calibration"),
        *("coverage", "slices", "contradicted"),
    }


# --- another table


@pytest.mark.parametrize("head", ["pooled", "native"])
def test_evaluating_on_the_test_table_gives_the_test_numbers(
    head: str, train: Callable[..., Run], tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "test.csv", [(f"a {noun} was {word}", "1") for noun in NOUNS for word in GOOD[:2]])
    done = train(test=str(table), head=head)
    numbers, notices = evaluate(predict.load(done.folder, **EXACT), str(table))
    exact = ("n", "accuracy", "accuracy_ci95", "confusion_matrix", "labels", "per_label", "macro_f1")
    assert {name: numbers[name] for name in exact} == {name: done.metrics["test"][name] for name in exact}
    assert numbers["log_loss"] == pytest.approx(done.metrics["test"]["log_loss"], abs=2e-3)
    assert metrics.report_text(numbers) == metrics.report_text(done.metrics["test"])
    assert notices == []


def test_evaluating_finds_the_columns_trained_on(tiny_bert: Path, tmp_path: Path) -> None:
    names = ("words", "verdict")
    table = write_csv(tmp_path / "t.csv", SMALL_ROWS, *names)
    given = {"text": "words", "label": "verdict", "model": str(tiny_bert), "out": str(tmp_path / "run"), **QUICK}
    predictor = predict.load(run_train(config.settings(str(table), **given)).folder, **EXACT)
    expected, _ = evaluate(predictor, str(table))
    # With other usual names beside them the columns trained on are still meant.
    decoys = [(text, label, "nothing", "0") for text, label in SMALL_ROWS]
    beside = write_csv(tmp_path / "beside.csv", decoys, *names, "sentence", "label")
    assert evaluate(predictor, str(beside))[0] == expected
    usual = write_csv(tmp_path / "usual.csv", SMALL_ROWS, "review", "sentiment")
    assert evaluate(predictor, str(usual))[0] == expected
    swapped = write_csv(tmp_path / "swapped.csv", [(b, a) for a, b in SMALL_ROWS], "x", "y")
    assert evaluate(predictor, str(swapped), "y", "x")[0] == expected
    with pytest.raises(DataError, match="has no text column"):
        evaluate(predictor, str(swapped))


def test_evaluating_tells_what_it_found(tiny_run: Path, tmp_path: Path) -> None:
    rows = [*SMALL_ROWS[:6], ("film " * 90, "1"), ("", "0")]
    table = write_csv(tmp_path / "t.csv", rows)
    numbers, notices = evaluate(predict.load(tiny_run, **EXACT), str(table))
    assert numbers["n"] == 7
    assert any("dropped 1 row with an empty text (row 9)" in notice for notice in notices)
    assert "1 of 7 texts were cut to 16 tokens." in notices


def test_names_are_shown_and_either_kind_is_read_back(train: Callable[..., Run], tmp_path: Path) -> None:
    done = train(label_names=("negative", "positive"), epochs=30)
    rows = pl.read_csv(done.folder / "predictions.csv").to_dicts()
    assert list(rows[0])[4:] == ["p_negative", "p_positive"]
    assert {row["label"] for row in rows} == {"negative", "positive"}
    assert all((row["label"] == "positive") == any(word in row["text"] for word in GOOD) for row in rows)
    predictor = predict.load(done.folder, **EXACT)
    assert predictor.names == ("negative", "positive")
    shown = [(text, ("negative", "positive")[int(label)]) for text, label in SMALL_ROWS]
    raw, _ = evaluate(predictor, str(write_csv(tmp_path / "raw.csv", SMALL_ROWS)))
    named, _ = evaluate(predictor, str(write_csv(tmp_path / "named.csv", shown)))
    assert raw == named
    assert raw["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("shown", "table", "read_as", "said"),
    [
        (("1", "2"), ("0", "1"), (0, 1), False),
        (("1", "2"), ("1", "2"), (0, 1), False),
        (("1", "2"), ("1", "1"), (1, 1), True),
        (("1", "0"), ("0", "1"), (0, 1), True),
        (("1", "0"), ("1", "0"), (1, 0), True),
        (("0", "1"), ("1", "0"), (1, 0), False),
        (("bad", "good"), ("good", "bad"), (1, 0), False),
    ],
)
def test_labels_are_read_one_way_for_the_whole_table(
    shown: tuple[str, str],
    table: tuple[str, str],
    read_as: tuple[int, int],
    *,
    said: bool,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    """The run was trained on 0 and 1, and shows them by other names."""
    loaded = predict.load(tiny_run, **EXACT)
    classifier = dataclasses.replace(loaded.classifier, names=shown)
    rows = [(text, table[i % 2]) for i, (text, _) in enumerate(SMALL_ROWS)]
    numbers, notices = evaluate(predict.Predictor(classifier), str(write_csv(tmp_path / "t.csv", rows)))
    support = [one["support"] for one in numbers["per_label"].values()]
    assert support == [read_as.count(place) * 40 for place in (0, 1)]
    right = [
        place == loaded.names.index(name)
        for place, name in zip(read_as * 40, loaded.predict([t for t, _ in rows]), strict=True)
    ]
    assert numbers["accuracy"] == pytest.approx(np.mean(right))
    remarks = [notice for notice in notices if "labels" in notice]
    assert len(remarks) == said
    assert not said or "are read as those trained on (0, 1), not as the names shown for them" in remarks[0]


def test_labels_of_both_kinds_in_one_table_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    classifier = dataclasses.replace(predict.load(tiny_run, **EXACT).classifier, names=("1", "2"))
    table = write_csv(tmp_path / "t.csv", [("a", "0"), ("b", "1"), ("c", "2")])
    with pytest.raises(DataError, match=r"the label '2' \(row 4\) is not one of those trained on: 0, 1"):
        evaluate(predict.Predictor(classifier), str(table))
