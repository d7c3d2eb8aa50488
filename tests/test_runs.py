"""What a run folder says beside its weights, and what is said of a folder that is none."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from headstart import judge, predict
from headstart.encoder import choose_placement
from headstart.errors import DataError, ModelError, RunError
from headstart.explain import explain
from headstart.model import load_run
from headstart.run import Run
from headstart.runs import find_run, hub_id, read_about, read_json
from tests.conftest import EXACT, FAMILIES, SMALL_ROWS, write_csv
from tests.serve.conftest import inside


def test_a_run_says_its_labels_in_order_its_tokenizer_and_max_length(tiny_run: Path) -> None:
    found = read_about(tiny_run)
    assert found["names"] == ("0", "1")
    assert found["max_length"] == 16
    assert found["info"]["columns"] == ["sentence", "label"]
    assert found["tokenizer"](["the film was superb"]).lengths.tolist() == [6]


def test_ten_labels_and_more_are_in_the_order_of_their_numbers(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text()) | {"id2label": {str(i): f"l{i}" for i in range(12)}}
    path.write_text(json.dumps(content))
    assert read_about(tmp_path / "run")["names"] == tuple(f"l{i}" for i in range(12))


def test_a_model_without_a_head_is_no_classifier(tiny_bert: Path) -> None:
    with pytest.raises(RunError, match="without a classification head"):
        read_about(tiny_bert)


def test_files_that_are_missing_or_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        read_json(tmp_path / "none", "config.json")
    with pytest.raises(RunError, match=r"has no config\.json"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunError, match="is not a JSON object"):
        read_json(tmp_path, "config.json")


# --- classifiers that transformers has made elsewhere

TEXTS = ["the film was superb", "the waiter was rude and the soup was awful at the end", "un hotel", "i was not " * 30]
"""The last is longer than the 64 tokens that they take."""


def change(folder: Path, place: Path, name: str = "config.json", **settings: Any) -> Path:
    """A copy of a folder, one of whose JSON files says something else; None takes a setting out."""
    shutil.copytree(folder, place)
    content = json.loads((place / name).read_text()) | settings
    (place / name).write_text(json.dumps({key: one for key, one in content.items() if one is not None}))
    return place


def transformers_says(folder: Path, texts: Sequence[str] = TEXTS) -> NDArray[np.float64]:
    """(n, labels) probabilities by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        given = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[0]
        found.append(torch.softmax(logits.double(), dim=0).numpy())
    return np.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_made_elsewhere_says_what_it_says_in_transformers(
    family: str, elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    folder = elsewhere(family)
    predictor = predict.load(folder, **EXACT)
    expected = transformers_says(folder)
    np.testing.assert_allclose(predictor.predict_proba(TEXTS), expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.01, "texts should get answers of their own"
    assert predictor.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert (predictor.classifier.max_length, predictor.classifier.info) == (64, {})
    # It is right on its own answers, numbered or named.
    for labels in (expected.argmax(axis=1).tolist(), predictor.predict(TEXTS)):
        table = write_csv(tmp_path / "t.csv", [(text, str(one)) for text, one in zip(TEXTS, labels, strict=True)])
        numbers, notices = judge.evaluate(predictor, str(table))
        assert (numbers["accuracy"], numbers["n"]) == (1.0, len(TEXTS))
        assert notices == ["1 of 4 texts were cut to 64 tokens."]
    found = explain(load_run(folder, choose_placement("cpu", "fp32")), TEXTS[0])
    assert [word.word for word in found.words] == TEXTS[0].split()
    assert found.label == predictor.names[expected[0].argmax()]
    assert any(abs(word.score or 0.0) > 1e-4 for word in found.words)


@pytest.mark.parametrize(
    ("names", "table", "understood"),
    [
        (("NEGATIVE", "POSITIVE"), ("NEGATIVE", "POSITIVE"), True),
        (("NEGATIVE", "POSITIVE"), ("negative", "positive"), True),
        (("NEGATIVE", "POSITIVE"), ("Negative", "Positive"), True),
        (("negative", "positive"), ("NEGATIVE", "POSITIVE"), True),
        (("NEGATIVE", "POSITIVE"), ("0", "1"), True),
        (("LABEL_0", "LABEL_1"), ("0.0", "1.0"), True),
        (("NEGATIVE", "POSITIVE"), ("negative", "POSITIVE"), False),
        (("NEGATIVE", "POSITIVE"), ("NEGATIVE", "1"), False),
        (("NEGATIVE", "POSITIVE"), ("1", "2"), False),
        (("1", "2"), ("1", "2"), True),
        (("1", "2"), ("0", "1"), False),  # of labels that are numbers it cannot be known which are meant
        (("a", "A"), ("a", "A"), True),
        (("a", "A"), ("A", "A"), True),
    ],
)
def test_a_table_names_the_labels_as_the_model_does_or_by_number_or_in_another_case(
    names: tuple[str, str], table: tuple[str, str], understood: bool, elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    predictor = predict.load(elsewhere("bert", *names), **EXACT)
    said = predictor.predict_proba(TEXTS[:2])
    rows = list(zip(TEXTS[:2], table, strict=True))
    source = str(write_csv(tmp_path / "t.csv", rows))
    if not understood:
        with pytest.raises(DataError, match="is not one of those trained on"):
            judge.evaluate(predictor, source)
        return
    numbers, notices = judge.evaluate(predictor, source)
    truth = [1, 1] if table == ("A", "A") else [0, 1]
    assert numbers["log_loss"] == pytest.approx(-np.log(said[[0, 1], truth]).mean())
    assert numbers["labels"] == list(names)
    assert notices == []


def test_a_run_of_ours_takes_no_numbers_for_names(train: Callable[..., Run], tmp_path: Path) -> None:
    named = [(text, ("bad", "good")[int(label)]) for text, label in SMALL_ROWS]
    predictor = predict.load(train(named).folder, **EXACT)
    with pytest.raises(DataError, match=r"the label '0' .* is not one of those trained on: bad, good"):
        judge.evaluate(predictor, str(write_csv(tmp_path / "t.csv", SMALL_ROWS)))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"id2label": {"0": 3, "1": 4, "2": 5}}, ("3", "4", "5")),
        ({"id2label": {"2": "c", "0": "a", "1": "b"}}, ("a", "b", "c")),
        ({"id2label": None, "num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"problem_type": "multi_label_classification"}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_labels_may_be_written_in_many_ways(
    settings: dict[str, Any], names: tuple[str, ...], elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    predictor = predict.load(change(elsewhere("bert"), tmp_path / "run", **settings), **EXACT)
    assert predictor.names == names
    assert predictor.predict(TEXTS[:1])[0] in names


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"id2label": {"0": "LABEL_0"}}, r"predicts a number, not a label \(regression\)"),
        ({"problem_type": "regression"}, r"predicts a number, not a label \(regression\)"),
        ({"architectures": ["BertForTokenClassification"]}, "holds a model without a classification head"),
        ({"architectures": None}, "holds a model without a classification head"),
        ({"id2label": {"a": "0", "b": "1"}}, r"config\.json: its id2label does not number the labels"),
        ({"id2label": {"0": "x", "1": "y", "2": "x"}}, r"config\.json: two labels are named 'x'"),
        ({"id2label": {"0": "x", "1": "y"}}, r"\(it has 3 outputs, and config\.json names 2 labels\)"),
    ],
)
def test_what_is_no_classifier_of_texts_is_one_sentence(
    settings: dict[str, Any], said: str, elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    run = change(elsewhere("bert"), tmp_path / "run", **settings)
    with pytest.raises(RunError, match=said) as caught:
        predict.load(run, **EXACT)
    assert len(str(caught.value).splitlines()) == 1
    assert str(run) in str(caught.value)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
@pytest.mark.parametrize("length", [int(1e30), 1e30, None, 20])
def test_the_length_is_the_tokenizers_or_that_of_the_positions(
    family: str, length: float | None, elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    run = change(elsewhere(family), tmp_path / "run", "tokenizer_config.json", model_max_length=length)
    predictor = predict.load(run, **EXACT)
    assert predictor.classifier.max_length == (20 if length == 20 else 64)
    if length != 20:
        np.testing.assert_allclose(predictor.predict_proba(TEXTS), transformers_says(elsewhere(family)), atol=1e-5)


def vocabulary_only(folder: Path, place: Path) -> Path:
    """A copy of a folder as it would be from before there was tokenizer.json."""
    shutil.copytree(folder, place)
    words = predict.load(folder, **EXACT).classifier.tokenizer.fast.get_vocab()
    (place / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.__getitem__)))
    for path in place.glob("tokenizer*"):
        path.unlink()
    return place


