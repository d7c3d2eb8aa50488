"""Public data sets with the embedded MiniLM: accuracy, one encoder pass, memory. Skipped where they are not there."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import pipeline

import headstart

pytestmark = pytest.mark.real
Trained = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One feature store for all tests here: later ones find what earlier ones encoded."""
    del cache_dir  # set first, so that this one wins
    folder = tmp_path_factory.getbasetemp() / "shared-data-store"
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def trained(shared_data: Path, tmp_path: Path) -> Trained:
    """Trains on one of the sets, given as its training, validation and test files; returns the metrics."""

    def train(*data: str, **settings: Any) -> dict[str, Any]:
        names = ("data", "validation", "test")
        tables = {name: str(shared_data / file) for name, file in zip(names, data, strict=False) if file}
        given = {"thaw": "0", "out": str(tmp_path / "run"), "overwrite": True, **tables, **settings}
        numbers: dict[str, Any] = headstart.train(**given).metrics
        return numbers

    return train


@pytest.mark.parametrize(
    ("data", "floor"),
    [
        (("sst2/train.csv", "sst2/dev.csv", "sst2/test.csv"), 0.82),
        pytest.param(("customer-reviews.csv",), 0.82, marks=pytest.mark.slow),
        pytest.param(("trec/train.csv", "", "trec/test.csv"), 0.90, marks=pytest.mark.slow),
    ],
)
def test_frozen_features_beat_the_baseline(data: tuple[str, ...], floor: float, trained: Trained) -> None:
    numbers = trained(*data)
    assert numbers["test"]["accuracy"] >= floor
    assert numbers["test"]["accuracy"] > numbers["baselines"]["tfidf_logreg"]["accuracy"]
    again = trained(*data, head="native")
    assert again["features"]["encoded"] == 0
    assert again["features"]["reused"] == numbers["features"]["texts"]


def test_fine_tuning_learns_and_is_a_plain_model(trained: Trained, tmp_path: Path) -> None:
    numbers = trained("customer-reviews.csv", thaw="2", epochs=3)
    assert numbers["test"]["accuracy"] >= 0.84
    assert [stage["name"] for stage in numbers["stages"]] == ["head", "thaw-2"]
    rows = pl.read_csv(tmp_path / "run" / "predictions.csv").head(40)
    labels = [one["label"] for one in pipeline("text-classification", str(tmp_path / "run"))(rows["text"].to_list())]
    agreeing = sum(one == other for one, other in zip(labels, rows["prediction"].to_list(), strict=True))
    assert agreeing >= 39  # the run was scored in bf16 where the CPU has it


def test_the_article_recipe_encodes_each_text_once_however_many_epochs(trained: Trained) -> None:
    given = {"recipe": "article", "model": "minilm"}
    few = trained("sst2/all.csv", **given, epochs=2)
    assert few["features"]["encoded"] + few["features"]["reused"] == few["features"]["texts"] <= 9_613
    many = trained("sst2/all.csv", **given)
    assert many["features"]["encoded"] == 0
    assert many["stages"][0]["epochs"] == 10
    assert many["test"]["n"] == 1_442
    assert many["test"]["accuracy"] > 0.6


@pytest.mark.slow
def test_folds_report_mean_and_spread_and_train_on_all_but_test(trained: Trained) -> None:
    numbers = trained("trec/train.csv", "", "trec/test.csv", folds=3)
    folds = numbers["folds"]
    assert len(folds["accuracy"]) == folds["k"] == 3
    assert min(folds["accuracy"]) <= folds["mean"] <= max(folds["accuracy"])
    assert folds["mean"] > 0.88
    assert numbers["test"]["accuracy"] > 0.90


PEAK = """
import resource, sys
from headstart.cli import main
try:
    main(["predict", *sys.argv[1:]])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_scoring_a_file_ten_times_as_long_takes_no_more_memory(
    trained: Trained, shared_data: Path, tmp_path: Path
) -> None:
    trained("sst2/train.csv", "sst2/dev.csv", "sst2/test.csv", head_features=("mean-1",), epochs=2)
    words = pl.read_csv(shared_data / "sst2/train.csv")["sentence"].to_list()
    peaks = []
    for rows in (20_000, 200_000):
        table, output = tmp_path / f"{rows}.csv", tmp_path / f"{rows}-labelled.csv"
        texts = [f"{words[i % len(words)][:40]} {i}" for i in range(rows)]
        pl.DataFrame({"id": range(rows), "sentence": texts}).write_csv(table)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / "run"), "--input", str(table), "--output", str(output)],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=500,
            check=True,
        )
        peaks.append(int(done.stderr.split()[-1]))
        labelled = pl.read_csv(output)
        assert labelled["id"].to_list() == list(range(rows))
        assert labelled.null_count().sum_horizontal().item() == 0
    assert peaks[1] < 1.2 * peaks[0]
