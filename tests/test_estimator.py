"""The scikit-learn face: scikit-learn's own checks, its tools around it, what it takes, and what it leaves on disk."""

import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

import headstart
from headstart import features, predict, recent
from headstart.errors import ArgumentError, InputError, ModelError, RunError
from headstart.estimator import Encoder, TextClassifier, TextInput
from headstart.inputs import texts_in
from tests.conftest import SMALL_ROWS, WORDS, kinds_of_rows

HEAD: dict[str, Any] = {"device": "cpu", "precision": "fp32", "thaw": 0, "head_features": ("mean-1",), "head_width": 0}
HEAD |= {"weight_decay": 0.01, "lr": 3e-2, "epochs": 30, "patience": None, "random_state": 0}
"""A head with nothing left to search, whose weights change fast."""
TEXTS = [text for text, _ in SMALL_ROWS]
LABELS = np.array([int(label) for _, label in SMALL_ROWS])
FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)
NEW = ["the soup was great", "the phone was rude", "superb", ""]


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Each test begins as a process does."""
    recent._KEPT.clear()


@pytest.fixture
def make(tiny_bert: Path) -> Callable[..., Any]:
    """A classifier with such a head on a tiny encoder, and other parameters as given."""
    return lambda **given: TextClassifier(**{"model": str(tiny_bert), **HEAD, **given})


# --- scikit-learn's checks, which make numbers: each row becomes a sentence


def sentences(rows: Any) -> list[str]:
    """Rows of numbers as words, one a column and a tenth of the range from -3 to 3."""
    bins = np.clip(np.floor(np.asarray(rows, np.float64) * 2), -6, 5).astype(int) + 6
    return [" ".join(WORDS[(12 * place + one) % len(WORDS)] for place, one in enumerate(row)) for row in bins]


class OnNumbers(TextInput):
    """Takes numbers, as scikit-learn's checks give them, and validates them as scikit-learn does."""

    def _texts(self, X: Any, *, reset: bool) -> list[str]:
        return sentences(validate_data(self, X, reset=reset))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = False
        tags.input_tags.two_d_array = True
        return tags


class NumberClassifier(OnNumbers, TextClassifier):
    pass


class NumberEncoder(OnNumbers, Encoder):
    pass


CANNOT = {
    "check_sample_weight_equivalence_on_dense_data": "a row twice makes other batches than one that counts twice: it "
    "is so only nearly, as is tested below"
}


@parametrize_with_checks(
    [NumberClassifier(**HEAD), NumberEncoder(device="cpu", precision="fp32")],
    expected_failed_checks=lambda estimator: CANNOT,
)
def test_scikit_learns_checks(estimator: Any, check: Any, tiny_bert: Any) -> None:
    check(estimator.set_params(model=str(tiny_bert)))


# --- what a person does with it


def test_five_lines_lead_to_probabilities(tiny_bert: Path) -> None:
    from headstart import TextClassifier

    clf: Any = TextClassifier(model=str(tiny_bert), thaw=0, epochs=10)
    clf.fit(TEXTS, LABELS)
    probabilities = clf.predict_proba(TEXTS)

    assert probabilities.shape == (80, 2)
    assert clf.score(TEXTS, LABELS) > 0.9
    assert clf.metrics_["validation"]["n"] == 12
    assert "NumberClassifier" not in repr(clf)
    assert "thaw=0" in repr(clf)
    assert "TextClassifier" in clf._repr_html_()


def test_the_package_brings_neither_scikit_learn_nor_torch() -> None:
    said = "import sys, headstart; print([one for one in ('sklearn', 'torch', 'numpy') if one in sys.modules])"
    said += "; from headstart import TextClassifier; print(TextClassifier.__name__, headstart.Encoder.__name__)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "TextClassifier Encoder"]
    with pytest.raises(AttributeError, match="no attribute 'Encode'"):
        getattr(headstart, "Encode")  # noqa: B009


