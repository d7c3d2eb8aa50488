"""What a person reads: the one screen, the model card, the histogram; and the files, read back as they were meant."""

import csv
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headstart import config, report
from headstart.data import Dataset
from headstart.errors import CONTROL, DiskError
from headstart.metrics import evaluate, report_text
from headstart.run import Run
from headstart.run import train as run_train
from headstart.thaw import Cost
from headstart.tokens import LengthAdvice, advise_length

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\n"


@pytest.fixture(scope="module")
def pooled(tiny_run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """headstart.json and metrics.json of a run with a pooled head."""
    info, metrics = (json.loads((tiny_run / name).read_text()) for name in ("headstart.json", "metrics.json"))
    return info, metrics


@pytest.fixture(scope="module")
def native(tiny_run: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the architecture's own head, on the same table."""
    out = tmp_path_factory.mktemp("native") / "my-run"
    table = str(tiny_run.parent / "small.csv")
    given: dict[str, Any] = {"model": str(tiny_bert), "out": str(out), "device": "cpu", "epochs": 1, "thaw": "0"}
    return run_train(config.settings(table, head="native", **given))


def line_of(text: str, word: str) -> str:
    """The one line that starts with a word."""
    (line,) = [line for line in text.splitlines() if line.startswith(word)]
    return line


def scored(accuracy: float, majority: float, tfidf: float, p: float) -> dict[str, Any]:
    return {
        "test": {"accuracy": accuracy},
        "baselines": {"majority": {"accuracy": majority}, "tfidf_logreg": {"accuracy": tfidf}},
        "comparisons": {"majority": {"p_value": p}, "tfidf_logreg": {"p_value": p}},
    }


# --- after training


def test_the_one_screen_says_what_came_out(native: Run, tiny_bert: Path) -> None:
    text = native.summary()
    numbers, low_high = native.metrics["test"], native.metrics["test"]["accuracy_ci95"]
    assert "small.csv: 56 to train, 12 to validate, 12 to test; 2 labels: 0, 1" in line_of(text, "Data")
    assert f"max_length 16: {native.info['max_length_reason']}" in line_of(text, "Lengths")
    assert f"{tiny_bert} on {native.info['placement']}" in line_of(text, "Encoder")
    assert re.search(r"80 distinct texts: \d+ encoded, \d+ from the store \(0\.0 MB\)", line_of(text, "Features"))
    assert "the architecture's own, epoch 1" in line_of(text, "Head")
    for value in (numbers["accuracy"], *low_high, numbers["macro_f1"], numbers["log_loss"], numbers["ece"]):
        assert f"{value:.3f}" in line_of(text, "Test ")
    assert report.filled("compare.txt", native.metrics) in line_of(text, "Compare")
    assert f"{native.metrics['timing']['total']:.1f} s" in line_of(text, "Time")
    assert line_of(text, "Saved").endswith(f"{native.folder} (report.html tells more)")
    assert report.filled("trust.txt", native.metrics) in line_of(text, "Trust")
    assert line_of(text, "Next").endswith(f'headstart predict {native.folder} "your text"')
    assert report_text(numbers).rstrip() in text
    order = [text.index(f"\n{word}") for word in ("Lengths", "Head", "Test", "Compare", "Saved", "Next")]
    assert order == sorted(order), "what was done, what came out, where it is, what to do next"


def test_many_labels_are_counted_and_a_few_shown(pooled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    info, metrics = pooled
    names = [f"name {i}" for i in range(200)]
    data = line_of(report.told("summary.txt", {**info, "names": names}, metrics), "Data")
    assert data.endswith("200 labels: name 0, name 1, name 2, name 3, name 4, name 5, …")


def test_large_counts_can_be_read_and_parts_that_took_no_time_are_left_out(
    pooled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    info, metrics = pooled
    timing = {"read": 0.01, "tokenize": 0.04, "encode": 61.26, "train": 5.0, "evaluate": 0.05, "total": 66.4}
    features = {"texts": 1_234_567, "encoded": 1_000_000, "reused": 234_567, "bytes": 9_876_543_210}
    text = report.told("summary.txt", info, {**metrics, "timing": timing, "features": features})
    assert line_of(text, "Time").split(maxsplit=1)[1] == "66.4 s (encode 61.3, train 5.0, evaluate 0.1)"
    assert "1,234,567 distinct texts: 1,000,000 encoded, 234,567 from the store (9,876.5 MB)" in text


@pytest.mark.parametrize(
    ("accuracy", "majority", "tfidf", "verdict"),
    [
        (0.9, 0.5, 0.8, "better than both by 10.0 points or more"),
        (0.9, 0.875, 0.5, "better than both by 2.5 points or more"),
        (0.8, 0.5, 0.8, "no better than TF-IDF + logistic regression"),
        (0.7, 0.5, 0.8, "NOT better than TF-IDF + logistic regression"),
        (0.8, 0.8, 0.7, "no better than the commonest label"),
        (0.7, 0.8, 0.7, "NOT better than the commonest label"),
        (0.6, 0.5, 0.8, "NOT better than TF-IDF + logistic regression"),
    ],
)
def test_it_says_plainly_whether_the_baselines_are_beaten(
    accuracy: float, majority: float, tfidf: float, verdict: str
) -> None:
    told = f"majority {majority:.3f}, TF-IDF + logistic regression {tfidf:.3f}: {verdict}"
    assert report.filled("compare.txt", scored(accuracy, majority, tfidf, 0.0002)) == f"{told} (p < 0.001)"
    assert report.filled("compare.txt", scored(accuracy, majority, tfidf, 0.0412)) == f"{told} (p = 0.041)"
    luck = "" if verdict.startswith("no better") else ", which may be luck"
    assert report.filled("compare.txt", scored(accuracy, majority, tfidf, 0.2)) == f"{told} (p = 0.200{luck})"


def test_it_says_how_far_to_trust_its_confidence(pooled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    calibration = {"method": "temperature", "temperature": 1.234, "ece_before": 0.1, "ece_after": 0.02}
    rows = [(0.5, 1.0, 0.8), (0.7, 0.9, 0.85), (0.8, 0.6, 0.9), (0.9, 0.4, 0.95), (0.99, 0.0, None)]
    coverage = [dict(zip(("min_confidence", "coverage", "accuracy"), row, strict=True)) for row in rows]
    said = report.filled("trust.txt", {"calibration": calibration, "coverage": coverage})
    assert said == (
        "calibration error 0.100 before, 0.020 after dividing logits by 1.23; "
        "with --min-confidence 0.8 it answers 60%, 0.900 of them right"
    )
    assert report.filled("trust.txt", {"calibration": {"method": "none"}, "coverage": coverage[:1]}) == "not calibrated"


def test_it_says_what_limits_the_result() -> None:
    slices = [
        {"slice": f"kind {i}", "n": 1200, "accuracy": 0.6, "accuracy_ci95": [0.5, 0.7 + i / 10]} for i in range(4)
    ]
    per_label = {name: {"f1": f1, "support": n} for name, f1, n in (("a", 0.9, 5), ("b", 0.7, 5), ("c", 0.0, 0))}
    curve = [{"texts": 50, "validation_accuracy": 0.7}, {"texts": 200, "validation_accuracy": 0.72}]
    fields = {"slices": slices, "learning_curve": curve, "test": {"accuracy": 0.95, "per_label": per_label}}
    learnt = "a head on 50 texts was 0.700 accurate on validation, on all 200 "
    assert report.filled("limits.txt", fields).split("\n") == [
        "kind 0: accuracy 0.600 on 1,200 test texts",
        "kind 1: accuracy 0.600 on 1,200 test texts",
        learnt + "0.720: more texts would help, above all of b",
    ]
    curve[1]["validation_accuracy"] = 0.71
    assert report.filled("limits.txt", {**fields, "slices": []}) == learnt + "0.710: more texts alone would add little"
    assert report.filled("limits.txt", {**fields, "slices": [], "learning_curve": curve[:1]}) == ""


@pytest.mark.parametrize(
    ("settings", "costs", "contradicted", "steps"),
    [
        ({"recipe": "article", "thaw": "0"}, [], 0, ["train", "the default recipe, which fine-tunes the encoder, too"]),
        ({"thaw": "0"}, [], 0, ["train --thaw auto", "fine-tunes the encoder, too"]),
        ({"thaw": "auto"}, [(1, 500), (2, 600)], 0, []),
        ({"thaw": "auto"}, [(1, 601), (2, 661)], 0, ["train --time-budget 12m", "lets it fine-tune the top 2 layers"]),
        ({"thaw": "2"}, None, 1, ["audit", "it is sure against the label of a test text: some labels may be wrong"]),
        (
            {"thaw": "2"},
            None,
            1234,
            ["audit", "it is sure against the label of 1,234 test texts: some labels may be wrong"],
        ),
    ],
)
def test_it_says_what_to_do_next(
    settings: dict[str, str], costs: list[tuple[int, int]] | None, contradicted: int, steps: list[str]
) -> None:
    usual = {"recipe": "headstart", "data": "my table\n.csv", "time_budget": 600.0, "label": None, "text": "it"}
    thaw = {} if costs is None else {"costs": [{"depth": depth, "seconds": seconds} for depth, seconds in costs]}
    fields = {"settings": {**usual, "test": "t.csv", "validation": None, **settings}, "thaw": thaw}
    said = report.filled("steps.txt", {**fields, "contradicted": contradicted})
    if steps:
        command, _, options = steps[0].partition(" ")
        table = "'my table\N{REPLACEMENT CHARACTER}.csv' --test t.csv --text it"
        steps[0] = f"headstart {command} {table} {options}".rstrip()
    assert said == "\n".join(steps)


def test_what_each_depth_would_cost() -> None:
    costs = [Cost(1, 5.4, 10**9, 10**8), Cost("all", 1605.4, 10**10, 0)]
    assert report.filled("costs.txt", {"costs": costs, "budget": 600.0}).splitlines() == [
        "--thaw  predicted time  memory        disk",
        "     1             5 s   1.0 GB      100 MB",
        "   all         1,605 s  10.0 GB        0 MB  over the budget of 600 s",
    ]


def test_an_evaluation_on_another_table() -> None:
    said, truth = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]), np.array([0, 1, 1])
    numbers = evaluate(said, truth, ("bad", "good"))
    full = report_text(numbers)
    got = report.filled("evaluation.txt", {"test": {**numbers, "n": 12_345}})
    assert got.startswith(full.rstrip() + "\n\nAccuracy 0.667 on 12,345 texts (95% interval")
    low, high = numbers["accuracy_ci95"]
    assert f"(95% interval {low:.3f} to {high:.3f}), macro F1 0.667, log loss 0.607" in got
    assert got.endswith(f"calibration error {numbers['ece']:.3f}")


def test_control_characters_are_made_harmless(pooled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    info, metrics = pooled
    hostile = {**info, "names": [f"a{HOSTILE}", "b"], "settings": {**info["settings"], "data": f"d{HOSTILE}.csv"}}
    told = {**metrics, "test": {**metrics["test"], "labels": [f"a{HOSTILE}", "b"]}}
    text = report.told("summary.txt", hostile, told)
    assert "�[2J�]0;owned��31m��" in line_of(text, "Data")
    assert not {chr(code) for code in CONTROL} - {"\n"} & set(text)
    assert len(text.splitlines()) == len(report.told("summary.txt", info, metrics).splitlines()), "no line of its own"
    card = report.told("card.md", hostile, told)
    assert not {chr(code) for code in CONTROL} - {"\n"} & set(card)
    assert len(card.splitlines()) == len(report.told("card.md", info, metrics).splitlines())


# --- the model card


@pytest.mark.parametrize("kind", ["pooled", "native"])
def test_the_card_is_one_that_the_hub_understands(
    kind: str, pooled: tuple[dict[str, Any], dict[str, Any]], native: Run
) -> None:
    from huggingface_hub import ModelCard

    info, metrics = pooled if kind == "pooled" else (native.info, native.metrics)
    text = report.told("card.md", info, metrics)
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.library_name == {"pooled": "headstart", "native": "transformers"}[kind]
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["text-classification", "headstart"]
    assert f"# {Path(info['out']).name}\n" in card.content
    whole = " ".join(text.split())
    for piece in (
        f"made by headstart {info['headstart']} from `small.csv` (56 texts to train on, 12 to choose on, 12 to test",
        f"seed {info['seed']}",
        f"Accuracy **{metrics['test']['accuracy']:.3f}** (95% interval",
        report.filled("compare.txt", metrics),
        f"Encoder `{info['settings']['model']}`; {info['head']['description']}. Texts are cut after 16 tokens.",
    ):
        assert piece in whole
    assert f"```\n{report_text(metrics['test']).rstrip()}\n```" in text
    assert ("trust_remote_code=True" in text) == (kind == "pooled"), "only a head of headstart's own needs it"
    assert ("modeling_headstart.py" in text) == (kind == "pooled")


def test_the_run_folder_has_its_card(native: Run) -> None:
    expected = report.told("card.md", native.info, native.metrics)
    assert (native.folder / "README.md").read_text(encoding="utf-8") == expected + "\n"


def test_the_page_has_commands_that_can_be_pasted(native: Run) -> None:
    page = (native.folder / "report.html").read_text(encoding="utf-8")
    for command in ("predict", "explain", "evaluate"):
        assert f"headstart {command} {shlex.quote(str(native.folder))} " in page


def test_the_code_on_a_native_card_runs(native: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (native.folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(native.folder)
    *imports, call = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(imports), names)
    (answer,) = eval(call, names)
    assert answer["label"] in ("0", "1")
    assert 0.5 <= answer["score"] <= 1


# --- files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_without_a_number_that_json_lacks(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(tmp_path / "x.json", {"deep": [{"a": value}]})
    assert not (tmp_path / "x.json").exists(), "nothing half-written"


def test_json_is_for_people_too(tmp_path: Path) -> None:
    report.write_json(tmp_path / "x.json", {"name": "très 😒", "rows": [1, 2.5, None]})
    content = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(content) == {"name": "très 😒", "rows": [1, 2.5, None]}
    assert '\n  "name": "très 😒",\n' in content
    assert content.endswith("}\n")


TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from(',;"\n\r\t= ')).filter(lambda text: text[:1] != "'")


def table(texts: Sequence[str], labels: NDArray[np.int64], names: Sequence[str]) -> Dataset:
    return Dataset(list(texts), labels, tuple(names), np.arange(len(texts)))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, st.integers(0, 1), st.floats(0, 1)), max_size=8),
    names=st.lists(TEXT, min_size=2, max_size=2, unique=True),
)
def test_predictions_come_back_as_they_were(
    rows: list[tuple[str, int, float]], names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "predictions.csv"
    said = np.array([[1 - share, share] for _, _, share in rows]).reshape(-1, 2)
    truth = np.array([label for _, label, _ in rows], dtype=np.int64)
    report.write_predictions(path, table([text for text, _, _ in rows], truth, names), said)
    with open(path, encoding="utf-8", newline="") as file:
        header, *back = csv.reader(file)
    assert header == ["text", "label", "prediction", "confidence", f"p_{names[0]}", f"p_{names[1]}"]
    assert len(back) == len(rows)
    for (text, label, share), row in zip(rows, back, strict=True):
        best = int(share > 1 - share)
        assert [re.sub(r"^'(?=[=+@\t\r-])", "", cell) for cell in row[:3]] == [text, names[label], names[best]]
        assert not any(re.match(r"[=@\t\r]|[+-](?![\d.,]+$)", cell) for cell in row), (
            "nothing that a spreadsheet computes"
        )
        assert row[3] == row[4 + best]
        assert [float(value) for value in row[4:]] == pytest.approx([1 - share, share], abs=5e-7)


def test_a_column_for_each_of_several_labels(tmp_path: Path) -> None:
    said = np.array([[0.2, 0.3, 0.5], [0.6, 0.25, 0.15]])
    report.write_predictions(tmp_path / "p.csv", table(["a", "b"], np.array([2, 1]), ("x", "y", "z")), said)
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "text,label,prediction,confidence,p_x,p_y,p_z",
        "a,z,z,0.500000,0.200000,0.300000,0.500000",
        "b,y,x,0.600000,0.600000,0.250000,0.150000",
    ]


# --- lengths


def histogram(lengths: list[int]) -> list[str]:
    """The lines of the histogram in what `headstart lengths` prints."""
    text = report.lengths_text(advice()._replace(lengths=np.array(lengths, dtype=np.int64)))
    return text.split("\n\n")[1].splitlines()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 40) | st.integers(0, 9000), min_size=1, max_size=400))
