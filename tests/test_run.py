"""One run from a table to a run folder: what the contract promises of it, and that its numbers are honest."""

import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

import headstart
from headstart import config, judge, metrics, predict, run
from headstart.prepare import read
from headstart.run import Run
from headstart.train import FeatureBatches
from tests.conftest import BAD, EXACT, GOOD, NOUNS, QUICK, SMALL_ROWS, kinds_of_rows, write_csv

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["headstart.model"])

SEARCHED: dict[str, Any] = {"head_features": None, "head_width": None, "epochs": 3}
"""With `QUICK`: layers and width are searched for, as they are by default."""

WORDS = {"great": (*GOOD, "great"), "rude": (*BAD, "rude"), "so": ("very", "not", "at", "un")}


def three_kinds(names: tuple[str, str, str], counts: tuple[int, int, int] = (30, 20, 12)) -> list[tuple[str, str]]:
    """Distinct texts with three labels, not equally common; one word decides the label."""
    rows = []
    for name, count, words in zip(names, counts, WORDS.values(), strict=True):
        rows += [(f"the {NOUNS[i % 10]} was {words[i // 10]} {i}", name) for i in range(count)]
    np.random.default_rng(5).shuffle(rows)
    return [(str(text), str(label)) for text, label in rows]


@pytest.fixture(scope="module")
def done(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory, _session_cache: None) -> Run:
    """A quick run on three labels, not equally common."""
    folder = tmp_path_factory.mktemp("done")
    table = write_csv(folder / "three.csv", three_kinds(("a", "b", "c")))
    return run.train(config.settings(str(table), model=str(tiny_bert), out=str(folder / "run"), **QUICK))


def train_elsewhere(cache: str, table: str, given: dict[str, Any]) -> None:
    """In a child: its sets have another order, its store is empty, and other random numbers were drawn before."""
    os.environ["HEADSTART_CACHE_DIR"] = cache
    torch.manual_seed(99)
    headstart.train(table, **given)


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """A run of another process, which is started before the first test since it takes seconds to import all it needs.

    Call it to wait for the run folder.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    table = write_csv(folder / "run.csv", SMALL_ROWS)
    given = {"model": str(tiny_bert), "out": str(folder / "run"), **QUICK, **SEARCHED}
    child = processes.Process(target=train_elsewhere, args=(str(folder / "cache"), str(table), given))
    child.start()

    def finished() -> Path:
        child.join()
        assert child.exitcode == 0
        return folder / "run"

    yield finished
    child.kill()
    child.join()


def sha256(folder: Path, name: str = "model.safetensors") -> str:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def predictions(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and rows of predictions.csv."""
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)


def probabilities(rows: list[dict[str, str]], names: Iterable[str]) -> NDArray[np.float64]:
    return np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])


# --- the run folder

PART = {
    **{"n": int, "accuracy": float, "accuracy_ci95": list, "macro_f1": float, "log_loss": float, "ece": float},
    **{"per_label": dict, "confusion_matrix": list, "labels": list},
}
CONTRACT: dict[str, Any] = {
    "test": PART,
    "validation": PART,
    "baselines": {name: {"accuracy": float, "macro_f1": float} for name in ("majority", "tfidf_logreg")},
    "stages": list,
    "timing": dict.fromkeys(("read", "tokenize", "encode", "train", "evaluate", "total"), float),
    "features": dict.fromkeys(("texts", "encoded", "reused", "bytes"), int),
}


def shape_of(value: Any, like: Any) -> Any:
    """The keys and types of `value`, as deep as `like` goes."""
    return {name: shape_of(one, like.get(name)) for name, one in value.items()} if type(like) is dict else type(value)


