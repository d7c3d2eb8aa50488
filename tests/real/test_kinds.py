"""Several labels a text, stars and long texts on real sentences, from a table through training to a server."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import polars as pl
import pytest

import headstart
from headstart import judge, predict
from headstart.export import export
from tests.conftest import write_csv
from tests.serve.conftest import serving

pytestmark = pytest.mark.real
Rows = list[tuple[str, str]]
ASKED = ("what", "who", "how", "when", "where")


def read(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from ((row["sentence"], row["label"]) for row in csv.DictReader(file))


def topics(data: Path) -> Rows:
    """Questions with their kind, and the words they ask with."""
    rows = list(read(data / "trec" / "train.csv"))[:1200]
    words = [[word for word in ASKED if word in text.lower().split()] for text, _ in rows]
    return [(text, "|".join([label, *own])) for (text, label), own in zip(rows, words, strict=True)]


def stars(data: Path) -> Rows:
    """Four remarks of customers each; a star more for each that is a praise."""
    rows = list(read(data / "customer-reviews.csv"))
    order = np.random.default_rng(0).permutation(len(rows))
    groups = [[rows[i] for i in part] for part in order[:3600].reshape(-1, 4)]
    return [
        (" ".join(text for text, _ in some), str(1 + sum(label == "positive" for _, label in some))) for some in groups
    ]


def long(data: Path) -> Rows:
    """Reviews of 700 words, and in the last few of them the verdict."""
    filler = " ".join(text for text, _ in read(data / "trec" / "train.csv")).split()
    ends = list(read(data / "sst2" / "train.csv"))[:240]
    by_label = [[text for text, label in ends if label == one][:72] for one in "01"]
    texts = [" ".join(some) for own in by_label for some in zip(own[::3], own[1::3], own[2::3], strict=True)]
    return [
        (" ".join(filler[400 * i : 400 * i + 700 - len(text.split())]) + " " + text, "np"[i * 2 // len(texts)])
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    "rows_of", [topics, pytest.param(stars, marks=pytest.mark.slow), pytest.param(long, marks=pytest.mark.slow)]
)
def test_from_a_table_to_a_server(rows_of: Callable[[Path], Rows], shared_data: Path, tmp_path: Path) -> None:
    rows = rows_of(shared_data)
    table = write_csv(tmp_path / "table.csv", rows)
    given: dict[str, Any] = {"thaw": "0", "head_width": 0, "head_features": ("mean-4", "mean-5")}
    given |= {"long": "windows", "max_length": 128} if rows_of is long else {}
    given = {"thaw": "0"} if rows_of is stars else given
    run = headstart.train(str(table), out=str(tmp_path / "run"), **given)
    test, baselines = run.metrics["test"], run.metrics["baselines"]
    if rows_of is topics:
        assert test["micro_f1"] > 0.8
        assert test["accuracy"] > baselines["tfidf_logreg"]["accuracy"]
    elif rows_of is stars:
        assert test["mean_absolute_error"] < 0.7, "always 4 would be off by 0.79"
        assert test["quadratic_kappa"] > 0.45
    else:
        assert {len(text.split()) for text, _ in rows} == {700}
        cut = headstart.train(str(table), out=str(tmp_path / "cut"), **{**given, "long": "truncate"})
        assert "of all tokens are cut off, see --long" in cut.info["max_length_reason"]
        assert run.metrics["validation"]["log_loss"] < cut.metrics["validation"]["log_loss"]
    predictor = headstart.load(run.folder)
    held = pl.read_csv(run.folder / "predictions.csv", infer_schema=False)
    texts = held["text"].to_list()
    by_hand = predictor.predict_proba(texts)
    numbers, _ = judge.evaluate(predictor, str(write_csv(tmp_path / "test.csv", held.select("text", "label").rows())))
    assert numbers["accuracy"] == pytest.approx(test["accuracy"], abs=0.03)  # in fp32 now
    predict.predict_file(predictor, str(tmp_path / "test.csv"), str(tmp_path / "scored.csv"))
    assert pl.read_csv(tmp_path / "scored.csv", infer_schema=False)["prediction"].fill_null("").to_list() == (
        predictor.predict(texts)
    )
    assert export(run.folder, "fp32", "warns").agreement > 0.97  # the test part's labels, where a tie may go either way
    np.testing.assert_allclose(headstart.load(run.folder).predict_proba(texts[:5]), by_hand[:5], atol=2e-3)
    with serving(run.folder, tmp_path / "log") as server:
        found = httpx.post(server.url + "/predict", json={"inputs": [[text] for text in texts[:5]]}, timeout=30).json()
    for answer, shares in zip(found, by_hand, strict=False):
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(
            dict(zip(predictor.names, shares, strict=True)), abs=2e-3
        )


@pytest.mark.parametrize("head", ["pooled", "native"])
def test_predict_says_what_transformers_pipeline_says(head: str, shared_data: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    from headstart.cli import main

    files = {name: str(shared_data / "sst2" / f"{name}.csv") for name in ("dev", "test")}
    table = write_csv(tmp_path / "train.csv", list(read(shared_data / "sst2" / "train.csv"))[:1500])
    given: dict[str, Any] = {"thaw": "0", "head": head, "epochs": 10}
    if head == "pooled":
        given |= {"head_width": 64, "head_features": ("mean-4", "mean-5")}
    run = headstart.train(str(table), validation=files["dev"], test=files["test"], out=str(tmp_path / "run"), **given)
    some, scored = write_csv(tmp_path / "some.csv", list(read(Path(files["test"])))[:400]), tmp_path / "scored.csv"
    with pytest.raises(SystemExit) as end:
        main(["predict", str(run.folder), "--input", str(some), "--output", str(scored)])
    assert end.value.code == 0
    ours = pl.read_csv(scored, infer_schema=False)
    classify = pipeline("text-classification", str(run.folder), trust_remote_code=head == "pooled", device="cpu")
    theirs = classify(ours["sentence"].to_list(), batch_size=32, truncation=True)
    assert ours["prediction"].to_list() == [one["label"] for one in theirs]
    np.testing.assert_allclose(ours["confidence"].cast(pl.Float64), [one["score"] for one in theirs], atol=1e-4)
