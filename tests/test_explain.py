"""Words and their scores: they add up, are those of the text, and follow what the model does; neighbours by cosine."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headstart import config, predict
from headstart.encoder import Encoder, choose_placement
from headstart.errors import InputError
from headstart.explain import FEW, WORDS, explain, integrated_gradients, neighbours
from headstart.features import frozen_features
from headstart.model import LibraryScorer, TorchClassifier, load_run
from headstart.predict import Predictor
from headstart.prepare import read
from headstart.report import filled
from headstart.run import Run
from headstart.run import train as run_train
from tests.conftest import BAD, GOOD, SMALL_ROWS, kinds_of_rows

FP32 = choose_placement("cpu", "fp32")


@pytest.fixture(scope="module")
def classifier(tiny_run: Path) -> TorchClassifier:
    return load_run(tiny_run, FP32)


def learn(model: Path, table: Path, out: Path, **settings: object) -> TorchClassifier:
    given = {"thaw": "0", "epochs": 30, "lr": 1e-2, "precision": "fp32", **settings}
    run_train(config.settings(str(table), model=str(model), out=str(out), **given))  # type: ignore[arg-type]
    return load_run(out, FP32)


# --- the scores


def test_scores_add_up_to_the_change_in_log_odds(classifier: TorchClassifier) -> None:
    text = "the film was superb, and the soup was lovely"
    got = explain(classifier, text)
    tokenizer, scorer = classifier.tokenizer, classifier.model
    ids = torch.from_numpy(tokenizer([text])[0][None].astype(np.int64))
    masked = ids.clone()
    masked[:, 1:-1] = tokenizer.fast.token_to_id("[MASK]")
    with torch.no_grad():
        odds = [
            float(logits[0] - logits[1]) for logits in (scorer(one, torch.ones_like(one))[0] for one in (ids, masked))
        ]
    change = (odds[0] - odds[1]) * (1 if got.label == "0" else -1)
    total = sum(word.score or 0.0 for word in got.words)
    assert abs(change) > 10 * got.completeness_error
    assert total == pytest.approx(change, abs=got.completeness_error + 1e-4)
    assert got.completeness_error == pytest.approx(abs(change - total), abs=1e-4)
    assert got.confidence == pytest.approx(predict.Predictor(classifier).predict_proba([text]).max(), abs=1e-5)


def test_words_that_a_model_does_not_tell_apart_have_no_say(tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    found = learn(tiny_bert, small_table, tmp_path / "run")
    got = explain(found, "the film was superb")
    scores = {word.word: word.score or 0.0 for word in got.words}
    assert max(scores, key=lambda word: abs(scores[word])) == "superb", "the one word that decides in this table"


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "electra", "distilbert", "albert", "mpnet", "deberta-v2", "modernbert"]
)
@pytest.mark.parametrize("head", ["native", "pooled"])
def test_every_family_explains_itself(
    family: str, head: str, tiny_models: Callable[[str], Path], small_table: Path, tmp_path: Path
) -> None:
    found = learn(tiny_models(family), small_table, tmp_path / "run", head=head, epochs=2, head_width=0)
    got = explain(found, "the waiter was rude, the room lovely")
    assert [word.word for word in got.words] == ["the", "waiter", "was", "rude,", "the", "room", "lovely"]
    scores = np.array([word.score for word in got.words], dtype=float)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() > 0
    assert got.completeness_error <= 0.05 * max(1.0, abs(scores).sum())
    assert isinstance(found.model, LibraryScorer) == (family in ("albert", "mpnet", "deberta-v2", "modernbert"))


def test_features_far_beyond_half_precision_have_gradients_too(classifier: TorchClassifier) -> None:
    scorer = classifier.model
    steep = {name: one.clone() for name, one in scorer.head.state_dict().items()}  # type: ignore[union-attr]
    try:
        scorer.head.scale.mul_(1e6)  # type: ignore[union-attr]
        got = explain(classifier, "the film was superb")
    finally:
        scorer.head.load_state_dict(steep)  # type: ignore[union-attr]
    assert all(word.score is not None and np.isfinite(word.score) for word in got.words)


def test_other_weights_give_another_explanation(classifier: TorchClassifier) -> None:
    text = "the film was superb and the hotel was lovely"
    before = np.array([word.score for word in explain(classifier, text).words], dtype=float)
    torch.manual_seed(0)
    shuffled = load_run_with_random_layers(classifier)
    after = np.array([word.score for word in explain(shuffled, text).words], dtype=float)
    assert np.corrcoef(before, after)[0, 1] < 0.9


def load_run_with_random_layers(classifier: TorchClassifier) -> TorchClassifier:
    import copy

    model = copy.deepcopy(classifier.model)
    model.layers = [
        [(torch.randn_like(weight) * weight.std(), bias) for weight, bias in layer] for layer in model.layers
    ]
    return replace(classifier, model=model)


@pytest.mark.parametrize("points", [1, 4, 50])
def test_the_integral_is_taken_in_pieces_and_is_exact_for_a_square(
    points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.explain.AT_ONCE", 20)
    asked: list[int] = []

    def square(states: torch.Tensor) -> torch.Tensor:
        asked.append(len(states))
        return (states**2).sum(dim=(1, 2))

    start, end = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    got = integrated_gradients(square, start, end, points)
    torch.testing.assert_close(got, end**2 - start**2)
    assert sum(asked) == points
    assert max(asked) <= 4, "no more than 20 tokens together"


def test_more_points_add_up_better(classifier: TorchClassifier) -> None:
    text = "the film was superb, and the soup was lovely"
    few, many = (explain(classifier, text, points).completeness_error for points in (2, 50))
    assert many < few


def test_the_quick_way_agrees_on_what_counts_most(tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    found = learn(tiny_bert, small_table, tmp_path / "run")
    quick = explain(found, "the film was superb", FEW)
    assert max(quick.words, key=lambda word: abs(word.score or 0.0)).word == "superb"


# --- the words


def test_a_text_of_which_the_tokenizer_keeps_nothing(classifier: TorchClassifier) -> None:
    got = explain(classifier, "\x01\x02")
    assert [word.score for word in got.words] == [None]
    assert "not read" in filled("explain.html", {**asdict(got), "nearest": []})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the film wasn't un-lovely!", ["the", "film", "wasn't", "un-lovely!"]),
        ("  two\tspaces\nand lines ", ["two", "spaces", "and", "lines"]),
        ("电影 good", ["电", "影", "good"]),
        ("zebraunknown 😒 film", ["zebraunknown", "😒", "film"]),
    ],
)
def test_word_pieces_are_merged_into_words(text: str, words: list[str], classifier: TorchClassifier) -> None:
    got = explain(classifier, text)
    assert [word.word for word in got.words] == words
    assert all(text[word.start : word.end] == word.word for word in got.words)
    assert words == WORDS.findall(text)


def test_words_beyond_max_length_were_not_read(classifier: TorchClassifier) -> None:
    text = "the film was superb " * 10
    got = explain(classifier, text)
    read = [word for word in got.words if word.score is not None]
    assert len(read) == classifier.max_length - 2
    assert all(word.score is None for word in got.words[len(read) :])
    assert got.words[len(read)].word == text.split()[len(read)]


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_text_has_nothing_to_explain(text: str, classifier: TorchClassifier) -> None:
    with pytest.raises(InputError, match="nothing to explain"):
        explain(classifier, text)


# --- neighbours


def test_neighbours_are_training_texts_while_the_table_is_as_it_was(train: Callable[..., Run]) -> None:
    done = train([*SMALL_ROWS, *SMALL_ROWS[:40]])
    splits, _ = read(config.settings(done.info["settings"]["data"]))
    text = splits.train.texts[3]
    assert len(set(splits.train.texts)) < len(splits.train), "some stand there twice"
    found = neighbours(done.folder, text)
    assert found[0]["text"] == text
    assert len({one["text"] for one in found}) == 5, "each text once"
    encoder = Encoder(done.info["settings"]["model"], FP32)
    all_texts = sorted(set(splits.train.texts))
    tokens = encoder.tokenizer(all_texts)
    vectors = frozen_features(encoder, tokens).columns(["mean-3"])[:, 0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[all_texts.index(text)]
    assert [one["similarity"] for one in found] == pytest.approx(sorted(cosines.tolist(), reverse=True)[:5], abs=1e-3)
    assert found[0]["similarity"] == pytest.approx(1, abs=2e-3)
    assert len(found) == 5
    labels = dict(zip(splits.train.texts, (splits.train.names[i] for i in splits.train.labels), strict=True))
    assert all(labels[one["text"]] == one["label"] for one in found)
    table = Path(done.info["settings"]["data"])
    table.write_text(table.read_text() + "one more,0\n")
    with pytest.raises(InputError, match="has changed since"):
        neighbours(done.folder, text)
    table.unlink()
    with pytest.raises(InputError, match="no such file"):
        neighbours(done.folder, text)


def test_a_text_read_in_windows_is_explained_to_its_end(train: Callable[..., Run]) -> None:
    rows = kinds_of_rows()["long"]
    run = train(rows, epochs=30, long="windows", max_length=32, head_features=("mean-3",), head_width=0).folder
    classifier = load_run(run, choose_placement("cpu", "fp32"))
    found = explain(classifier, rows[0][0])
    assert all(word.score is not None for word in found.words)
    assert found.completeness_error < 0.1
    last = found.words[-1]
    assert last.word in (*GOOD, *BAD)
    assert abs(last.score or 0) > 0.02, "in one window of three, and yet it counts"
    both = explain(
        load_run(
            train(rows, out="ends", long="head-tail", max_length=32, epochs=30).folder, choose_placement("cpu", "fp32")
        ),
        rows[0][0],
    )
    read = [word.score is not None for word in both.words]
    assert read[0]
    assert read[-1]
    assert not all(read)


def test_of_several_labels_the_likeliest_is_explained_alone(train: Callable[..., Run]) -> None:
    run = train(kinds_of_rows()["multi"], epochs=30).folder
    classifier = load_run(run, choose_placement("cpu", "fp32"))
    found = explain(classifier, "the soup and the waiter")
    shares = Predictor(classifier).predict_proba(["the soup and the waiter"])[0]
    assert found.label == classifier.names[shares.argmax()]
    assert found.confidence == pytest.approx(shares.max())
    assert found.completeness_error < 0.1


@pytest.mark.parametrize("kind", ["multi", "long"])
def test_neighbours_of_other_kinds_have_their_own_labels(kind: str, train: Callable[..., Run]) -> None:
    rows = kinds_of_rows()[kind]
    done = train(rows, **({"long": "windows", "max_length": 32} if kind == "long" else {}))
    splits, _ = read(config.settings(done.info["settings"]["data"]))
    labels = dict(zip(splits.train.texts, splits.train.written, strict=True))
    found = neighbours(done.folder, splits.train.texts[7])
    assert found[0]["text"] == splits.train.texts[7]
    assert found[0]["similarity"] == pytest.approx(1, abs=2e-3)
    assert all(labels[one["text"]] == one["label"] for one in found)