def test_every_default_is_that_of_the_command_line() -> None:
    from headstart.config import TrainConfig

    given = TextClassifier().get_params()
    own = {"class_weight", "validation_fraction", "random_state"}
    assert {name: given[name] for name in given.keys() - own} == {
        field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name in given.keys() - own
    }


def test_parameters_are_stored_cloned_and_set(make: Callable[..., Any]) -> None:
    clf = make(class_weight={0: 2.0})
    copy = clone(clf)
    assert copy.get_params() == clf.get_params()
    assert copy.set_params(lr=1e-4, thaw="2").get_params() == {**clf.get_params(), "lr": 1e-4, "thaw": "2"}
    with pytest.raises(ValueError, match="Invalid parameter 'epoch'"):
        clf.set_params(epoch=3)
    with pytest.raises(InputError, match="thaw takes a number of layers"):
        make(thaw="deep").fit(TEXTS, LABELS)
    with pytest.raises(ModelError, match="no such folder"):
        make(model="./nowhere").fit(TEXTS, LABELS)


def test_classes_are_as_they_were_given(make: Callable[..., Any]) -> None:
    clf = make().fit(TEXTS, LABELS.astype(np.int16))
    assert clf.classes_.dtype == np.int16
    assert clf.predict(TEXTS).dtype == np.int16
    words = np.array(["no", "yes"], dtype=object)[LABELS]
    assert make().fit(TEXTS, words).predict(TEXTS[:2]).tolist() == ["yes", "no"]
    assert make().fit(TEXTS, LABELS == 1).predict(TEXTS[:2]).tolist() == [True, False]
    numbers = make().fit(TEXTS, 10.0 - LABELS)
    assert numbers.classes_.tolist() == [9.0, 10.0]
    assert numbers._info["names"] == ["9", "10"]


def test_decisions_probabilities_and_classes_agree(make: Callable[..., Any]) -> None:
    clf = make().fit(TEXTS, LABELS)
    decision, probabilities = clf.decision_function(TEXTS), clf.predict_proba(TEXTS)
    assert decision.shape == (80,)
    np.testing.assert_allclose(probabilities[:, 1], 1 / (1 + np.exp(-decision)), rtol=1e-9)
    kinds = np.arange(80) % 4 // 2 + LABELS  # 0, 1 and 2
    three = make().fit(TEXTS, kinds)
    shares = np.exp(three.decision_function(NEW))
    np.testing.assert_allclose(three.predict_proba(NEW), shares / shares.sum(axis=1, keepdims=True), rtol=1e-9)
    assert three.predict(NEW).tolist() == three.classes_[shares.argmax(axis=1)].tolist()


def test_the_seed_decides(make: Callable[..., Any]) -> None:
    def said(random_state: Any) -> Any:
        return make(random_state=random_state, epochs=3).fit(TEXTS, LABELS).predict_proba(TEXTS)

    first = said(1)
    assert (said(np.int64(1)) == first).all()
    assert (said(2) != first).any()
    assert (said(None) == said(2021)).all()
    assert (said(np.random.RandomState(7)) == said(np.random.RandomState(7))).all()
    generator = np.random.RandomState(7)
    assert (said(generator) != said(generator)).any()


def test_a_weight_is_so_many_copies_of_a_row(make: Callable[..., Any]) -> None:
    full = make(batch_size=1000, validation_fraction=0, class_weight=None, epochs=150, lr=0.1, weight_decay=1e-9)
    texts = ["the film was great", "the film was great", "the hotel was awful", "the hotel was awful"]
    classes, weights = [0, 1, 0, 1], [1, 3, 4, 1]
    weighted = clone(full).fit(texts, classes, sample_weight=weights).predict_proba(texts)[:, 1]
    copied = clone(full).fit(np.repeat(texts, weights), np.repeat(classes, weights)).predict_proba(texts)[:, 1]
    np.testing.assert_allclose(weighted, [0.75, 0.75, 0.2, 0.2], atol=0.03)
    np.testing.assert_allclose(copied, weighted, atol=0.03)


