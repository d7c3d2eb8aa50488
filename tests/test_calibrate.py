"""A classifier that is too sure is calibrated in its weights, and what is told of that is cross-fitted."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, pipeline

from headstart import calibrate as calibrate_module
from headstart import metrics, predict, report
from headstart.calibrate import FOLDS, calibrate, cross_fitted
from headstart.encoder import choose_placement
from headstart.errors import DataError, InputError, RunError
from headstart.explain import neighbours
from headstart.export import export
from headstart.model import load_library, rescale
from headstart.predict import probabilities_of
from headstart.run import Run
from tests.conftest import BAD, EXACT, GOOD, NOUNS, SMALL_ROWS, write_csv

TEXTS = [
    f"the {noun} {verb} {word} {more}" for noun in NOUNS for verb in ("is", "was") for word in GOOD for more in BAD
]
HEAT = 4.0


@pytest.fixture(scope="module")
def too_sure(elsewhere: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose logits are `HEAT` times what they should be."""
    folder = tmp_path_factory.mktemp("sure") / "sure"
    shutil.copytree(elsewhere("bert"), folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    classifier = predict.load(folder, **EXACT).classifier
    logits = torch.from_numpy(predict.token_logits(classifier, classifier.tokenizer(TEXTS)))
    with torch.no_grad():  # all labels alike in the mean, and texts far apart
        model.classifier.bias -= logits.mean(dim=0)
    rescale(model, np.full(3, 1.5 * HEAT / float(logits.std(dim=0).mean())), np.zeros(3))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(too_sure: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with labels as often right as a classifier should be sure that they are."""
    logits = np.log(predict.load(too_sure, **EXACT).predict_proba(TEXTS))
    shares = probabilities_of(logits / HEAT)
    draw = np.random.default_rng(0)
    rows = [(text, str(draw.choice(3, p=share))) for text, share in zip(TEXTS, shares, strict=True)]
    return write_csv(tmp_path_factory.mktemp("table") / "held-out.csv", rows, "words", "verdict")


@pytest.fixture(scope="module")
def made(too_sure: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The calibrated run folder, and what was told of it."""
    out = tmp_path_factory.mktemp("made") / "calm"
    return out, calibrate(too_sure, str(table), out, "words", "verdict", "cpu")


def test_the_temperature_is_found_and_helps(made: tuple[Path, dict[str, Any]]) -> None:
    _, found = made
    assert found["calibration"]["temperature"] == pytest.approx(HEAT, rel=0.2)
    assert found["test"]["ece"] < 0.5 * found["before"]["ece"]
    assert found["test"]["log_loss"] < 0.8 * found["before"]["log_loss"]
    assert found["test"]["confusion_matrix"] == found["before"]["confusion_matrix"], "no text gets another label"


def test_it_is_in_the_weights_so_that_all_have_it(made: tuple[Path, dict[str, Any]], too_sure: Path) -> None:
    folder, found = made
    before, after = (predict.load(one, **EXACT).predict_proba(TEXTS) for one in (too_sure, folder))
    expected = probabilities_of(np.log(before) / found["calibration"]["temperature"])
    np.testing.assert_allclose(after, expected, atol=1e-5)
    said = pipeline("text-classification", str(folder), device="cpu", top_k=None)(TEXTS[:8])
    scores = [[{one["label"]: one["score"] for one in answer}[f"LABEL_{i}"] for i in range(3)] for answer in said]
    np.testing.assert_allclose(scores, expected[:8], atol=1e-5)


def test_what_is_told_is_cross_fitted_and_agrees(
    made: tuple[Path, dict[str, Any]], table: Path, too_sure: Path
) -> None:
    folder, found = made
    info, numbers = (json.loads((folder / name).read_text()) for name in ("headstart.json", "metrics.json"))
    assert (info["names"], info["columns"]) == (["LABEL_0", "LABEL_1", "LABEL_2"], ["words", "verdict"])
    assert (info["max_length"], info["out"]) == (64, str(folder))
    assert "labels" not in info, "a table may still number them"
    calibration = info["calibration"]
    assert (calibration["method"], calibration["texts"], calibration["folds"]) == ("temperature", len(TEXTS), FOLDS)
    for name in ("ece", "log_loss"):
        assert calibration[f"{name}_before"] == found["before"][name]
        assert calibration[f"{name}_after"] == found["test"][name]
    assert numbers == {"test": found["test"], "calibration": calibration}
    rows = pl.read_csv(folder / "predictions.csv", infer_schema=False)
    truth = pl.read_csv(table, infer_schema=False)
    assert rows["text"].to_list() == truth["words"].to_list()
    assert rows["label"].to_list() == [f"LABEL_{label}" for label in truth["verdict"]]
    shares = rows.select(pl.col(f"p_LABEL_{i}").cast(pl.Float64) for i in range(3)).to_numpy()
    labels = truth["verdict"].cast(pl.Int64).to_numpy()
    assert metrics.calibration_error(shares.max(axis=1), shares.argmax(axis=1) == labels) == pytest.approx(
        found["test"]["ece"], abs=1e-4
    )
    fitted = predict.load(folder, **EXACT).predict_proba(TEXTS)
    assert 1e-5 < np.abs(shares - fitted).max() < 0.1, "each by what other folds have fitted, which is near"


def test_no_text_is_judged_by_a_temperature_fitted_on_it() -> None:
    draw = np.random.default_rng(0)
    logits, truth = draw.normal(size=(100, 3)), draw.integers(0, 3, 100)
    fitted, crossed = cross_fitted(logits, truth, "single")
    assert fitted.described() == {"temperature": pytest.approx(metrics.temperature(logits, truth))}
    for i in range(0, 100, 9):
        other = truth.copy()
        other[i] = (other[i] + 1) % 3
        assert np.array_equal(cross_fitted(logits, other, "single")[1][i], crossed[i]), "whatever its label is"
        assert not np.array_equal(cross_fitted(logits, other, "single")[1], crossed)


def test_the_card_is_one_that_the_hub_understands(made: tuple[Path, dict[str, Any]]) -> None:
    from huggingface_hub import ModelCard

    folder, found = made
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    (accuracy, f1) = card.data.eval_results
    assert accuracy.metric_value == pytest.approx(found["test"]["accuracy"], abs=1e-4)
    assert f1.metric_value == pytest.approx(found["test"]["macro_f1"], abs=1e-4)
    assert accuracy.dataset_name == "held-out.csv"
    assert "cross-fitted" in card.text
    assert f"log loss {found['before']['log_loss']:.3f} before, {found['test']['log_loss']:.3f} after" in card.text


def test_it_is_exported_on_the_texts_it_was_calibrated_on(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    assert export(run, "fp32", "refuses").n == len(TEXTS)
    np.testing.assert_allclose(
        predict.load(run).predict_proba(TEXTS), predict.load(run, **EXACT).predict_proba(TEXTS), atol=1e-4
    )


def logits_of(run: Path, texts: Sequence[str]) -> NDArray[np.float64]:
    return np.log(predict.load(run, **EXACT).predict_proba(texts))


@pytest.mark.parametrize("head", ["pooled", "native"])
def test_a_run_of_ours_stays_one(head: str, train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(head=head, calibration="none", label_names=("bad", "good")).folder
    found = calibrate(run, str(write_csv(tmp_path / "t.csv", SMALL_ROWS)), tmp_path / "calm", device="cpu")
    assert found["calibration"]["temperature"] != pytest.approx(1.0, abs=0.01)
    texts = [text for text, _ in SMALL_ROWS]
    expected = probabilities_of(logits_of(run, texts) / found["calibration"]["temperature"])
    np.testing.assert_allclose(probabilities_of(logits_of(tmp_path / "calm", texts)), expected, atol=1e-4)
    before, after = (json.loads((place / "headstart.json").read_text()) for place in (run, tmp_path / "calm"))
    changed = {"calibration", "created", "out", "headstart"}
    assert {name: one for name, one in after.items() if name not in changed} == {
        name: one for name, one in before.items() if name not in changed
    }
    assert len(neighbours(tmp_path / "calm", "the film was superb")) == 5
    code = {"trust_remote_code": True} if head == "pooled" else {}
    (said,) = pipeline("text-classification", str(tmp_path / "calm"), device="cpu", **code)(texts[:1])
    assert said["label"] == ("bad", "good")[int(expected[0].argmax())]
    assert said["score"] == pytest.approx(expected[0].max(), abs=1e-4)
    assert (tmp_path / "calm" / "modeling_headstart.py").exists() == (head == "pooled")
    assert found["notices"] == []
    again = calibrate(tmp_path / "calm", before["settings"]["data"], tmp_path / "calm", device="cpu", overwrite=True)
    assert any("is what it was trained on, so these numbers flatter" in notice for notice in again["notices"])
    first, second = (abs(np.log(one["calibration"]["temperature"])) for one in (found, again))
    assert second < first, "in its own place, and less was left to do"


def test_of_several_labels_each_is_calibrated_and_the_same_ones_are_given(too_sure: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(too_sure, theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    before = predict.load(theirs, **EXACT)
    logits = calibrate_module.logits_of(before.predict_proba(TEXTS), "multi")
    odds = probabilities_of(logits / HEAT + 0.5, "multi")
    has = np.random.default_rng(0).random(odds.shape) < odds
    labels = ["|".join(f"LABEL_{i}" for i in np.flatnonzero(row)) for row in has]
    table = write_csv(tmp_path / "t.csv", [(text, one) for text, one in zip(TEXTS, labels, strict=True) if one])
    found = calibrate(theirs, str(table), tmp_path / "calm", device="cpu")
    assert found["test"]["log_loss"] < 0.8 * found["before"]["log_loss"]
    assert found["calibration"]["scale"] == pytest.approx([1 / HEAT] * 3, rel=0.5)
    after = predict.load(tmp_path / "calm", **EXACT)
    assert after.classifier.problem == "multi"
    assert after.predict(TEXTS) == before.predict(TEXTS)
    assert all(abs(mark - 0.5) > 0.02 for mark in after.classifier.thresholds)
    assert "scaled and shifted" in report.filled("calibrated.txt", found)


def test_without_settings_nothing_is_known_of_training_texts(made: tuple[Path, dict[str, Any]], too_sure: Path) -> None:
    for folder in (made[0], too_sure):
        with pytest.raises(InputError, match="was not trained by headstart"):
            neighbours(folder, "a film")


def test_what_cannot_be_done_leaves_nothing_behind(
    too_sure: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write_csv(tmp_path / "few.csv", [(text, "0") for text in TEXTS[:9]])
    strange = write_csv(tmp_path / "strange.csv", [(text, "good") for text in TEXTS[:20]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    columns = ("words", "verdict")
    with pytest.raises(DataError, match="has 9 usable rows, and at least 10 are needed"):
        calibrate(too_sure, str(few), tmp_path / "out", device="cpu")
    with pytest.raises(DataError, match=r"the label 'good' .* is not one of those trained on"):
        calibrate(too_sure, str(strange), tmp_path / "out", device="cpu")
    with pytest.raises(RunError, match="full: is not empty"):
        calibrate(too_sure, str(table), tmp_path / "full", *columns, "cpu")
    with pytest.raises(RunError, match="no such run folder"):
        calibrate(tmp_path / "nowhere", str(table), tmp_path / "out", *columns, "cpu")
    monkeypatch.setattr(calibrate_module, "rescale", lambda *_: None)  # as where the last layer is not the last step
    with pytest.raises(RunError, match="do not come from a last layer that could be calibrated"):
        calibrate(too_sure, str(table), tmp_path / "out", *columns, "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.csv", "full", "strange.csv"]


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "modernbert"])
def test_every_familys_last_layer_is_found(family: str, elsewhere: Callable[..., Path]) -> None:
    model = load_library(elsewhere(family), choose_placement("cpu", "fp32"))
    ids = torch.tensor([[2, 9, 8, 3]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rescale(model, np.array([0.5, 1.0, 2.0]), np.array([0.0, 1.0, -1.0]))
        expected = before * torch.tensor([0.5, 1.0, 2.0]) + torch.tensor([0.0, 1.0, -1.0])
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