def test_metrics_have_the_contracts_keys_and_shapes(done: Run) -> None:
    content = json.loads((done.folder / "metrics.json").read_text(encoding="utf-8"))
    assert content == done.metrics
    assert shape_of({name: content[name] for name in CONTRACT}, CONTRACT) == CONTRACT
    assert set(content) - set(CONTRACT) == {
        *("comparisons", "intervals", "calibration", "coverage", "slices", "contradicted", "learning_curve")
    }
    for name, part in (("test", content["test"]), ("validation", content["validation"])):
        assert part["n"] == done.info["split"][name]
        assert part["labels"] == list(part["per_label"]) == ["a", "b", "c"]
        for one in part["per_label"].values():
            assert shape_of(one, {}) == {"precision": float, "recall": float, "f1": float, "support": int}
        assert [sum(row) for row in part["confusion_matrix"]] == [one["support"] for one in part["per_label"].values()]
        low, high = part["accuracy_ci95"]
        assert 0 <= low <= part["accuracy"] <= high <= 1
    (stage,) = content["stages"]
    assert shape_of(stage, {}) == {"name": str, "epochs": int, "validation_accuracy": float, "seconds": float}
    assert stage["name"] == "head"
    assert content["features"] == {"texts": 62, "encoded": 62, "reused": 0, "bytes": 62 * 5 * 32 * 2}


def test_the_folder_says_what_was_done(train: Callable[..., Run]) -> None:
    done = train(label_names=("bad", "good"), seed=7)
    info = json.loads((done.folder / "headstart.json").read_text(encoding="utf-8"))
    assert info == json.loads(json.dumps(done.info))
    expected = config.settings(**{name: value for name, value in info["settings"].items() if value is not None})
    assert info["settings"] == json.loads(json.dumps(dataclasses.asdict(expected))), (
        "every setting, and it can be given again"
    )
    assert info["settings"]["lr"] == 1e-2
    assert (info["names"], info["labels"], info["seed"]) == (["bad", "good"], ["0", "1"], 7)
    assert info["split"] == {"train": 56, "validation": 12, "test": 12}
    assert info["columns"] == ["sentence", "label"]
    assert info["versions"]["torch"] == torch.__version__
    assert info["timing"] == done.metrics["timing"]
    assert (info["head"]["kind"], info["interrupted"]) == ("pooled", False)
    assert len(info["history"]) == done.metrics["stages"][0]["epochs"]
    assert {path.name for path in done.folder.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modeling_headstart.py"),
        *("headstart.json", "metrics.json", "predictions.csv", "README.md", "report.html"),
    }
    assert [path.name for path in done.folder.parent.iterdir() if path.is_dir()] == ["run"], "nothing beside it"


def test_the_kept_epoch_is_the_one_whose_validation_is_told(train: Callable[..., Run]) -> None:
    done = train(epochs=12, lr=0.3, calibration="none")  # so hard that the last epoch is not the best
    losses = [epoch["validation_loss"] for epoch in done.info["history"]]
    best = int(np.argmin(losses))
    assert best < len(losses) - 1
    accuracy = done.info["history"][best]["validation_accuracy"]
    assert done.metrics["stages"][0]["validation_accuracy"] == accuracy
    assert done.metrics["validation"]["accuracy"] == pytest.approx(accuracy)
    assert done.metrics["validation"]["log_loss"] == pytest.approx(losses[best], rel=1e-4)  # classes are balanced here


def test_the_temperature_is_in_the_weights(train: Callable[..., Run]) -> None:
    heads = {kind: train(calibration=kind, out=kind) for kind in ("temperature", "none")}
    heat = heads["temperature"].metrics["calibration"]["temperature"]
    assert abs(heat - 1) > 0.01
    cooled, plain = (load_file(heads[kind].folder / "model.safetensors") for kind in ("temperature", "none"))
    last = max(name for name in plain if name.startswith("head.layers.")).rpartition(".")[0]
    for name, tensor in plain.items():
        divided = tensor / heat if name.startswith(last) else tensor
        torch.testing.assert_close(cooled[name], divided, msg=name)
    for kind in heads:
        said, rows = predict.load(heads[kind].folder, **EXACT), predictions(heads[kind].folder)[1]
        shares = said.predict_proba([row["text"] for row in rows])
        told = [[float(row[f"p_{name}"]) for name in said.names] for row in rows]
        np.testing.assert_allclose(shares, told, atol=1e-4)