def test_balanced_classes_count_alike_also_with_weights(make: Callable[..., Any]) -> None:
    balanced = make(batch_size=1000, validation_fraction=0, class_weight="balanced", epochs=150, lr=0.1)
    texts, classes, weights = ["the film was great"] * 3, [0, 0, 1], [1.0, 4.0, 2.0]
    for given in (None, weights):
        found = clone(balanced).fit(texts, classes, sample_weight=given).predict_proba(texts)
        np.testing.assert_allclose(found, 0.5, atol=0.02)
    uneven = clone(balanced).set_params(class_weight={0: 1, 1: 3}).fit(texts, classes, sample_weight=[1, 1, 2])
    np.testing.assert_allclose(uneven.predict_proba(texts)[:, 1], 0.75, atol=0.03)


def test_rows_without_weight_do_not_count(make: Callable[..., Any]) -> None:
    texts, classes = [*TEXTS, *TEXTS, "a"], np.array([*LABELS, *(1 - LABELS), 5])
    weights = np.array([1] * 80 + [0] * 81)
    clf = make(epochs=3).fit(texts, classes, sample_weight=weights)
    assert clf.classes_.tolist() == [0, 1]
    plain = make(epochs=3).fit(TEXTS, LABELS, sample_weight=np.ones(80))
    assert (clf.predict_proba(TEXTS) == plain.predict_proba(TEXTS)).all()


def test_few_texts_are_chosen_on_themselves(make: Callable[..., Any]) -> None:
    least = make().fit(["great", "awful"], ["yes", "no"])
    assert least.predict(["great", "awful"]).tolist() == ["yes", "no"]
    assert "validation" not in least.metrics_
    assert least.metrics_["calibration"] == {"method": "none", "temperature": 1.0}
    rare = make().fit([*TEXTS, "the room was superb"], [*LABELS, 2])
    assert "validation" not in rare.metrics_
    copies = make().fit(["great", "awful"] * 30, [1, 0] * 30)
    assert "validation" not in copies.metrics_
    assert make(validation_fraction=0.5).fit(TEXTS, LABELS).metrics_["validation"]["n"] == 40
    for share in (1.5, -0.1):
        with pytest.raises(ArgumentError, match="validation_fraction"):
            make(validation_fraction=share).fit(TEXTS, LABELS)


def test_a_thawed_encoder_is_trained_scored_and_kept(make: Callable[..., Any], tmp_path: Path) -> None:
    clf = make(thaw=1, epochs=20, lr=1e-2, head_features=None).fit(TEXTS, LABELS)
    assert [stage["name"] for stage in clf.metrics_["stages"]] == ["head", "thaw-1"]
    assert clf.score(TEXTS, LABELS) > 0.75
    clf.save(tmp_path / "run")
    for other in (TextClassifier.load(tmp_path / "run"), pickle.loads(pickle.dumps(clf))):
        np.testing.assert_allclose(other.predict_proba(NEW), clf.predict_proba(NEW), atol=1e-6)
        assert other.get_params() == clf.get_params()


def test_the_architectures_own_head(make: Callable[..., Any], tmp_path: Path) -> None:
    clf = make(head="native", head_features=None, epochs=60).fit(TEXTS, LABELS)
    clf.save(tmp_path / "run")
    np.testing.assert_allclose(
        TextClassifier.load(tmp_path / "run").predict_proba(NEW), clf.predict_proba(NEW), atol=1e-3
    )
    assert pickle.loads(pickle.dumps(clf)).predict(TEXTS).tolist() == clf.predict(TEXTS).tolist()


def test_several_labels_a_text(make: Callable[..., Any], tmp_path: Path) -> None:
    wanted = np.column_stack([LABELS, ["film" in text for text in TEXTS], [True] * 40 + [False] * 40]).astype(int)
    clf = make(epochs=100).fit(TEXTS, wanted)
    assert clf.classes_.tolist() == [0, 1, 2]
    assert clf.predict_proba(NEW).shape == (4, 3)
    assert clf.decision_function(NEW).shape == (4, 3)
    assert clf.predict(TEXTS).dtype.kind == "i"
    assert (clf.predict(TEXTS) == wanted).mean() > 0.9
    sparse = make(epochs=100).fit(TEXTS, csr_matrix(wanted))
    assert (sparse.predict_proba(TEXTS) == clf.predict_proba(TEXTS)).all()
    clf.save(tmp_path / "run")
    assert (TextClassifier.load(tmp_path / "run").predict(TEXTS) == clf.predict(TEXTS)).all()
    with pytest.raises(ArgumentError, match="only with one class a text"):
        make(class_weight={0: 1}).fit(TEXTS, wanted)


