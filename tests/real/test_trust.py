"""On the embedded model and real sentences: wrong labels are found, confidence is earned, intervals cover."""

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headstart
from headstart import config
from headstart.audit import audit
from headstart.encoder import choose_placement
from headstart.explain import Explanation, explain
from headstart.model import load_run
from headstart.predict import Predictor

pytestmark = pytest.mark.real

Rows = list[tuple[str, str]]


@pytest.fixture(scope="module")
def sst2(shared_data: Path) -> Path:
    return shared_data / "sst2"


def rows_of(path: Path) -> Rows:
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["sentence"], row["label"]) for row in csv.DictReader(file)]


def write(path: Path, rows: Rows) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("sentence", "label"), *rows])
    return str(path)


def train(out: Path, data: str, sst2: Path, **settings: Any) -> dict[str, Any]:
    given = {"validation": str(sst2 / "dev.csv"), "test": str(sst2 / "test.csv"), "thaw": "0", **settings}
    return headstart.train(data, out=str(out), overwrite=True, **given).metrics


@pytest.mark.slow
def test_labels_turned_round_are_found_and_mending_them_does_no_harm(sst2: Path, tmp_path: Path) -> None:
    clean = rows_of(sst2 / "train.csv")
    turned = set(random.Random(0).sample(range(len(clean)), len(clean) // 20))
    noisy = [(text, str(1 - int(label)) if i in turned else label) for i, (text, label) in enumerate(clean)]
    table = write(tmp_path / "noisy.csv", noisy)
    found = audit(config.settings(table, thaw="0"), tmp_path / "found.csv")
    first = found.table.head(len(clean) // 10)
    places = {row - 2 for row in first["row"].to_list()}
    assert len(places & turned) >= 0.55 * len(turned)
    mended = write(tmp_path / "mended.csv", [clean[i] if i in places else row for i, row in enumerate(noisy)])
    quick = {"head_features": ("mean-4", "mean-5", "mean-6"), "head_width": 128}
    before, after = (train(tmp_path / "run", one, sst2, **quick)["test"]["accuracy"] for one in (table, mended))
    assert (
        after >= before - 0.01
    )  # a point is within what another seed makes of it - 0.01  # a point is within what another seed makes of it


@pytest.mark.slow
def test_confidence_is_earned(sst2: Path, tmp_path: Path) -> None:
    numbers = train(tmp_path / "run", str(sst2 / "train.csv"), sst2)
    calibration = numbers["calibration"]
    assert calibration["ece_after"] <= 0.03
    assert calibration["ece_after"] <= calibration["ece_before"] + 0.005
    sure = {row["min_confidence"]: row for row in numbers["coverage"]}
    assert sure[0.5]["accuracy"] < sure[0.8]["accuracy"] < sure[0.95]["accuracy"]


def without(found: Explanation, starts: set[int]) -> str:
    return " ".join(word.word for word in found.words if word.start not in starts)


@pytest.mark.slow
@pytest.mark.parametrize("count", [25, 200])
def test_the_top_three_words_count_more_than_three_others(count: int, sst2: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", str(sst2 / "train.csv"), sst2)
    classifier = load_run(tmp_path / "run", choose_placement("auto", "fp32"))
    predictor, draw = Predictor(classifier), random.Random(0)
    texts = draw.sample([text for text, _ in rows_of(sst2 / "test.csv") if len(text.split()) > 5], count)
    more = 0
    for text in texts:
        found = explain(classifier, text)
        label = predictor.names.index(found.label)
        top = sorted(found.words, key=lambda word: -(word.score or 0.0))[:3]
        left = [without(found, {word.start for word in some}) for some in (top, draw.sample(found.words, 3))]
        shift = np.abs(predictor.predict_proba(left)[:, label] - found.confidence)
        more += int(shift[0] > shift[1])
    assert more >= 0.8 * count


@pytest.mark.slow
def test_over_forty_splits_the_interval_holds_the_accuracy_on_all_data(shared_data: Path, tmp_path: Path) -> None:
    quick = {"head_features": ("mean-4", "mean-5", "mean-6"), "head_width": 0, "lr": 1e-3, "weight_decay": 0.01}
    intervals, accuracies = [], []
    for seed in range(40):
        data, out = str(shared_data / "customer-reviews.csv"), str(tmp_path / "run")
        numbers = headstart.train(data, out=out, overwrite=True, thaw="0", seed=seed, **quick).metrics["test"]
        intervals.append(numbers["accuracy_ci95"])
        accuracies.append(numbers["accuracy"])
    whole = float(np.mean(accuracies))  # over 40 test parts, each text's answer is from models that had not seen it
    assert sum(low <= whole <= high for low, high in intervals) >= 36