def test_each_text_is_in_the_bin_that_names_its_length(lengths: list[int]) -> None:
    lines = histogram(lengths)
    assert 1 <= len(lines) <= 16
    counts, bars = [], []
    for line in lines:
        found = re.fullmatch(r" +(\d+)(?:-(\d+)|(\+))? (█*) *([\d,]+)", line)
        assert found is not None, line
        low = int(found[1])
        high = max(lengths) if found[3] else int(found[2] or low)
        counts.append(int(found[5].replace(",", "")))
        bars.append(len(found[4]))
        assert counts[-1] == sum(low <= length <= high for length in lengths)
    assert sum(counts) == len(lengths)
    assert max(bars) == bars[counts.index(max(counts))] == 40
    assert all(bar == round(40 * count / max(counts)) for bar, count in zip(bars, counts, strict=True))
    assert lines[-1].split()[0].endswith("+")


def test_a_few_very_long_texts_do_not_flatten_the_rest() -> None:
    lines = histogram([*range(5, 21)] * 100 + [5000])
    assert len(lines) == 16
    assert [line.split()[0] for line in lines] == [*(str(n) for n in range(5, 20)), "20+"]
    assert lines[-1].split()[-1] == "101"


def advice(longest: int = 60) -> LengthAdvice:
    return advise_length(np.array([*range(3, 20)] * 60 + [longest], dtype=np.int64), limit=64, hidden=32)