def test_the_articles_recipe_is_left_as_it_is(train: Callable[..., Run]) -> None:
    done = train(recipe="article", epochs=1)
    assert done.metrics["calibration"]["method"] == "none"
    assert done.metrics["calibration"]["temperature"] == 1.0
    assert done.metrics["learning_curve"] == []


def test_the_learning_curve_ends_in_the_head_itself(done: Run) -> None:
    curve = done.metrics["learning_curve"]
    assert [point["texts"] for point in curve][-1] == done.info["split"]["train"]
    assert [point["texts"] for point in curve] == sorted(point["texts"] for point in curve)
    assert curve[-1]["validation_accuracy"] == done.metrics["stages"][0]["validation_accuracy"]


def test_the_baselines_are_of_the_same_split(done: Run) -> None:
    splits, _ = read(config.settings(done.info["settings"]["data"], **QUICK))
    said = metrics.baselines(splits.train.texts, splits.train.labels, splits.test.texts)
    expected = {name: metrics.scores(one, splits.test.labels) for name, one in said.items()}
    assert done.metrics["baselines"] == expected
    _, rows = predictions(done.folder)
    assert expected["majority"]["accuracy"] == pytest.approx(np.mean([row["label"] == "a" for row in rows]))


def test_predictions_agree_with_metrics(done: Run) -> None:
    test = done.metrics["test"]
    header, rows = predictions(done.folder)
    assert header == ["text", "label", "prediction", "confidence", "p_a", "p_b", "p_c"]
    said = probabilities(rows, "abc")
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=3e-6)
    assert [row["prediction"] for row in rows] == ["abc"[i] for i in said.argmax(axis=1)]
    assert [float(row["confidence"]) for row in rows] == said.max(axis=1).tolist()
    table = [[sum((row["label"], row["prediction"]) == (t, p) for row in rows) for p in "abc"] for t in "abc"]
    assert table == test["confusion_matrix"]
    assert test["n"] == len(rows)
    assert test["accuracy"] == pytest.approx(np.mean([row["label"] == row["prediction"] for row in rows]))
    given = [float(row[f"p_{row['label']}"]) for row in rows]
    assert test["log_loss"] == pytest.approx(-np.log(given).mean(), abs=1e-4)


@pytest.mark.parametrize("head", ["pooled", "native"])
def test_the_saved_classifier_says_again_what_was_tested(head: str, train: Callable[..., Run]) -> None:
    done = train(head=head, epochs=12)
    _, rows = predictions(done.folder)
    predictor = predict.load(done.folder, device="cpu", precision="fp32")
    texts = [row["text"] for row in rows]
    assert predictor.predict(texts) == [row["prediction"] for row in rows]
    np.testing.assert_allclose(predictor.predict_proba(texts), probabilities(rows, "01"), atol=1e-3)
    assert np.ptp(probabilities(rows, "0")) > 0.05, "texts should get answers of their own"