def test_ctrl_c_leaves_the_best_so_far_and_is_passed_on(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the second epoch of the head
            raise KeyboardInterrupt
        return step(*given)

    from headstart.train import Training

    step = Training.step
    monkeypatch.setattr(Training, "step", interrupted)
    clf = make()
    with pytest.raises(KeyboardInterrupt):
        clf.fit(TEXTS, LABELS)
    assert len(clf.predict(NEW)) == 4


# --- scikit-learn's tools around it


def test_a_grid_of_heads_encodes_each_text_once(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = list[int]()
    whole = features.frozen_features

    def counted(*given: Any) -> Any:
        found = whole(*given)
        encoded.append(found.encoded)
        return found

    monkeypatch.setattr(recent, "frozen_features", counted)
    grid = GridSearchCV(make(), {"head_width": [0, 8], "lr": [1e-2, 1e-3]}, cv=FOLDS).fit(TEXTS, LABELS)
    assert sum(encoded) == 80
    assert len(encoded) == 2, "a fold's texts, and the rest: all others were in memory"
    assert grid.best_estimator_.features_ == {"texts": 80, "encoded": 0, "reused": 80, "bytes": 80 * 5 * 32 * 2}
    assert grid.best_score_ > 0.8
    assert grid.predict(TEXTS[:2]).tolist() == [1, 0]


def test_pipelines_folds_votes_and_calibration(make: Callable[..., Any]) -> None:
    assert cross_val_score(make_pipeline(make()), TEXTS, LABELS, cv=FOLDS).mean() > 0.8
    assert cross_val_predict(make(), TEXTS, LABELS, cv=FOLDS, method="predict_proba").shape == (80, 2)
    words = make_pipeline(TfidfVectorizer(), LogisticRegression())
    votes = VotingClassifier([("mine", make()), ("words", words)], voting="soft").fit(TEXTS, LABELS)
    assert votes.score(TEXTS, LABELS) > 0.9
    calibrated = CalibratedClassifierCV(make(), cv=FOLDS).fit(TEXTS, LABELS)
    assert calibrated.score(TEXTS, LABELS) > 0.9


def test_vectors_for_a_pipeline_of_ones_own(tiny_bert: Path) -> None:
    encoder = Encoder(model=str(tiny_bert), device="cpu", precision="fp32")
    pipeline = make_pipeline(encoder, LogisticRegression(max_iter=1000, C=100))
    assert cross_val_score(pipeline, TEXTS, LABELS, cv=FOLDS).mean() > 0.8
    vectors = encoder.fit_transform(NEW)
    assert (vectors.shape, vectors.dtype) == ((4, 32), np.float32)
    assert encoder.get_feature_names_out()[:2].tolist() == ["mean-3_0", "mean-3_1"]
    more = clone(encoder).set_params(features=("pooler", "cls", "mean-0"))
    assert more.transform(NEW).shape == (4, 96)
    assert (clone(encoder).set_params(features="mean-3").transform(NEW) == vectors).all()
    frame = clone(encoder).set_output(transform="pandas").fit_transform(pd.Series(NEW, index=[5, 6, 7, 8]))
    assert frame.columns[-1] == "mean-3_31"
    with pytest.raises(ModelError, match="no feature 'mean-9'"):
        clone(encoder).set_params(features=["mean-9"]).transform(NEW)
    with pytest.raises(ArgumentError, match="takes at most 64 tokens"):
        clone(encoder).set_params(max_length=65).transform(NEW)
    cut = clone(encoder).set_params(max_length=4).transform(["the soup was great", "the soup"])
    assert (cut[0] == cut[1]).all()


# --- what it takes

FRAME = pd.DataFrame({"sentence": TEXTS})
SAME_TEXTS: dict[str, Any] = {
    "tuple": tuple(TEXTS),
    "numpy strings": np.array(TEXTS),
    "numpy objects": np.array(TEXTS, dtype=object),
    "numpy column": np.array(TEXTS)[:, None],
    "pandas Series": FRAME["sentence"],
    "pandas Series of objects": FRAME["sentence"].astype(object),
    "pandas categories": FRAME["sentence"].astype("category"),
    "pandas DataFrame": FRAME,
    "polars Series": pl.Series(TEXTS),
    "polars DataFrame": pl.DataFrame({"sentence": TEXTS}),
    "pyarrow Array": pa.array(TEXTS),
    "pyarrow ChunkedArray": pa.chunked_array([TEXTS[:9], TEXTS[9:]]),
    "pyarrow Table": pa.table({"sentence": TEXTS}),
    "datasets column": datasets.Dataset.from_dict({"sentence": TEXTS})["sentence"],
    "datasets Dataset": datasets.Dataset.from_dict({"sentence": TEXTS}),
}


@pytest.mark.parametrize("kind", SAME_TEXTS)
def test_texts_come_in_any_shape(kind: str, make: Callable[..., Any]) -> None:
    assert texts_in(SAME_TEXTS[kind]) == TEXTS
    clf = make(epochs=1).fit(SAME_TEXTS[kind], LABELS)
    is_column = len(getattr(SAME_TEXTS[kind], "shape", ())) == 2
    assert getattr(clf, "n_features_in_", None) == (1 if is_column else None)
    assert len(clf.predict(SAME_TEXTS[kind])) == len(clf.predict(TEXTS))


def test_the_columns_name_is_noted(make: Callable[..., Any]) -> None:
    clf = make(epochs=1).fit(FRAME, LABELS)
    assert clf.feature_names_in_.tolist() == ["sentence"]
    with pytest.raises(ValueError, match="feature names should match"):
        clf.predict(FRAME.rename(columns={"sentence": "label"}))
    assert not hasattr(clf.fit(TEXTS, LABELS), "feature_names_in_")
    assert not hasattr(clf, "n_features_in_")


@pytest.mark.parametrize(
    "labels",
    [
        *(LABELS.tolist(), pd.Series(LABELS), pl.Series(LABELS), pa.array(LABELS), LABELS.astype(object)),
        *(pd.Series(LABELS).astype("category"), datasets.Dataset.from_dict({"label": LABELS})["label"]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_classes_come_in_any_shape(labels: Any, make: Callable[..., Any]) -> None:
    assert make(epochs=1).fit(TEXTS, labels).classes_.tolist() == [0, 1]


BAD_TEXTS: dict[str, tuple[Any, str]] = {
    "a lone text": ("worth every penny", r"give a list of texts: \['worth every penny'\]"),
    "no text": ([], "There are no texts"),
    "numbers": ([1.5, 2.5], r"Not a text at positions 0 and 1, counted from 0: 1.5 \(float\)"),
    "one missing": (["a", None, "b"], r"Not a text at position 1, counted from 0: None"),
    "a NaN": (pd.Series(["a", float("nan")], dtype=object), "position 1, counted from 0: nan"),
    "a missing value": (pd.Series(["a", pd.NA], dtype="string"), "position 1, counted from 0: <NA>"),
    "a null": (pa.array(["a", None]), "position 1, counted from 0: None"),
    "bytes": ([b"a", "b"], "position 0"),
    "two columns": (pd.DataFrame({"a": ["x"], "b": ["y"]}), "there are 2 columns"),
    "a data set of two columns": (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), "there are 2 columns"),
    "ragged lists": ([["a"], ["b", "c"]], r"Not a text at positions 0 and 1, counted from 0: \['a'\] \(list\)"),
    "a number": (5, "not as int"),
    "nothing": (None, "not as NoneType"),
    "a sparse matrix": (csr_matrix(np.eye(2)), "Not a text at positions 0 and 1"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_what_is_no_text_is_refused_in_a_sentence(kind: str, make: Callable[..., Any]) -> None:
    given, said = BAD_TEXTS[kind]
    for refused in (InputError, ValueError):
        with pytest.raises(refused, match=said):
            make().fit(given, LABELS)
    with pytest.raises(ArgumentError, match=said):
        Encoder().transform(given)


BAD_CLASSES: dict[str, tuple[Any, str]] = {
    "none": (None, "requires y to be passed, but the target y is None"),
    "a missing one": (["a", None] * 40, "Not a class at positions 1, 3, .*counted from 0: None"),
    "a NaN": ([0.0] * 79 + [np.nan], "Not a class at position 79 of y, counted from 0: nan"),
    "fractions": ((LABELS + 0.5).tolist(), "continuous"),
    "one class": ([3] * 80, r"y has one class \('3'\), and at least two are needed"),
    "too few": (LABELS[:-1], "inconsistent numbers of samples"),
    "lists": ([["a"], ["a", "b"]] * 40, "MultiLabelBinarizer"),
}


@pytest.mark.parametrize("kind", BAD_CLASSES)
def test_what_is_no_class_is_refused_in_a_sentence(kind: str, make: Callable[..., Any]) -> None:
    given, said = BAD_CLASSES[kind]
    with pytest.raises(ValueError, match=said):
        make().fit(TEXTS, given)


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1.0] * 79, "shape"), ([-1.0] * 80, "below zero"), ([0] * 80, "weights are zero"), ([np.nan] * 80, "no number")],
)
def test_what_is_no_weight_is_refused(weights: Any, said: str, make: Callable[..., Any]) -> None:
    with pytest.raises(ArgumentError, match=said):
        make().fit(TEXTS, LABELS, sample_weight=weights)


def test_nothing_is_said_before_it_is_fitted(make: Callable[..., Any], tmp_path: Path) -> None:
    for method in ("predict", "predict_proba", "decision_function"):
        with pytest.raises(NotFittedError):
            getattr(make(), method)(TEXTS)
    with pytest.raises(NotFittedError):
        make().save(tmp_path / "run")


# --- on disk and elsewhere


def test_a_saved_classifier_is_a_run_folder(make: Callable[..., Any], tmp_path: Path) -> None:
    clf = make().fit(TEXTS, LABELS)
    clf.save(tmp_path / "run")
    names = {one.name for one in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "headstart.json", "metrics.json"} <= names
    predictor = headstart.load(tmp_path / "run")
    np.testing.assert_allclose(predictor.predict_proba(NEW), clf.predict_proba(NEW), atol=1e-4)
    assert predictor.classifier.info["out"] == str(tmp_path / "run")
    with pytest.raises(RunError):
        clf.save(tmp_path / "run")
    clf.save(tmp_path / "run", overwrite=True)
    again = TextClassifier.load(tmp_path / "run")
    assert again.get_params() == clf.get_params()
    assert again.metrics_ == clf.metrics_
    again.save(tmp_path / "again")
    assert {one.name for one in (tmp_path / "again").iterdir()} == names


@pytest.mark.parametrize("kind", ["int64", "float64", "bool", "str", "object", "uint8"])
def test_classes_come_back_as_they_were(kind: str, make: Callable[..., Any], tmp_path: Path) -> None:
    clf = make(epochs=1).fit(TEXTS, LABELS.astype(kind))
    clf.save(tmp_path / "run")
    found = TextClassifier.load(tmp_path / "run").classes_
    assert found.dtype == clf.classes_.dtype
    assert found.tolist() == clf.classes_.tolist()


def test_a_run_of_the_command_line_loads(tiny_run: Path, tmp_path: Path) -> None:
    clf: Any = TextClassifier.load(tiny_run)
    assert clf.classes_.tolist() == [0, 1]
    assert (clf.thaw, clf.epochs, clf.random_state) == (0, 20, 2021)
    predictor = predict.load(tiny_run, device="cpu", precision=clf.precision)
    np.testing.assert_allclose(clf.predict_proba(NEW), predictor.predict_proba(NEW), atol=1e-2)
    assert clf.score(TEXTS, LABELS) > 0.9
    assert clone(clf).fit(TEXTS, LABELS).score(TEXTS, LABELS) > 0.9
    clf.save(tmp_path / "run")
    assert predict.load(tmp_path / "run").predict(NEW[:1]) == ["1"]
    assert not (tmp_path / "run" / "predictions.csv").exists(), "a pickle would take these texts along"
    with pytest.raises(RunError, match="no such run folder"):
        TextClassifier.load(tmp_path / "nowhere")


class Reader(pickle.Unpickler):
    """Notes what a pickle asks for."""

    modules: set[str]

    def find_class(self, module: str, name: str) -> Any:
        self.modules = getattr(self, "modules", set()) | {module}
        return super().find_class(module, name)


OTHER_PROCESS = """
import sys, joblib
clf = joblib.load(sys.argv[1])
print(*clf.predict_proba(["the soup was great", "the phone was rude"])[:, 1], type(clf._scorer).__name__)
"""


def test_a_pickle_is_a_run_folder_and_nothing_of_torch(
    make: Callable[..., Any], tiny_bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "encoder")
    clf = make(model=str(tmp_path / "encoder")).fit(TEXTS, LABELS)
    said = pickle.dumps(clf)
    reader = Reader(io.BytesIO(said))
    same = reader.load()
    assert {module.split(".")[0] for module in reader.modules} == {"headstart", "numpy"}
    assert "model.safetensors" in same._files
    assert (same.predict_proba(TEXTS) == clf.predict_proba(TEXTS)).all()
    joblib.dump(clf, tmp_path / "clf.joblib")
    shutil.rmtree(tmp_path / "encoder")
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "clf.joblib")]
    source = str(Path(headstart.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
    *shares, scorer = done.stdout.split()
    np.testing.assert_allclose([float(one) for one in shares], clf.predict_proba(NEW[:2])[:, 1], atol=1e-4)
    assert scorer != "FrozenScorer"  # which no process has before an encoder is loaded


def test_dropout_is_that_of_the_head(make: Callable[..., Any]) -> None:
    found = [make(head_width=8, head_dropout=share).fit(TEXTS, LABELS).predict_proba(NEW) for share in (0.0, 0.9)]
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_a_pooled_head_is_not_fine_tuned(make: Callable[..., Any]) -> None:
    clf = make(head="pooled", thaw="auto").fit(TEXTS, LABELS)
    assert clf.score(TEXTS, LABELS) > 0.9


def test_what_it_saved_is_served(make: Callable[..., Any], tmp_path: Path) -> None:
    import asyncio
    import json

    from headstart.config import ServeConfig
    from headstart.serve.app import Service

    make().fit(TEXTS, LABELS).save(tmp_path / "run")
    service = Service(tmp_path / "run", predict.load(tmp_path / "run").classifier, ServeConfig())
    assert json.loads(bytes(asyncio.run(service.info()).body))["test"] is None


def test_the_labels_of_a_run_with_several_keep_their_names(train: Callable[..., Any]) -> None:
    run = train(kinds_of_rows()["multi"]).folder
    assert TextClassifier.load(run).classes_.tolist() == list(predict.load(run).names)


def test_inputs_that_are_none_are_refused(make: Callable[..., Any], tiny_bert: Path) -> None:
    for given, y, said in (
        ({"class_weight": "balancd"}, LABELS, "class-weight"),
        ({"validation_fraction": None}, LABELS, "validation_fraction"),
        ({}, np.where(np.eye(2)[LABELS] > 0, 1, -1), "0 and 1"),
    ):
        with pytest.raises(InputError, match=said):
            make(**given).fit(TEXTS, y, sample_weight=np.ones(len(TEXTS)))
    with pytest.raises(ArgumentError, match="dict"):
        make().fit({"a": TEXTS}, LABELS)
    with pytest.raises(InputError, match="max-length"):
        Encoder(model=str(tiny_bert), max_length=-3).transform(TEXTS)