def test_the_advice_is_shown_with_what_each_length_costs() -> None:
    given_advice = advice()
    text = report.lengths_text(given_advice)
    assert text.startswith("Token lengths of 1,021 texts (special tokens included)\n")
    assert "Quantiles   0% 3  25% 7  50% 11  75% 15  90% 18  95% 19  99% 19  100% 60\n" in text
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ +[\d.]+% +[\d.]+% +[\d.]+", line)]
    assert [int(row[0]) for row in rows] == [one.max_length for one in given_advice.candidates]
    assert [row[1:4] for row in rows] == [
        [f"{one.cut:.2%}", f"{one.lost:.2%}", f"{one.cost:.2f}"] for one in given_advice.candidates
    ]
    assert [row[0] for row in rows if row[4:] == ["<-", "advised"]] == ["24"]
    assert text.endswith(f"Advised: --max-length 24, {given_advice.reason}.")


def test_the_histogram_is_a_picture(tmp_path: Path) -> None:
    spread = {"even": [*range(3, 20)] * 60, "at one end": [3] * 1019 + [19]}
    blue = {}
    for name, lengths in spread.items():
        report.save_histogram(advise_length(np.array(lengths, dtype=np.int64), limit=64), tmp_path / f"{name}.png")
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture.shape == (540, 960, 4)
        bar = np.array([0x4C, 0x78, 0xA8]) / 255
        blue[name] = (np.abs(picture[:, :, :3] - bar).max(axis=2) < 0.02).mean()
    assert blue["even"] > 0.3, "there are bars on it"
    assert 0.01 < blue["at one end"] < blue["even"] / 5, "and they show these texts"


def in_no_folder(folder: Path) -> Path:
    return folder / "none" / "x.png"


def in_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "x.png"


def over_a_folder(folder: Path) -> Path:
    (folder / "x.png").mkdir()
    return folder / "x.png"


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300 + ".png")


@pytest.mark.parametrize("place", [in_no_folder, in_a_file, over_a_folder, too_long])
def test_a_picture_that_cannot_be_written_is_one_sentence(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path)
    with pytest.raises(DiskError, match=rf"^{re.escape(str(path)[:60])}") as caught:
        report.save_histogram(advice(), path)
    assert len(str(caught.value).splitlines()) == 1


def test_any_name_draws_a_picture(tmp_path: Path) -> None:
    report.save_histogram(advice(), tmp_path / "lengths")
    assert (tmp_path / "lengths").read_bytes().startswith(b"\x89PNG\r\n")