def test_total_is_the_whole_process(tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    given = config.settings(str(small_table), model=str(tiny_bert), out=str(tmp_path / "r"), **QUICK)
    seconds = run.train(given, started=time.time() - 1000).metrics["timing"]
    assert seconds["total"] > 1000
    assert all(seconds[part] > 0 for part in ("read", "encode", "train", "evaluate"))


def test_without_out_it_goes_to_runs(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "my table.csv", SMALL_ROWS)
    done = headstart.train("my table.csv", model=str(tiny_bert), **QUICK)
    assert done.folder == Path("runs") / "my table"
    assert (tmp_path / "runs" / "my table" / "metrics.json").is_file()


# --- encode once


def test_another_seed_or_head_encodes_nothing(train: Callable[..., Run]) -> None:
    rows = [*SMALL_ROWS, SMALL_ROWS[0]]
    first = train(rows).metrics["features"]
    assert (first["texts"], first["encoded"], first["reused"]) == (80, 80, 0)
    others = [
        train(rows, "seed", seed=1),
        train(rows, "head", head="native"),
        train(rows, "article", recipe="article", lr=None, epochs=1, head_features=("pooler",)),
        train([*rows, ("a new film", "1")], "more"),
    ]
    for other in others:
        found = other.metrics["features"]
        new = 1 if other is others[-1] else 0
        assert (found["texts"], found["encoded"], found["reused"]) == (80 + new, new, 80)


# --- honest numbers


def article_parts(rows: list[tuple[str, str]], seed: int) -> list[tuple[list[str], list[int]]]:
    """The article's own two calls on its two columns: training, validation and test texts with their labels."""
    texts, labels = [text for text, _ in rows], [int(label) for _, label in rows]  # pandas reads them as numbers
    train_text, temp_text, train_labels, temp_labels = train_test_split(
        texts, labels, random_state=seed, test_size=0.3, stratify=labels
    )
    val_text, test_text, val_labels, test_labels = train_test_split(
        temp_text, temp_labels, random_state=seed, test_size=0.5, stratify=temp_labels
    )
    return [(train_text, train_labels), (val_text, val_labels), (test_text, test_labels)]


ARTICLE_ROWS = [
    *((f"the {noun} was {word} {'and very ' * (i % 12)}", "7") for i, noun in enumerate(NOUNS) for word in GOOD[:3]),
    *((f"the {noun} was {word} {'at the end ' * (i % 7)}", "3") for i, noun in enumerate(NOUNS) for word in BAD),
    *((f"a {noun} was {word}", "11") for noun in NOUNS for word in ("broken", "rude")),
    *[("the film was great and the film was great", "7")] * 5,
]
"""Three labels, not equally common; some texts are over 17 tokens; copies."""


def test_the_articles_split_is_scikit_learns_row_for_row(train: Callable[..., Run]) -> None:
    done = train(ARTICLE_ROWS, recipe="article", lr=None, epochs=1, seed=2018, head_features=("pooler",))
    parts = article_parts(ARTICLE_ROWS, 2018)
    names = [3, 7, 11]
    prints = {}
    for name, (texts, labels) in zip(("train", "validation", "test"), parts, strict=True):
        content = json.dumps([texts, [names.index(label) for label in labels]], ensure_ascii=False)
        prints[name] = hashlib.sha256(content.encode()).hexdigest()
    assert done.info["data"] == prints
    _, rows = predictions(done.folder)
    assert [(row["text"], int(row["label"])) for row in rows] == list(zip(*parts[2], strict=True))
    assert not any("moved" in notice for notice in done.notices), "copies stay where they fall"


def article_in_plain_torch(folder: Path, parts: list[tuple[list[str], list[int]]], names: list[int], lr: float) -> Any:
    """The article's training, from texts on, with transformers and torch alone.

    Returns:
        The losses of each epoch on training and validation texts, and the test texts' probabilities by the best one.
    """
    from transformers import AutoModel, AutoTokenizer

    bert = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors, targets = [], []
    for texts, labels in parts:
        sent = tokenizer(texts, max_length=17, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            vectors.append(bert(sent["input_ids"], attention_mask=sent["attention_mask"]).pooler_output)
        targets.append(torch.tensor([names.index(label) for label in labels]))
    weights = compute_class_weight("balanced", classes=np.unique(targets[0]), y=targets[0].numpy())
    cross_entropy = nn.NLLLoss(weight=torch.tensor(weights, dtype=torch.float32))
    torch.manual_seed(2021)
    layers = (nn.Linear(32, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, len(names)), nn.LogSoftmax(dim=1))
    model: Any = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses, best, said = [], float("inf"), None
    for epoch in range(10):
        model.train()
        total = []
        # The order of batches is the one thing taken from headstart.
        for (((x,), y, _),) in FeatureBatches(vectors[0], targets[0], torch.ones(len(targets[0])), 32, 2021).epoch(
            epoch
        ):
            model.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total.append(loss.item())
        model.eval()
        with torch.no_grad():
            held = cross_entropy(model(vectors[1]), targets[1]).item()
            if held < best:
                best, said = held, model(vectors[2]).exp().numpy()
        losses.append((np.mean(total), held))
    return np.array(losses), said


def test_the_article_recipe_is_the_article(train: Callable[..., Run], tiny_bert: Path) -> None:
    lr = 5e-3  # the article's 1e-5 would hardly move in 10 epochs of 3 batches, and anything would agree
    done = train(
        ARTICLE_ROWS,
        recipe="article",
        lr=lr,
        **dict.fromkeys(("epochs", "head_features", "head_width", "weight_decay")),
    )
    parts = article_parts(ARTICLE_ROWS, 2021)
    losses, said = article_in_plain_torch(tiny_bert, parts, [3, 7, 11], lr)
    got = np.array([(epoch["train_loss"], epoch["validation_loss"]) for epoch in done.info["history"]])
    np.testing.assert_allclose(got, losses, rtol=3e-3)  # features are kept in half precision
    assert (losses[0] - losses[-1]).min() > 0.2, "it should have learnt something to agree on"
    _, rows = predictions(done.folder)
    np.testing.assert_allclose(probabilities(rows, ("3", "7", "11")), said, atol=1e-2)
    assert done.info["max_length"] == 17
    assert any(len(text.split()) > 17 for text, _ in ARTICLE_ROWS)


def test_what_was_found_in_the_data_is_told(train: Callable[..., Run]) -> None:
    done = train([*SMALL_ROWS, ("", "1"), SMALL_ROWS[3]])
    assert any("dropped 1 row with an empty text (row 82)" in notice for notice in done.notices)
    assert any("1 row repeats an earlier row's text" in notice for notice in done.notices)
    assert done.info["notices"] == list(done.notices)


def test_a_notebook_shows_the_result(train: Callable[..., Run]) -> None:
    labels = {"1": "<b>good</b>", "0": "bad"}
    run = train([(text, labels[label]) for text, label in SMALL_ROWS], out="a <i>run")
    shown = run._repr_html_()
    assert "<b>" not in shown
    assert "<td>&lt;b&gt;good&lt;/b&gt;</td>" in shown
    assert f"accuracy {run.metrics['test']['accuracy']:.3f} (95% interval" in shown
    assert "a &lt;i&gt;run</code>" in shown
    assert "TF-IDF + logistic regression" in shown


def test_the_test_part_has_no_say_in_the_model(train: Callable[..., Run], tmp_path: Path) -> None:
    """Other labels, other and much longer texts, more of them: the model and the choice of it stay the same."""
    tests = {
        "one": [("the film was great", "1"), ("the soup was rude", "0"), ("a hotel", "0")],
        "flipped": [("the film was great", "0"), ("the soup was rude", "1"), ("a hotel", "1")],
        "other": [("story " * 50, "1")] * 30,
    }
    done = {}
    for name, rows in tests.items():
        table = write_csv(tmp_path / f"test-{name}.csv", rows)
        done[name] = train(out=name, test=str(table), **SEARCHED)
    assert len({sha256(one.folder) for one in done.values()}) == 1
    assert len({sha256(one.folder, "config.json") for one in done.values()}) == 1
    assert len({json.dumps(one.metrics["validation"]) for one in done.values()}) == 1
    assert len({one.info["max_length"] for one in done.values()}) == 1
    flipped = done["flipped"].metrics["test"]["accuracy"]
    assert done["one"].metrics["test"]["accuracy"] == pytest.approx(1 - flipped)
    assert done["other"].metrics["test"]["n"] == 30


# --- the same seed, the same result


def test_the_same_seed_gives_the_same_bytes(
    train: Callable[..., Run], elsewhere: Callable[[], Path], tmp_path: Path
) -> None:
    first = train(**SEARCHED)
    torch.rand(3)
    again, other = train(out="again", **SEARCHED), train(out="other", seed=8, **SEARCHED)
    assert again.metrics["features"]["encoded"] == 0
    for name in ("model.safetensors", "config.json", "predictions.csv"):
        assert sha256(first.folder, name) == sha256(again.folder, name) == sha256(elsewhere(), name)
        if name != "config.json":
            assert sha256(first.folder, name) != sha256(other.folder, name)


# --- labels


@pytest.mark.parametrize(
    ("given", "order"),
    [
        (("2", "10", "1"), ("1", "2", "10")),
        (("0", "-1", "1"), ("-1", "0", "1")),
        (("b", "a10", "a9"), ("a10", "a9", "b")),
        (("9", "10", "x"), ("10", "9", "x")),
    ],
)
def test_one_order_of_labels_everywhere(
    given: tuple[str, str, str], order: tuple[str, str, str], train: Callable[..., Run]
) -> None:
    table = three_kinds(given)
    done = train(table, epochs=60, patience=60, lr=5e-2, head_features=("mean-0",))
    names = list(order)
    header, rows = predictions(done.folder)
    assert header[4:] == [f"p_{name}" for name in names]
    assert done.metrics["test"]["labels"] == list(done.metrics["test"]["per_label"]) == names
    assert done.info["names"] == done.info["labels"] == names
    hub = json.loads((done.folder / "config.json").read_text())
    assert [hub["id2label"][str(i)] for i in range(3)] == names
    assert [hub["label2id"][name] for name in names] == [0, 1, 2]
    predictor = predict.load(done.folder, **EXACT)
    assert predictor.names == order
    counts = [sum(row["label"] == name for row in rows) for name in names]
    assert [one["support"] for one in done.metrics["test"]["per_label"].values()] == counts
    right = np.mean(
        [name == label for name, (_, label) in zip(predictor.predict([t for t, _ in table]), table, strict=True)]
    )
    assert right > 0.8, "the names are on the right columns: what it was taught it knows"


# --- tables of their own for validation and test


@pytest.mark.parametrize("given", [("validation",), ("test",), ("validation", "test")])
def test_given_tables_are_used_as_they_are(given: tuple[str, ...], train: Callable[..., Run], tmp_path: Path) -> None:
    tables = {
        "validation": [(f"the {noun} was charming {i}", "1") for i, noun in enumerate(NOUNS)],
        "test": [(f"a {noun} was boring {i}", "0") for i, noun in enumerate(NOUNS[:7])],
    }
    files = {name: str(write_csv(tmp_path / f"{name}.csv", tables[name])) for name in given}
    done = train(**files)
    left = {"train": 80} if len(given) == 2 else {"train": 66, ({"validation", "test"} - {*given}).pop(): 14}
    assert done.info["split"] == {**left, **{name: len(tables[name]) for name in given}}
    _, rows = predictions(done.folder)
    assert done.metrics["test"]["n"] == len(rows)
    if "test" in given:
        assert [(row["text"], row["label"]) for row in rows] == tables["test"], "its rows, in its order"
        assert done.metrics["test"]["per_label"]["1"]["support"] == 0
        assert done.metrics["test"]["macro_f1"] == pytest.approx(done.metrics["test"]["per_label"]["0"]["f1"])
    if "validation" in given:
        assert done.metrics["validation"]["per_label"]["1"]["support"] == len(NOUNS)
    assert done.metrics["features"]["texts"] == 80 + sum(len(tables[name]) for name in given)


# --- other kinds of problem, and long texts


def by_pipeline(folder: Path, texts: list[str]) -> list[dict[str, float]]:
    from transformers import pipeline

    classify = pipeline("text-classification", str(folder), trust_remote_code=True, device="cpu")
    return [{one["label"]: one["score"] for one in found} for found in classify(texts, top_k=None, truncation=True)]


@pytest.mark.parametrize(
    "given", [{"head": "pooled"}, {"head": "native", "epochs": 30}, {"thaw": "2", "lr": 3e-3, "epochs": 20}]
)
@pytest.mark.parametrize("kind", ["multi", "ordered"])
def test_other_kinds_of_label_from_a_table_to_a_file(
    kind: str, given: dict[str, Any], train: Callable[..., Run], tmp_path: Path
) -> None:
    rows = kinds_of_rows()[kind]
    done = train(rows, **{"head_features": None, "head_width": None, "epochs": 30, **given})
    test, folder = done.metrics["test"], done.folder
    header, held = predictions(folder)
    assert done.info["problem"] == kind
    assert header[:4] == ["text", "label", "prediction", "confidence"]
    assert test["accuracy"] == np.mean([row["label"] == row["prediction"] for row in held])
    assert test["accuracy"] > done.metrics["baselines"]["majority"]["accuracy"]
    if kind == "multi":
        assert set(test) >= {"micro_f1", "thresholds"}
        assert all(set(row["prediction"].split("|")) <= {"", "food", "staff", "room"} for row in held)
        assert any("|" in row["prediction"] for row in held)
        assert len(done.info["thresholds"]) == 3
    else:
        assert test["mean_absolute_error"] < 1
        assert test["quadratic_kappa"] > 0.2
    assert ("quadratic kappa" if kind == "ordered" else "micro F1") in done.summary()
    texts = [row["text"] for row in held]
    predictor = headstart.load(folder)
    found = predictor.predict_proba(texts)
    for mine, theirs in zip(found, by_pipeline(folder, texts), strict=True):
        assert dict(zip(predictor.names, mine, strict=True)) == pytest.approx(theirs, abs=1e-4)
    assert predictor.predict(texts) == [row["prediction"] for row in held]
    again = judge.evaluate(predictor, str(write_csv(tmp_path / "again.csv", rows)))[0]
    assert set(again) == set(test)
    (folder / "report.html").read_text().index("Given and missed" if kind == "multi" else "Quadratic kappa")


def test_folds_of_several_labels(train: Callable[..., Run]) -> None:
    done = train(kinds_of_rows()["multi"], folds=3, epochs=20)
    assert done.metrics["folds"]["k"] == 3
    assert done.metrics["folds"]["mean"] > 0.2


@pytest.mark.parametrize("given", [{"head_width": 0}, {"thaw": "all", "lr": 2e-3, "epochs": 15}])
def test_long_texts_are_read_to_their_end(given: dict[str, Any], train: Callable[..., Run]) -> None:
    rows, accuracy = kinds_of_rows()["long"], {}
    for long in ("truncate", "head-tail", "windows"):
        done = train(rows, out=long, long=long, max_length=32, **{"epochs": 30, "head_features": ("mean-3",), **given})
        accuracy[long] = done.metrics["validation"]["accuracy"]
        texts = [row["text"] for row in predictions(done.folder)[1]]
        predictor = headstart.load(done.folder)
        held = probabilities(predictions(done.folder)[1], predictor.names)
        np.testing.assert_allclose(predictor.predict_proba(texts), held, atol=2e-5)
        assert predictor.score(texts).cut.all() == (long != "windows")
        reason = {"truncate": "are cut off, see --long", "head-tail": "beginning and the end", "windows": "in windows"}
        assert reason[long] in done.info["max_length_reason"]
    assert accuracy["truncate"] < 0.75 < 0.9 <= min(accuracy["head-tail"], accuracy["windows"])