def test_a_vocabulary_is_enough_of_a_tokenizer(elsewhere: Callable[..., Path], tmp_path: Path) -> None:
    run = vocabulary_only(elsewhere("bert"), tmp_path / "run")
    assert not (run / "tokenizer.json").exists()
    predictor = predict.load(run, **EXACT)
    assert predictor.classifier.max_length == 64
    np.testing.assert_allclose(predictor.predict_proba(TEXTS), transformers_says(elsewhere("bert")), atol=1e-5)
    (run / "vocab.txt").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        predict.load(run, **EXACT)


def test_weights_in_pieces_are_read(elsewhere: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(elsewhere("bert"), tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    model = AutoModelForSequenceClassification.from_pretrained(elsewhere("bert"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "run", max_shard_size="20KB")
    assert len(list((tmp_path / "run").glob("model-*.safetensors"))) > 2
    got = predict.load(tmp_path / "run", **EXACT).predict_proba(TEXTS)
    np.testing.assert_allclose(got, transformers_says(elsewhere("bert")), atol=1e-5)


def test_pickled_weights_are_refused_and_it_says_how_to_convert_them(
    elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(elsewhere("bert"), tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "run" / "pytorch_model.bin")
    said = (
        r"pytorch_model\.bin: is a pickle, which headstart never loads\. .*\.from_pretrained\(FOLDER\)\.save_pretrained"
    )
    with pytest.raises(RunError, match=said):
        predict.load(tmp_path / "run", **EXACT)


# --- a Hub id


def test_a_hub_id_is_found_in_the_local_cache_and_nothing_is_fetched(
    elsewhere: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--them--theirs"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(elsewhere("bert"), place / "snapshots" / ("0" * 40))
    found = find_run("them/theirs")
    assert Path(found) == place / "snapshots" / ("0" * 40)
    assert predict.load(found, **EXACT).names == ("LABEL_0", "LABEL_1", "LABEL_2")
    monkeypatch.chdir(tmp_path)
    for name in ("them/others", "theirs", "a--b/c", "/them/theirs", "them/theirs/more", str(tmp_path)):
        assert find_run(name) == name
    (tmp_path / "them" / "theirs").mkdir(parents=True)
    assert find_run("them/theirs") == "them/theirs", "a folder comes first"


def test_an_encoder_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert [hub_id(name) for name in ("bert-base-uncased", "user/a.b-c_d")] == ["bert-base-uncased", "user/a.b-c_d"]
    assert [hub_id(name) for name in ("models/mine", "models", "/models/other", "a/b/c", "./x", "a b", "~/x")] == [
        None
    ] * 7


def test_it_is_served_without_test_numbers(elsewhere: Callable[..., Path]) -> None:
    folder = elsewhere("roberta")
    with inside(folder) as (url, _):
        about = httpx.get(f"{url}/info", timeout=10).json()
        answer = httpx.post(f"{url}/predict", json={"inputs": TEXTS[0]}, timeout=10).json()
    assert (about["test"], about["calibrated"], about["max_input_length"]) == (None, False, 64)
    assert about["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    scores = {one["label"]: one["score"] for one in answer}
    expected = transformers_says(folder, TEXTS[:1])[0]
    np.testing.assert_allclose([scores[name] for name in about["labels"]], expected, atol=1e-5)
