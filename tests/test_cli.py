"""The command line as a person meets it: its options, what it prints where, how it ends, and every bad input."""

import contextlib
import csv
import dataclasses
import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import typer.main

from headstart import config
from headstart.cli import app, main
from headstart.errors import InputError
from headstart.predict import load as load_predictor
from tests.conftest import SMALL_ROWS, write_csv

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
Tree = dict[str, bytes | None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one command ended and what it printed."""

    code: int | str | None
    out: str
    err: str


Run = Callable[..., Outcome]


def frozen(arguments: Sequence[object]) -> list[str]:
    """The arguments of one command; one that trains is told not to fine-tune unless it says how deep, or needs help."""
    given = [str(argument) for argument in arguments]
    speaks = {"-h", "--help", "--thaw", "--config"} & set(given)
    return given if given[:1] != ["train"] or len(given) == 1 or speaks else [*given, "--thaw", "0"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the real command line in this process, in `tmp_path`; the encoder stays frozen unless `--thaw` is given."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(frozen(arguments))
        printed = capsys.readouterr()
        return Outcome(ended.value.code, printed.out, printed.err)

    return call


def start(arguments: list[object], folder: Path, **more: Any) -> "subprocess.Popen[bytes]":
    """Start the real command line in a process of its own."""
    command = [sys.executable, "-m", "headstart.cli", *frozen(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])} | more.pop("env", {})
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, **more)


def tree(folder: Path) -> Tree:
    """Every path below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for path in sorted(folder.rglob("*"))
    }


def table(rows: int = 20, header: str = "sentence,label", more: str = "") -> str:
    return (
        "\n".join((header, *(f"the film {i} was {'great' if i % 2 else 'rude'},{i % 2}" for i in range(rows))))
        + "\n"
        + more
    )


# --- options

HF_NAMES = {
    "--epochs": "--num-train-epochs",
    "--lr": "--learning-rate",
    "--batch-size": "--per-device-train-batch-size",
    "--max-length": "--max-seq-length",
    "--model": "--model-name-or-path",
    "--out": "--output-dir",
    "--overwrite": "--overwrite-output-dir",
    "--text": "--text-column-name",
    "--label": "--label-column-name",
    "--validation": "--validation-file",
    "--test": "--test-file",
    "--resume": "--resume-from-checkpoint",
}
NO_HF_NAME = {
    "--ray",
    "--workers",
    *("--label-names", "--recipe", "--thaw", "--head", "--class-weight", "--seed", "--device", "--precision"),
    *("--trials", "--folds", "--time-budget", "--dry-run", "--no-store", "--checkpoint-minutes", "--keep-checkpoints"),
    *("--config", "--save-config", "--report-to", "--selfcheck-resume", "--calibration"),
    *("--input", "--output", "--png", "--min-confidence", "--json", "--html", "--int8", "--force", "--host", "--port"),
    *("--api-key-env", "--max-body-bytes", "--max-batch", "--max-waiting", "--max-connections", "--timeout"),
    *("--read-timeout", "--long", "--problem", "--private", "--with-texts"),
}
"""A new option goes into one of these two: what Hugging Face's scripts call it, or that they have no such thing."""

SAMPLES = (
    *("a_b", "3", "0.5"),
    *(get_args(kind)[-1] for kind in (config.Recipe, config.HeadKind, config.ClassWeight)),
    *(get_args(kind)[-1] for kind in (config.Device, config.Precision, config.Calibration)),
    *(get_args(kind)[-1] for kind in (config.Long, config.ProblemChoice)),
)


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = {name: command for name, command in group.commands.items() if name != "cache"}
    return found | {f"cache {name}": command for name, command in group.commands["cache"].commands.items()}


def parse(name: str, arguments: list[str]) -> dict[str, Any]:
    """The settings that a command would get; nothing is run."""
    group: Any = typer.main.get_command(app)
    parent = group.make_context("headstart", [name])
    needed = [parameter.name for parameter in commands()[name].params if not parameter.opts[0].startswith("-")]
    places = [f"given-{parameter}" for parameter in needed]
    return dict(commands()[name].make_context(name, [*places, *arguments], parent=parent).params)


OPTIONS = [
    (name, parameter.name, tuple(parameter.opts), bool(getattr(parameter, "is_flag", False)))
    for name, command in commands().items()
    for parameter in command.params
    if parameter.opts[0].startswith("-")
]


@pytest.mark.parametrize(("command", "setting", "spellings", "flag"), OPTIONS, ids=lambda value: str(value))
def test_every_spelling_reaches_the_same_setting(
    command: str, setting: str, spellings: tuple[str, ...], flag: bool
) -> None:
    default = parse(command, [])[setting]

    def accepted(value: str) -> bool:
        try:
            return parse(command, [spellings[0], value])[setting] != default
        except typer.BadParameter:
            return False

    value = None if flag else next(one for one in SAMPLES if accepted(one))
    found = set()
    for spelling in spellings:
        for form in {spelling, "--" + spelling[2:].replace("-", "_")}:
            for given in [[form]] if value is None else [[form, value], [f"{form}={value}"]]:
                found.add(repr(parse(command, given)[setting]))
    assert len(found) == 1
    assert found != {repr(default)}
    assert value != "a_b" or found == {"'a_b'"}, "underscores of a value are the person's"


def test_every_option_has_its_hugging_face_name() -> None:
    assert OPTIONS
    for command, _, spellings, _ in OPTIONS:
        if (command, spellings[0]) == ("audit", "--out"):
            continue  # a file, and not a folder
        if spellings[0] in HF_NAMES:
            assert HF_NAMES[spellings[0]] in spellings, command
        else:
            assert spellings[0] in NO_HF_NAME, f"{command} {spellings[0]}: add it to one of the two lists above"


def test_every_option_says_what_it_does() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            if parameter.name != "help":
                assert parameter.help, f"{name} {parameter.name}"


def test_every_option_of_train_is_a_setting() -> None:
    fields = {field.name for field in dataclasses.fields(config.TrainConfig)}
    assert {setting for command, setting, _, _ in OPTIONS if command == "train"} - {
        "config",
        "save_config",
        "no_store",
        "selfcheck_resume",
        "ray",
        "workers",
    } <= fields


def test_settings_reach_the_run(run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    given = {"epochs": 2, "batch_size": 16, "lr": 0.01, "max_length": 12, "seed": 7, "out": "a_run"}
    spelled = {
        "--num_train_epochs": 2,
        "--per_device_train_batch_size": 16,
        "--learning-rate": 0.01,
        "--max_seq_length": 12,
        "--seed": 7,
        "--output_dir": "a_run",
        "--model_name_or_path": tiny_bert,
        "--text_column_name": "sentence",
        "--label-column-name": "label",
        "--class_weight": "none",
        "--label_names": "bad one,good_one",
        "--head": "native",
        "--device": "cpu",
        "--precision": "fp32",
    }
    ended = run("train", small_table, *(piece for pair in spelled.items() for piece in pair))
    assert ended.code == 0, ended.err
    info = json.loads((tmp_path / "a_run" / "headstart.json").read_text())
    assert {name: info["settings"][name] for name in given} == given
    assert info["settings"]["class_weight"] == "none"
    assert info["head"]["kind"] == "native"
    assert info["names"] == ["bad one", "good_one"]
    assert info["max_length"] == 12


def test_auto_length_is_the_advice_also_in_the_article_recipe(run: Run, tiny_bert: Path, small_table: Path) -> None:
    arguments = ("train", small_table, "--recipe", "article", "--model", tiny_bert, "--epochs", 1)
    assert "max_length 17: the article's" in run(*arguments, "--out", "one").out
    assert "max_length 16: no text is cut" in run(*arguments, "--out", "two", "--max-length", "auto").out


@pytest.mark.parametrize(("value", "number"), [(None, None), ("auto", "auto"), ("17", 17)])
def test_a_length_is_a_whole_number_or_auto(
    run: Run, monkeypatch: pytest.MonkeyPatch, value: str | None, number: object
) -> None:
    asked: list[object] = []

    def settings(data: str, **given: object) -> None:
        asked.append(given.get("max_length"))
        raise InputError("enough")

    monkeypatch.setattr("headstart.cli.settings", settings)
    run("train", "t.csv", *(() if value is None else ("--max-length", value)))
    assert asked == [number]


@pytest.mark.parametrize("value", ["", "x", "-5", "1.5", "²", "seventeen"])
def test_another_length_is_refused(run: Run, value: str) -> None:
    ended = run("train", "t.csv", "--max-length", value)
    assert ended.code == 2
    assert f"--max-length takes auto or a whole number, not {value!r}." in ended.err


# --- nothing heavy before it is needed

HEAVY = ("torch", "transformers", "tokenizers", "polars", "sklearn", "scipy", "numpy", "matplotlib")


@pytest.mark.parametrize(
    "code",
    [
        "import headstart",
        "from headstart.cli import main; main(['--help'])",
        *(f"from headstart.cli import main; main({[*name.split(), '--help']})" for name in commands()),
    ],
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    script = f"""
import sys
try:
    {code}
except SystemExit as end:
    assert end.code == 0, end.code
print("loaded", *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.split() == ["loaded"]
    assert ("Usage:" in done.stdout) == ("--help" in code)


# --- what is printed where


def test_results_on_stdout_remarks_on_stderr(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(table(40, more=",1\nthe FILM 1 was great,1\n"))
    ended = run("train", "t.csv", "--model", tiny_bert, "--epochs", 2, "--out", "r")
    assert ended.code == 0
    assert ended.err.splitlines()[0] == "t.csv: dropped 1 row with an empty text (row 42)."
    assert "repeats an earlier row's text" in ended.err
    assert "dropped" not in ended.out
    for piece in (
        "28 to train",
        "precision",
        "Test      accuracy",
        "TF-IDF",
        "Saved     r",
        'headstart predict r "your text"',
    ):
        assert piece in ended.out
    assert len(ended.out.splitlines()) <= 40, "one screen"


def test_no_colour_and_no_bars_without_a_terminal(run: Run, tiny_bert: Path, small_table: Path) -> None:
    ended = run("train", small_table, "--model", tiny_bert, "--epochs", 2, "--out", "r")
    assert ended.code == 0
    assert ended.err == ""
    assert not {"\x1b", "\r"} & set(ended.out)


def test_help_ends_with_0_and_goes_to_stdout(run: Run) -> None:
    for arguments in (["--help"], ["-h"], ["train", "-h"], ["cache", "--help"]):
        ended = run(*arguments)
        assert ended.code == 0
        assert ended.out.startswith("Usage: headstart")
        assert ended.err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "DATA"),
        (["trian", "x.csv"], "trian"),
        (["train", "x.csv", "--devic", "cpu"], "--device"),
        (["train", "x.csv", "--device", "tpu"], "'auto', 'cpu', 'cuda', 'mps'"),
        (["train", "x.csv", "--epochs", "many"], "--epochs"),
        (["train", "x.csv", "--epochs", "0"], "--epochs must be more than 0"),
        (["train", "x.csv", "--max-length", "long"], "--max-length takes auto or a whole number, not 'long'"),
        (["train", "x.csv", "--thaw", "two"], "--thaw takes a number of layers, all, auto or 0, not 'two'"),
        (["train", "x.csv", "--time-budget", "soon"], "--time-budget takes seconds, or a number with s, m or h"),
        (["train", "x.csv", "--overwrite", "--resume"], "--overwrite starts anew and --resume goes on"),
        (["train", "x.csv", "--report-to", "mlflow,comet"], "takes tensorboard, mlflow, trackio, wandb, not 'comet'"),
        (["train", "x.csv", "--epochs", "0", "--save-config", "run.toml"], "--epochs must be more than 0"),
        (["train", "x.csv", "--recipe", "article", "--head", "native"], "leave out --head native"),
        (["predict", "r", "a text", "--input", "x.csv"], "not both"),
        (["predict", "r", "a text", "--output", "x.csv"], "--output goes with --input"),
    ],
)
def test_wrong_use_ends_with_2(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert said in ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert tree(tmp_path) == {}


def test_our_own_fault_ends_with_1_and_asks_for_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("headstart.features.cache_info", broken)
    ended = run("cache", "info")
    assert ended.code == 1
    assert "RuntimeError: a fault of ours" in ended.err, "the traceback is what a report needs"
    assert "this is our fault, not yours. Please report it" in ended.err
    assert ended.out == ""


# --- the other commands


def test_predict_labels_arguments(run: Run, tiny_run: Path) -> None:
    ended = run("predict", tiny_run, "the film was superb", "the soup was awful")
    assert ended.code == 0
    rows = [line.split("\t") for line in ended.out.splitlines()]
    assert [row[2] for row in rows] == ["the film was superb", "the soup was awful"]
    assert {row[0] for row in rows} <= {"0", "1"}
    assert all(0.5 <= float(row[1]) <= 1 for row in rows)
    assert ended.err == ""


def test_predict_reads_a_text_a_line_from_stdin(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"the film was great\n\n  \nth\xff soup was rude\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    ended = run("predict", tiny_run)
    assert [line.split("\t")[2] for line in ended.out.splitlines()] == ["the film was great", "th\ufffd soup was rude"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run("predict", tiny_run, "--input", "-").out == ended.out


@posix
def test_predict_without_a_text_at_a_terminal_says_what_to_give(
    run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, terminal = os.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        ended = run("predict", tiny_run)
    os.close(master)
    assert ended.code == 2
    assert "Give texts" in ended.err


def test_predict_says_when_a_text_was_cut(run: Run, tiny_run: Path) -> None:
    ended = run("predict", tiny_run, "very " * 100)
    assert ended.code == 0
    assert "1 texts were cut to max_length" in ended.err or "1 text was cut to max_length" in ended.err


def test_predict_abstains_below_the_confidence_asked_for(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    sure = float(run("predict", tiny_run, "the film was superb").out.split("\t")[1])
    texts = ("the film was superb", "the film was awful")
    done = run("predict", tiny_run, *texts, "--min-confidence", "1")
    assert [line.split("\t")[0] for line in done.out.splitlines()] == ["abstain", "abstain"]
    done = run("predict", tiny_run, *texts, "--min-confidence", str(sure - 0.01))
    assert done.out.splitlines()[0].startswith(load_predictor(tiny_run).predict(texts)[0])
    with open(tiny_run / "predictions.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if float(row["confidence"]) >= sure - 0.01]
    if rows:
        assert f"{np.mean([row['label'] == row['prediction'] for row in rows]):.3f} of those right" in done.err
    (tmp_path / "t.csv").write_text("sentence\nthe film was superb\n")
    run("predict", tiny_run, "--input", "t.csv", "--output", "o.csv", "--min-confidence", "1.0")
    assert (tmp_path / "o.csv").read_text().splitlines()[1].split(",")[1] == "abstain"


@pytest.mark.parametrize("confidence", ["-0.1", "1.5", "nan"])
def test_a_confidence_that_is_none_is_refused(confidence: str, run: Run, tiny_run: Path) -> None:
    done = run("predict", tiny_run, "a film", "--min-confidence", confidence)
    assert (done.code, done.out) == (2, "")
    assert "--min-confidence takes a number from 0 to 1" in done.err


def test_a_label_named_abstain_is_not_mixed_up(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "r")
    settings = json.loads((tmp_path / "r" / "config.json").read_text())
    settings["id2label"] = {"0": "abstain", "1": "1"}
    (tmp_path / "r" / "config.json").write_text(json.dumps(settings))
    assert run("predict", "r", "a film", "--min-confidence", "0.9").code == 2
    assert run("predict", "r", "a film").code == 0


# --- explain and audit


def test_explain_prints_the_words_and_the_nearest_training_texts(run: Run, tiny_run: Path) -> None:
    done = run("explain", tiny_run, "the film was superb and lovely")
    label, confidence = done.out.splitlines()[0].split()
    assert label in ("0", "1")
    assert 0.5 <= float(confidence) <= 1
    for heading in ("Speaks for it", "Speaks against it", "Nearest training texts", "completeness error 0."):
        assert heading in done.out
    assert "superb" in done.out
    assert "\x1b" not in done.out, "no colours but on a terminal"


def test_explain_as_json_and_as_a_page(run: Run, tiny_run: Path) -> None:
    text = "<script>alert(1)</script> the film was superb"
    found = json.loads(run("explain", tiny_run, text, "--json").out)
    assert found["text"] == text
    assert [word["word"] for word in found["words"]] == text.split()
    assert [set(one) for one in found["nearest"]] == [{"text", "label", "similarity"}] * 5
    assert found["completeness_error"] < 0.1
    page = run("explain", tiny_run, text, "--html").out
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    both = run("explain", tiny_run, text, "--json", "--html")
    assert (both.code, both.out) == (2, "")


def test_explain_does_without_the_table(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "r")
    info = json.loads((tmp_path / "r" / "headstart.json").read_text())
    info["settings"]["data"] = "gone.csv"
    (tmp_path / "r" / "headstart.json").write_text(json.dumps(info))
    done = run("explain", "r", "the film was superb")
    assert done.code == 0
    assert "superb" in done.out
    assert "Nearest" not in done.out
    assert "nearest training texts are not shown. gone.csv: no such file" in done.err


@posix
def test_explain_colours_the_words_on_a_terminal(tiny_run: Path, tmp_path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    process = start(["explain", tiny_run, "the film was superb"], tmp_path, stdout=child, stderr=subprocess.DEVNULL)
    os.close(child)
    said = b""
    with contextlib.suppress(OSError):  # the terminal is closed at the end
        while chunk := os.read(parent, 65536):
            said += chunk
    assert process.wait(60) == 0
    assert b"\x1b[" in said.splitlines()[0]


def test_audit_writes_all_rows_and_says_what_it_found(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [*SMALL_ROWS, (SMALL_ROWS[0][0], SMALL_ROWS[1][1]), ("", "1")]
    write_csv(tmp_path / "t.csv", rows, "sentence", "label")
    done = run("audit", "t.csv", "--model", tiny_bert)
    assert (done.code, done.err) == (0, "")
    assert "t.csv: 82 rows; 0 " in done.out
    assert "2  same text with another label" in done.out
    assert "1  blank text or label" in done.out
    assert done.out.splitlines()[-1] == "Next      headstart train t-audit.csv"
    again = run("train", "t-audit.csv", "--model", tiny_bert, "--out", "r")
    assert again.code == 0, "what it wrote can be trained on"


def test_audit_names_columns_that_train_would_not_find(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", SMALL_ROWS, "what they said", "kind")
    done = run("audit", "t.csv", "--text", "what they said", "--label", "kind", "--model", tiny_bert, "--out", "f.csv")
    assert done.out.splitlines()[-1] == "Next      headstart train f.csv --text 'what they said' --label kind"


def test_audit_refuses_what_train_refuses(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sentence,label\n" + "a film,1\n" * 20)
    before = tree(tmp_path)
    done = run("audit", "t.csv", "--model", tiny_bert)
    assert (done.code, done.out) == (2, "")
    assert "every row has the label '1'" in done.err
    assert tree(tmp_path) == before


def test_predict_from_a_table_to_a_table(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,sentence\n7,the film was great\n8,\n")
    ended = run("predict", tiny_run, "--input", "in.csv", "--output", "out.jsonl")
    assert ended.code == 0
    assert ended.out == ""
    assert "2 rows labelled in out.jsonl." in ended.err
    assert "1 of them have an empty text" in ended.err or "1 of them has an empty text" in ended.err
    rows = pl.read_ndjson(tmp_path / "out.jsonl")
    assert rows.columns == ["id", "sentence", "prediction", "confidence", "p_0", "p_1"]
    assert rows["prediction"].to_list()[1] is None


def test_evaluate_prints_the_report(run: Run, tiny_run: Path, small_table: Path) -> None:
    ended = run("evaluate", tiny_run, small_table)
    assert ended.code == 0
    assert "precision" in ended.out
    assert "on 80 texts (95% interval" in ended.out


def test_calibrate_prints_what_it_gained(
    run: Run, elsewhere: Callable[..., Path], small_table: Path, tmp_path: Path
) -> None:
    ended = run("calibrate", elsewhere("bert", "bad", "good"), small_table, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("Logits    divided by ")
    for piece in (
        f"fitted on 80 texts of {small_table}\n",
        "each text by what was fitted on the 4 of 5 folds without it",
        "before as after: no text is labelled otherwise\n",
        "Saved     runs/bert-calibrated\n",
        'headstart predict runs/bert-calibrated "your text"',
    ):
        assert piece in ended.out
    assert (tmp_path / "runs" / "bert-calibrated" / "headstart.json").is_file()
    again = run("calibrate", elsewhere("bert", "bad", "good"), small_table, "--device", "cpu")
    assert (again.code, again.out) == (2, "")
    assert "runs/bert-calibrated: is not empty" in again.err
    assert run("calibrate", elsewhere("bert"), small_table, "--overwrite", "--device", "cpu").code == 0


def test_a_classifier_made_elsewhere_is_told_of_as_any_other(
    run: Run, elsewhere: Callable[..., Path], small_table: Path, tmp_path: Path
) -> None:
    shutil.copytree(elsewhere("bert", "NEGATIVE", "POSITIVE"), tmp_path / "theirs")
    ended = run("evaluate", "theirs", small_table)
    assert ended.code == 0, ended.err
    assert "on 80 texts (95% interval" in ended.out
    assert "NEGATIVE" in ended.out
    ended = run("explain", "theirs", "the film was superb")
    assert ended.code == 0, ended.err
    assert "The nearest training texts are not shown. theirs: was not trained by headstart" in ended.err
    ended = run("export", "theirs")
    assert (ended.code, ended.out) == (2, "")
    assert "theirs: has no predictions.csv, so there is nothing to test the export on. Give --test FILE." in ended.err
    ended = run("export", "theirs", "--test", small_table)
    assert ended.code == 0, ended.err
    assert run("predict", "theirs", "the film was superb").out.split("\t")[0] in ("NEGATIVE", "POSITIVE")


def test_a_run_may_be_a_hub_id_that_the_local_cache_has(
    run: Run, elsewhere: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--them--theirs"
    shutil.copytree(elsewhere("bert", "bad", "good"), place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    ended = run("predict", "them/theirs", "the film was superb")
    assert ended.code == 0, ended.err
    assert ended.out.split("\t")[0] in ("bad", "good")
    ended = run("predict", "them/others", "a")
    assert ended.err == "headstart: them/others: no such run folder. headstart train makes one.\n"


def test_lengths_advises_and_draws(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("sentence\nthe film was great\nthe soup\n")
    ended = run("lengths", "texts.csv", "--model", tiny_bert)
    assert ended.code == 0
    assert "Advised: --max-length 16, no text is cut, the longest has 6 tokens." in ended.out
    assert (tmp_path / "texts-lengths.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_are_printed_where_the_terminal_knows_few_signs(
    run: Run, tiny_bert: Path, small_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    ended = run("lengths", small_table, "--model", tiny_bert)
    assert ended.code == 0, ended.err
    assert "Advised: --max-length 16" in printed.getvalue().decode("cp1252")


def test_cache_info_and_clear(run: Run, tiny_bert: Path, small_table: Path, cache_dir: Path) -> None:
    assert "0 texts from 0 encoders" in run("cache", "info").out
    run("train", small_table, "--model", tiny_bert, "--epochs", 1, "--out", "r")
    shown = run("cache", "info").out
    assert "80 texts from 1 encoder\n" in shown
    assert str(cache_dir) in shown
    assert run("cache", "clear").out.startswith("Freed ")
    assert "0 texts from 0 encoders" in run("cache", "info").out


# --- what a table holds cannot drive the terminal

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m"


def test_escape_characters_never_reach_the_terminal(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        (f"{HOSTILE} the film {i} was {'great' if i % 2 else 'rude'}", f"a{HOSTILE}" if i % 2 else "b")
        for i in range(40)
    ]
    frame = pl.DataFrame(rows, schema=["sentence", "label"], orient="row")
    frame.write_csv(tmp_path / "t.csv")
    ends = [run("train", "t.csv", "--model", tiny_bert, "--epochs", 1, "--out", "r")]
    assert ends[0].code == 0, ends[0].err
    ends += [run("evaluate", "r", "t.csv"), run("predict", "r", rows[0][0], rows[1][0])]
    assert [end.code for end in ends] == [0, 0, 0]
    frame.rename({"label": f"l{HOSTILE}"}).write_csv(tmp_path / "column.csv")
    frame.with_columns(label=pl.lit(HOSTILE)).write_csv(tmp_path / "one.csv")
    frame.with_columns(label=pl.lit(HOSTILE)).write_csv(tmp_path / "strange.csv")
    ends += [run("train", name, "--model", tiny_bert, "--out", "x") for name in ("column.csv", "one.csv")]
    ends += [run("evaluate", "r", "strange.csv"), run("train", f"no{HOSTILE}.csv")]
    assert [end.code for end in ends[3:]] == [2, 2, 2, 2]
    for end in ends:
        assert not {"\x1b", "\x07", "\x9b"} & set(end.out + end.err)
    written = pl.read_csv(tmp_path / "r" / "predictions.csv")
    assert written["text"].str.contains("\x1b").all(), "files keep what they were given"


# --- bad input: one sentence, exit 2, nothing written


def copy_model(model: Path, folder: Path, **changes: bytes | None) -> None:
    """A copy of a model folder with some files changed, or removed (None)."""
    shutil.copytree(model, folder)
    for name, content in changes.items():
        path = folder / {"weights": "model.safetensors", "config": "config.json", "pickled": "pytorch_model.bin"}[name]
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)


def fill(folder: Path, name: str) -> None:
    """A folder with one table in it."""
    folder.mkdir()
    (folder / name).write_text(table())


def pickled_weights() -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Bad:
    """One thing that a person may do wrong: the content of t.csv, more to prepare, arguments, what must be said."""

    said: tuple[str, ...]
    content: str | bytes | None = None
    name: str = "t.csv"
    arguments: tuple[str, ...] = ()
    prepare: Callable[[Path, Path], object] = lambda folder, model: None
    sentences: int = 1


BAD = {
    "no such file": Bad(("zzzz.parquet: no such file. Check the path",), table(), arguments=("zzzz.parquet",)),
    "a near name": Bad(("tt.csv: no such file. Did you mean t.csv?",), table(), arguments=("tt.csv",)),
    "a folder": Bad(
        ("sets: is a folder; give a file in it. It holds a.csv",),
        arguments=("sets",),
        prepare=lambda folder, model: fill(folder / "sets", "a.csv"),
    ),
    "empty": Bad(("t.csv: the file is empty",), b""),
    "binary": Bad(("t.csv: is a binary file",), bytes(range(256)) * 20),
    "latin-1": Bad(
        (
            f"t.csv: byte {len(table()) + 3} (0xe9, in row 22) is not UTF-8",
            "probably latin-1",
            "iconv -f latin1 -t utf-8",
        ),
        table(more="caf").encode() + b"\xe9,1\n",
    ),
    "UTF-16": Bad(("t.csv: is UTF-16, not UTF-8. Save it as UTF-8",), table().encode("utf-16")),
    "header only": Bad(("t.csv: has a header and no rows",), "sentence,label\n"),
    "no text column": Bad(
        ("has no text column", "'sentense', 'label'", "--text sentense"), table(header="sentense,label")
    ),
    "no label column": Bad(
        ("has no label column", "'sentence', 'lable'", "--label lable"), table(header="sentence,lable")
    ),
    "no such column": Bad(
        ("has no column 'setence'; its columns are 'sentence', 'label'. Did you mean 'sentence'?",),
        table(),
        arguments=("t.csv", "--text", "setence"),
    ),
    "two candidates": Bad(
        ("'text' and 'review' could both be the text column", "--text COLUMN"),
        table(header="text,review").replace(",", ",x,").replace("text,x,review", "text,review,label"),
    ),
    "a repeated column": Bad(("the column 'label' appears twice. Rename one",), table(header="label,label")),
    "one class": Bad(
        ("every row has the label 'yes'; at least two",), table().replace(",0", ",yes").replace(",1", ",yes")
    ),
    "a rare class": Bad(
        ("t.csv: too few rows", "the label '2' has 1 row", "Merge it", "--validation and --test"),
        table(more="a rare one,2\n"),
    ),
    "too many fields": Bad(("t.csv: row 22 has 3 fields where the header has 2. Put quotes",), table(more="a, b,1\n")),
    "too few fields": Bad(("t.csv: row 22 has 1 field where the header has 2. Fill in",), table(more="abc\n")),
    "both kinds": Bad(("row 22 has 1 field", "row 23 has 3 fields"), table(more="abc\na, b,1\n"), sentences=2),
    "all at once": Bad(
        ("no text column", "no label column", "row 22 has 1 field"), table(header="a1,b1", more="abc\n"), sentences=3
    ),
    "an open quote": Bad(("t.csv: row 22 opens a quote that is never closed",), table(more='"abc,1\nx,0\n')),
    "all distinct": Bad(
        ("'label' has 30 different values in 30 rows", "--label COLUMN"),
        "sentence,label\n" + "".join(f"text {i},{i}\n" for i in range(30)),
    ),
    "nine rows": Bad(("t.csv: has 9 usable rows, and at least 10",), table(9)),
    "200 rare labels": Bad(
        ("too few rows", "194 more labels are as rare"),
        "sentence,label\n" + "".join(f"text {i},L{i % 200}\n" for i in range(400)),
    ),
    "a truncated gzip": Bad(
        ("t.csv.gz: is not a whole gzip file",), gzip.compress(table(900).encode())[:-30], "t.csv.gz"
    ),
    "a corrupt parquet": Bad(
        ("t.parquet: is not a whole .parquet table",), b"PAR1" + b"\xff" * 99 + b"PAR1", "t.parquet"
    ),
    "broken JSON": Bad(("t.jsonl: row 2 is no record",), '{"sentence": "a", "label": 1}\n{"sent\n', "t.jsonl"),
    "another ending": Bad(("t.xlsx: headstart reads .csv",), b"PK", "t.xlsx"),
    "a faulty test file": Bad(
        ("b.csv: the label 'maybe' (row 2) is not one of those trained on: 0, 1",),
        table(),
        arguments=("t.csv", "--test", "b.csv"),
        prepare=lambda folder, model: (folder / "b.csv").write_text("sentence,label\na,maybe\n"),
    ),
    "faults in both files": Bad(
        ("a.csv: has a header and no rows", "b.csv: no such file"),
        table(),
        arguments=("t.csv", "--validation", "a.csv", "--test", "b.csv"),
        prepare=lambda folder, model: (folder / "a.csv").write_text("sentence,label\n"),
        sentences=2,
    ),
    "names that do not fit": Bad(
        ("--label-names gives 3 names, and there are 2 labels: 0, 1",),
        table(),
        arguments=("t.csv", "--label-names", "a,b,c"),
    ),
    "max_length too long": Bad(
        ("--max-length 65:", "takes at most 64 tokens", "suggest 16"),
        table(),
        arguments=("t.csv", "--max-length", "65"),
    ),
    "out is not empty": Bad(
        ("full: is not empty. Choose another --out, or replace it with --overwrite",),
        table(),
        arguments=("t.csv", "--out", "full"),
        prepare=lambda folder, model: fill(folder / "full", "precious"),
    ),
    "overwriting what is no run": Bad(
        ("full: is not a run folder (no headstart.json), so --overwrite does not replace it",),
        table(),
        arguments=("t.csv", "--out", "full", "--overwrite"),
        prepare=lambda folder, model: fill(folder / "full", "precious"),
    ),
    "out is a file": Bad(("t.csv: is a file; --out takes a folder",), table(), arguments=("t.csv", "--out", "t.csv")),
    "out under a file": Bad(("t.csv/run: cannot be written",), table(), arguments=("t.csv", "--out", "t.csv/run")),
    "no weights": Bad(
        ("m: has no weights (model.safetensors).",),
        table(),
        arguments=("t.csv", "--model", "m"),
        prepare=lambda folder, model: copy_model(model, folder / "m", weights=None),
    ),
    "pickled weights": Bad(
        ("m: has no weights (model.safetensors)", "never loads: convert them to safetensors"),
        table(),
        arguments=("t.csv", "--model", "m"),
        prepare=lambda folder, model: copy_model(model, folder / "m", weights=None, pickled=pickled_weights()),
    ),
    "truncated weights": Bad(
        ("m: ", "cannot be loaded"),
        table(),
        arguments=("t.csv", "--model", "m"),
        prepare=lambda folder, model: copy_model(
            model, folder / "m", weights=(model / "model.safetensors").read_bytes()[:-5000]
        ),
    ),
    "weights of noise": Bad(
        ("m: ", "cannot be loaded"),
        table(),
        arguments=("t.csv", "--model", "m"),
        prepare=lambda folder, model: copy_model(model, folder / "m", weights=b"\xff" * 999),
    ),
    "a broken config": Bad(
        ("m", "config.json"),
        table(),
        arguments=("t.csv", "--model", "m"),
        prepare=lambda folder, model: copy_model(model, folder / "m", config=b"{"),
    ),
    "no model at all": Bad(
        ("m: has no config.json, so it is not a model folder",),
        table(),
        arguments=("t.csv", "--model", "m"),
        prepare=lambda folder, model: (folder / "m").mkdir(),
    ),
    "no such model folder": Bad(("--model ./m: no such folder",), table(), arguments=("t.csv", "--model", "./m")),
    "the Hub is out of reach": Bad(
        ("--model bert-base-uncased", "cannot be reached", "Try --model minilm"),
        table(),
        arguments=("t.csv", "--model", "bert-base-uncased"),
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_to_train(kind: str, run: Run, tmp_path: Path, tiny_bert: Path, cache_dir: Path) -> None:
    bad = BAD[kind]
    if bad.content is not None:
        (tmp_path / bad.name).write_bytes(bad.content if isinstance(bad.content, bytes) else bad.content.encode())
    bad.prepare(tmp_path, tiny_bert)
    arguments = [*(bad.arguments or (bad.name,))]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_bert)]
    before = tree(tmp_path)
    ended = run("train", *arguments)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    for piece in bad.said:
        assert piece in ended.err
    assert all(line.startswith("headstart: ") for line in ended.err.splitlines())
    assert len(ended.err.splitlines()) == bad.sentences
    assert "Traceback" not in ended.err
    assert tree(tmp_path) == before, "nothing is written"
    assert tree(cache_dir) == {}, "nothing is kept"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("predict", "nowhere", "text"), "nowhere: no such run folder. headstart train makes one"),
        (("predict", "empty", "text"), "empty: is not a run folder"),
        (("predict", "t.csv", "text"), "t.csv: "),
        (("predict", "model", "text"), "model: holds a model without a classification head"),
        (("evaluate", "empty", "t.csv"), "empty: is not a run folder"),
        (("predict", "torn", "text"), "torn: "),
        (("predict", "headless", "text"), "headless: "),
        (("predict", "run", "--input", "gone.csv", "--output", "o.csv"), "gone.csv: no such file"),
        (("predict", "run", "--input", "ragged.csv", "--output", "o.csv"), "ragged.csv: row 22 has 3 fields"),
        (("predict", "run", "--input", "t.csv", "--output", "o.xlsx"), "o.xlsx: headstart reads"),
        (("predict", "run", "--input", "t.csv", "--output", "t.csv"), "t.csv: is the input"),
        (("predict", "run", "--input", "t.csv", "--output", "ragged.csv/o.csv"), "ragged.csv/o.csv: cannot be written"),
        (("predict", "run", "--input", "t.csv", "--text", "texts"), "has no column 'texts'"),
        (("evaluate", "run", "strange.csv"), "the label 'maybe' (row 2) is not one of those trained on: 0, 1"),
        (("evaluate", "run", "gone.csv"), "gone.csv: no such file"),
        (("lengths", "gone.csv", "--model", "model"), "gone.csv: no such file"),
        (("lengths", "t.csv", "--model", "empty"), "empty: has no config.json"),
        (("lengths", "t.csv", "--model", "model", "--png", "no/x.png"), "no/x.png: cannot be written"),
    ],
)
def test_bad_input_to_other_commands(
    arguments: tuple[str, ...], said: str, run: Run, tmp_path: Path, tiny_bert: Path, tiny_run: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text(table())
    (tmp_path / "ragged.csv").write_text(table(more="a, b,1\n"))
    (tmp_path / "strange.csv").write_text("sentence,label\na,maybe\nb,1\n")
    shutil.copytree(tiny_bert, tmp_path / "model")
    for name in ("run", "torn", "headless"):
        shutil.copytree(tiny_run, tmp_path / name)
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3000])
    (tmp_path / "headless" / "config.json").unlink()
    before = tree(tmp_path)
    ended = run(*arguments)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert ended.out == ""
    assert ended.err.startswith("headstart: ")
    assert len(ended.err.splitlines()) == 1
    assert tree(tmp_path) == before, "nothing is written"


@pytest.mark.parametrize("damage", ["a flipped bit", "a torn end", "noise"])
def test_a_damaged_store_entry_is_computed_again(
    damage: str, run: Run, tiny_bert: Path, small_table: Path, cache_dir: Path, tmp_path: Path
) -> None:
    arguments = ("train", small_table, "--model", tiny_bert, "--epochs", 2, "--seed", 3, "--out")
    assert run(*arguments, "one").code == 0
    (segment,) = cache_dir.rglob("*.safetensors")
    whole = segment.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    segment.write_bytes({"a flipped bit": flipped, "a torn end": whole[:-500], "noise": b"\xff" * 999}[damage])
    again = run(*arguments, "two")
    assert again.code == 0
    assert "encoded again" in again.err
    assert str(segment) in again.err
    numbers = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert numbers[1]["features"]["encoded"] > 0
    assert numbers[0]["test"] == numbers[1]["test"]
    third = run(*arguments, "three")
    assert (third.code, third.err) == (0, ""), "mended"


def test_a_person_replaces_a_run_with_overwrite(run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    arguments = ("train", small_table, "--model", tiny_bert, "--epochs", 1, "--out", "r")
    assert run(*arguments).code == 0
    (tmp_path / "r" / "left over").write_text("x")
    assert run(*arguments).code == 2
    assert run(*arguments, "--overwrite").code == 0
    assert not (tmp_path / "r" / "left over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "small.csv"]


# --- the disk


def obey_modes() -> None:
    """In the child: root, too, shall be refused what a file's mode forbids."""
    import ctypes

    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; another user may not and need not


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops a capability of Linux")
def test_a_forbidden_folder_and_a_forbidden_file(tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "forbidden"
    folder.mkdir()
    folder.chmod(0o555)
    secret = tmp_path / "secret.csv"
    shutil.copy(small_table, secret)
    secret.chmod(0)
    before = tree(tmp_path)
    commands = [
        ["train", small_table, "--out", folder / "deep" / "run", "--model", tiny_bert],
        ["train", secret, "--out", tmp_path / "run", "--model", tiny_bert],
        ["lengths", small_table, "--png", folder / "x.png", "--model", tiny_bert],
    ]
    script = f"""
from headstart.cli import main
for arguments in {[list(map(str, command)) for command in commands]}:
    try:
        main(arguments)
    except SystemExit as end:
        print(end.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=obey_modes, timeout=60
    )
    assert done.stdout.split() == ["2", "2", "2"], done.stderr
    refusal = "cannot be written (no permission). Choose another folder or change its mode."
    assert done.stderr.splitlines() == [
        f"headstart: {folder}/deep/run: {refusal}",
        f"headstart: {secret}: cannot be read (no permission).",
        f"headstart: {folder}/x.png: {refusal}",
    ]
    assert tree(tmp_path) == before


def test_a_full_disk(
    run: Run, tiny_bert: Path, tiny_run: Path, small_table: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "filler").write_bytes(b"x" * 60_000)
    before = tree(small_disk)
    filled = (
        ("train", small_table, "--model", tiny_bert, "--epochs", 1, "--out", small_disk / "run"),
        ("predict", tiny_run, "--input", "long.csv", "--output", small_disk / "o.csv"),
        ("predict", tiny_run, "--input", "long.csv", "--output", small_disk / "o.parquet"),
        ("predict", tiny_run, "--input", "long.csv", "--output", small_disk / "o.jsonl.gz"),
    )
    letters = iter(os.urandom(200_000).hex())
    long = "".join(f"the film was {''.join(next(letters) for _ in range(900))}\n" for _ in range(200))
    Path("long.csv").write_text("sentence\n" + long)
    for arguments in filled:
        ended = run(*arguments)
        assert ended.code == 2, (arguments, ended.err)
        assert "the disk is full. Free some space" in ended.err
        assert str(small_disk) in ended.err
        assert len(ended.err.splitlines()) == 1
        assert tree(small_disk) == before, "nothing is left half-written"
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(small_disk / "cache"))
    (small_disk / "filler").write_bytes(b"x" * 90_000)
    ended = run("train", small_table, "--model", tiny_bert, "--epochs", 1, "--out", "r")
    assert ended.code == 2
    assert "cache/features: the disk is full" in ended.err
    assert not list(small_disk.rglob("*.tmp"))
    assert not list(small_disk.rglob("*.safetensors"))
    assert not Path("r").exists()


@posix
def test_a_limit_on_file_sizes(run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    import resource

    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        ended = run("train", small_table, "--model", tiny_bert, "--epochs", 1, "--out", "new/run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 2, ended.err
    assert ended.err == (
        "headstart: new/run: the disk is full. Free some space or choose another --out, and run it again.\n"
    )
    assert set(tree(tmp_path)) - set(before) <= {"new"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_stdout(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115  # closing it fails, as it should
    monkeypatch.setattr("sys.stdout", full)
    ended = run("predict", tiny_run, "the film was great")
    assert ended.code == 2
    assert "the disk is full" in ended.err
    assert "Traceback" not in ended.err
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        full.close()


# --- Ctrl-C


@contextlib.contextmanager
def on_a_terminal(
    arguments: list[object], folder: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[str], str]]]:
    """The real command line with stderr on a terminal, and a function that reads it up to some words (or the end)."""
    master, terminal = os.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "160"}
    with start(arguments, folder, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = ""

        def read_until(words: str) -> str:
            nonlocal shown
            while words not in shown:
                try:
                    piece = os.read(master, 65536)
                except OSError:  # Linux ends a closed pseudo-terminal so
                    piece = b""
                if not piece:
                    break
                shown += piece.decode("utf-8", "replace")
            return shown

        try:
            yield process, read_until
        finally:
            process.kill()
            os.close(master)


def copies(folder: Path, times: int) -> Path:
    """Few distinct texts, many rows: quick to encode, long to train on."""
    rows = [
        f"the {noun} was {word},{int(word == 'great')}"
        for noun in ("film", "soup", "app")
        for word in ("great", "rude")
    ]
    path = folder / "copies.csv"
    path.write_text("\n".join(["sentence,label", *rows * times]) + "\n")
    return path


@posix
def test_ctrl_c_in_the_first_epoch_keeps_what_has_been_learnt(tiny_bert: Path, tmp_path: Path) -> None:
    data = copies(tmp_path, 20_000)  # the first epoch takes 84,000 steps
    arguments = ["train", data, "--recipe", "article", "--model", tiny_bert, "--batch-size", 1, "--out", tmp_path / "r"]
    with on_a_terminal(arguments, tmp_path) as (process, read_until):
        assert "steps/s" in read_until("steps/s")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        end = read_until("the end")
    assert process.returncode == 130
    assert "Ctrl-C: training ended early; the best so far was tested and saved." in end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies.csv", "r"]


@posix
def test_ctrl_c_before_anything_is_kept(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [(f"the film was great {i}", str(i % 2)) for i in range(60_000)]
    data = write_csv(tmp_path / "many.csv", rows)
    with on_a_terminal(["train", data, "--model", tiny_bert, "--out", tmp_path / "r"], tmp_path) as (
        process,
        read_until,
    ):
        assert "tokenizing" in read_until("tokenizing")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        end = read_until("the end")
    assert process.returncode == 130
    assert out == b""
    assert "headstart: interrupted; nothing was kept." in end
    assert "Traceback" not in end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.csv"]


@posix
@pytest.mark.parametrize(
    ("recipe", "words", "settings"),
    [("article", "validation", ("--epochs", 10**6)), ("headstart", "best loss", ("--batch-size", 1, "--epochs", 20))],
)
def test_ctrl_c_keeps_tests_and_saves_the_best_so_far(
    recipe: str, words: str, settings: tuple[object, ...], run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path
) -> None:
    arguments = ["train", small_table, "--recipe", recipe, "--model", tiny_bert, "--out", "r", *settings]
    with on_a_terminal(arguments, tmp_path) as (process, read_until):
        assert words in read_until(words), "an epoch or a head is done"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        end = read_until("the end")
    assert process.returncode == 130, end
    assert "Ctrl-C: training ended early; the best so far was tested and saved." in end
    assert "Test      accuracy" in out.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "small.csv"]
    info = json.loads((tmp_path / "r" / "headstart.json").read_text())
    assert info["interrupted"] is True
    assert len(info["history"]) >= 1
    assert run("predict", "r", "the film was great").code == 0


# --- fine-tuning: killed, resumed, repeated

FINE = ("--thaw", "all", "--epochs", 6, "--batch-size", 8, "--lr", "1e-3", "--device", "cpu", "--precision", "fp32")

LIVES = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import headstart.run, headstart.thaw, transformers.models.bert.modeling_bert
from headstart.cli import main

def killed(out, after, number):
    before = set(out.glob("checkpoint-*/"))
    while set(out.glob("checkpoint-*/")) <= before:
        time.sleep(0.001)
    time.sleep(after)
    os.kill(os.getpid(), number)

for arguments, after, number in json.loads(sys.argv[1]):
    process = os.fork()
    if process == 0:
        out = Path(arguments[arguments.index("--out") + 1])
        if number:
            threading.Thread(target=killed, args=(out, after, number), daemon=True).start()
        main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def live(folder: Path, *lives: tuple[list[object], float, int]) -> tuple[list[int], str]:
    """The command once for each life, in processes of their own: how each ended, and all they said on stderr.

    A life ends so many seconds after its first checkpoint, by a signal, unless that is 0. What takes long to import is
    imported once.
    """
    told = json.dumps([([str(one) for one in arguments], after, number) for arguments, after, number in lives])
    environment = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])}
    command = [sys.executable, "-c", LIVES, told]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdecimal()], done.stderr


@pytest.fixture(scope="module")
def fine_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("fine") / "small.csv", SMALL_ROWS)


@pytest.fixture(scope="module")
def fine_run(tiny_bert: Path, fine_table: Path, _session_cache: None) -> Path:
    """A fine-tuned run that nothing has disturbed. Do not write into it."""
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in fine(fine_table, tiny_bert, fine_table.parent / "fine")])
    assert ended.value.code in (0, None)
    return fine_table.parent / "fine"


def fine(table: Path, model: Path, out: object) -> list[object]:
    return ["train", table, "--model", model, "--out", out, *FINE]


def same_result(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "predictions.csv", "config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


KILLS = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import headstart.run, headstart.thaw, transformers.models.bert.modeling_bert
from headstart.cli import main

def killer(out, inside):
    before = set(out.glob("checkpoint-*/"))
    while set(out.glob("checkpoint-*/")) <= before:
        time.sleep(0.0005)
    if inside:
        while not list(out.glob(".checkpoint-*.tmp")):
            time.sleep(0.0002)
    time.sleep(random.uniform(0, 0.003 if inside else 0.12))
    os.kill(os.getpid(), signal.SIGKILL)

arguments, kills, seed = json.loads(sys.argv[1])
random.seed(seed)
killed = inside = finished = 0
while killed < kills or Path(f"r{finished}").exists():
    out, write, last = Path(f"r{finished}"), random.random() < 0.5, killed >= kills
    process = os.fork()
    if process == 0:
        if not last:
            threading.Thread(target=killer, args=(out, write), daemon=True).start()
        main([*arguments, "--out", str(out), "--resume"])
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if ended not in (0, -signal.SIGKILL):
        sys.exit(f"a run ended with {ended}")
    killed, finished = killed + (ended != 0), finished + (ended == 0)
    inside += ended != 0 and any(out.glob(".checkpoint-*.tmp"))
print(json.dumps([killed, inside, finished]))
"""


@posix
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_ends_in_the_same_bytes(
    kills: int, fine_run: Path, tiny_bert: Path, fine_table: Path, tmp_path: Path
) -> None:
    arguments = ["train", fine_table, "--model", tiny_bert, *FINE, "--checkpoint-minutes", "0.0001"]
    seed = int(np.random.default_rng().integers(2**32))
    told = json.dumps([list(map(str, arguments)), kills, seed])
    environment = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLS, told], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, (seed, done.stderr)
    killed, inside, finished = json.loads(done.stdout.splitlines()[-1])
    assert (killed, inside > 0, finished > 0) == (kills, True, True), (seed, done.stdout.splitlines()[-1])
    assert "Resumed from r0/checkpoint-" in done.stderr, seed
    for number in range(finished):
        assert same_result(tmp_path / f"r{number}", fine_run), (seed, number)
    assert not list(tmp_path.rglob("*checkpoint*")), "nothing of the checkpoints is left"


@posix
@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_resumed(
    damage: str, run: Run, fine_run: Path, tiny_bert: Path, fine_table: Path, tmp_path: Path
) -> None:
    arguments = [*fine(fine_table, tiny_bert, "r"), "--checkpoint-minutes", "0.0001"]
    assert live(tmp_path, (arguments, 0.05, int(signal.SIGTERM)))[0] == [143]
    before, newest = sorted((tmp_path / "r").glob("checkpoint-*/"), key=lambda place: int(place.name[11:]))
    file = newest / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content[:-100] if damage == "cut short" else content)
    resumed = run(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert f"r/{newest.name}: passed over, it is damaged (state.safetensors is not as it was written)." in resumed.err
    assert f"Resumed from r/{before.name} " in resumed.err
    assert same_result(tmp_path / "r", fine_run)


@posix
def test_a_full_disk_while_checkpointing_leaves_the_last_good_one(
    run: Run, fine_run: Path, tiny_bert: Path, fine_table: Path, tmp_path: Path
) -> None:
    import resource

    arguments = [*fine(fine_table, tiny_bert, "r"), "--checkpoint-minutes", "0.0001"]
    assert live(tmp_path, (arguments, 0.01, int(signal.SIGTERM)))[0] == [143]
    before = tree(tmp_path / "r")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        ended = run(*arguments, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 2
    assert ": the disk is full. Free some space" in ended.err.splitlines()[-1]
    assert "/checkpoint-" in ended.err.splitlines()[-1]
    assert tree(tmp_path / "r") == before
    assert run(*arguments, "--resume").code == 0
    assert same_result(tmp_path / "r", fine_run)


@posix
def test_ctrl_c_while_fine_tuning_keeps_tests_and_saves_the_best_so_far(
    run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path
) -> None:
    arguments = ["train", small_table, "--model", tiny_bert, "--out", "r", "--thaw", "all", "--epochs", 10**6]
    with on_a_terminal(arguments, tmp_path) as (process, read_until):
        assert "fine-tuning" in read_until("fine-tuning")
        while not list((tmp_path / "r").glob("checkpoint-*/")):  # at an epoch's end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        end = read_until("the end")
    assert process.returncode == 130, end
    assert "Ctrl-C: training ended early; the best so far was tested and saved." in end
    assert "fine-tuned with all layers" in out.decode()
    info = json.loads((tmp_path / "r" / "headstart.json").read_text())
    assert (info["interrupted"], info["thaw"]["kept"]) == (True, "all")
    again = run("train", small_table, "--config", "r/headstart.json", "--out", "again")
    assert again.code == 0, again.err
    assert same_result(tmp_path / "again", tmp_path / "r"), "also cut short where it was"


@posix
def test_ctrl_c_before_a_resumed_run_has_come_to_its_checkpoint_leaves_it(
    tiny_bert: Path, fine_run: Path, fine_table: Path, tmp_path: Path
) -> None:
    arguments = [*fine(fine_table, tiny_bert, "r"), "--checkpoint-minutes", "0.0001", "--thaw", "auto"]
    assert live(tmp_path, (arguments, 0.01, int(signal.SIGTERM)))[0] == [143]
    before = tree(tmp_path / "r")
    with on_a_terminal([*arguments, "--resume"], tmp_path) as (process, read_until):
        assert "best loss" in read_until("best loss")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        end = read_until("the end")
    assert process.returncode == 130, end
    assert "Ctrl-C: the checkpoints in r are left as they are; --resume goes on from the newest." in end
    assert tree(tmp_path / "r") == before


@posix
def test_sigterm_ends_with_143_and_an_unfinished_run_is_not_overwritten_by_chance(
    run: Run, fine_run: Path, tiny_bert: Path, fine_table: Path, tmp_path: Path
) -> None:
    arguments = [*fine(fine_table, tiny_bert, "r"), "--checkpoint-minutes", "0.0001"]
    ends, said = live(tmp_path, (arguments, 0.01, int(signal.SIGTERM)))
    assert ends == [143]
    assert said.splitlines()[-1] == (
        "headstart: SIGTERM: training was ended; a checkpoint was written; --resume goes on from it."
    )
    assert "Traceback" not in said
    assert (tmp_path / "r" / "checkpoint-plan.json").is_file()
    before = tree(tmp_path / "r")
    refused = run(*arguments)
    assert refused.code == 2
    assert refused.err == (
        "headstart: r: holds a run that has not ended. Go on with it by --resume, or replace it with --overwrite.\n"
    )
    other = run(*arguments, "--resume", "--seed", 5)
    assert other.code == 2
    assert "holds a run with other settings, data or versions that has not ended" in other.err
    assert tree(tmp_path / "r") == before
    resumed = run(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert "Resumed from r/checkpoint-" in resumed.err
    assert same_result(tmp_path / "r", fine_run)
    anew = run(*arguments, "--overwrite", "--keep-checkpoints")
    assert anew.code == 0, anew.err
    assert "Resumed" not in anew.err
    assert same_result(tmp_path / "r", fine_run)
    assert len(list((tmp_path / "r").glob("checkpoint-*/"))) == 2
    again = run(*arguments, "--resume")
    assert (again.code, again.out) == (0, "")
    assert again.err == "r: is finished; nothing is left to resume.\n"


def test_a_run_is_repeated_from_its_settings(run: Run, fine_run: Path, fine_table: Path, tmp_path: Path) -> None:
    again = run("train", fine_table, "--config", fine_run / "headstart.json", "--out", "again")
    assert again.code == 0, again.err
    assert same_result(tmp_path / "again", fine_run)
    other = run("train", fine_table, "--config", fine_run / "headstart.json", "--out", "other", "--seed", 5)
    assert other.code == 0, other.err
    info = json.loads((tmp_path / "other" / "headstart.json").read_text())
    assert (info["settings"]["seed"], info["settings"]["lr"], info["thaw"]["kept"]) == (5, 1e-3, "all")
    assert not same_result(tmp_path / "other", fine_run)


def test_saved_settings_are_read_back(run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path) -> None:
    given = (
        "--model",
        tiny_bert,
        "--epochs",
        2,
        "--learning-rate",
        0.01,
        "--head",
        "native",
        "--label-names",
        "bad,good",
    )
    ended = run("train", small_table, *given, "--out", "r", "--save-config", "conf/run.toml")
    assert ended.code == 0, ended.err
    assert ended.err == "conf/run.toml: has these settings now; --config reads them.\n"
    again = run("train", small_table, "--config", "conf/run.toml", "--out", "again")
    assert again.code == 0, again.err
    first, second = (
        json.loads((tmp_path / name / "headstart.json").read_text())["settings"] for name in ("r", "again")
    )
    assert (first["lr"], first["label_names"], first["thaw"]) == (0.01, ["bad", "good"], "0")
    assert first | {"out": "again"} == second
    assert same_result(tmp_path / "again", tmp_path / "r")


def test_a_saved_file_that_cannot_be_written_or_read_is_told_of(run: Run, small_table: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    ended = run("train", small_table, "--save-config", "folder")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "headstart: folder: cannot be written: a part of the path is missing or is no folder.\n"
    (tmp_path / "run.toml").write_text("epoch = 3\nseed = 'x'\n")
    ended = run("train", small_table, "--config", "run.toml")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.splitlines() == [
        "headstart: --config run.toml: There is no setting 'epoch'. Did you mean 'epochs'?",
        "headstart: --config run.toml: --seed takes a whole number, not 'x'.",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run.toml", "small.csv"]


def test_what_a_fine_tuned_run_says_of_itself(fine_run: Path) -> None:
    info, metrics = (json.loads((fine_run / name).read_text()) for name in ("headstart.json", "metrics.json"))
    assert (info["thaw"]["depth"], info["thaw"]["kept"], info["thaw"]["reason"]) == (
        *("all", "all", "all layers and the embeddings, as asked"),
    )
    assert [stage["name"] for stage in metrics["stages"]] == ["head", "thaw-all"]
    assert metrics["stages"][1]["epochs"] == len(info["history"])
    assert info["head"]["kind"] == "native"
    assert "fine-tuned with all layers and the embeddings" in info["head"]["description"]


def test_transformers_pipelines_agree_on_a_fine_tuned_run(run: Run, fine_run: Path) -> None:
    from transformers import pipeline

    texts = [text for text, _ in SMALL_ROWS[::7]]
    ended = run("predict", fine_run, *texts, "--precision", "fp32", "--device", "cpu")
    assert ended.code == 0, ended.err
    classify = pipeline("text-classification", str(fine_run), device="cpu")
    for line, one in zip(ended.out.splitlines(), classify(texts), strict=True):
        label, confidence, _ = line.split("\t")
        assert label == one["label"]
        assert float(confidence) == pytest.approx(one["score"], abs=6e-4), "three digits are shown"
    scored = load_predictor(fine_run, device="cpu", precision="fp32").score(texts).probabilities
    assert scored.max(axis=1) == pytest.approx([one["score"] for one in classify(texts)], abs=1e-4)


def test_a_dry_run_has_a_row_a_depth_and_writes_no_run(
    run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path
) -> None:
    given = ("train", small_table, "--model", tiny_bert, "--thaw", "auto", "--dry-run", "--out", "r", "--device", "cpu")
    ended = run(*given, "--report-to", "tensorboard", "--save-config", "run.toml")
    assert ended.code == 0, ended.err
    assert tomllib.loads((tmp_path / "run.toml").read_text())["thaw"] == "auto"
    (tmp_path / "run.toml").unlink()
    head, *rows = ended.out.splitlines()
    assert head.split() == ["--thaw", "predicted", "time", "memory", "disk"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "all"]
    assert not any("over the budget" in row for row in rows)
    assert all(
        "over the budget of 0 s" in row for row in run(*given, "--time-budget", "0.000001s").out.splitlines()[1:]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["small.csv"]


def test_auto_thaws_what_fits_and_keeps_it_only_if_it_is_better(
    run: Run, tiny_bert: Path, small_table: Path, tmp_path: Path
) -> None:
    arguments = ("train", small_table, "--model", tiny_bert, "--thaw", "auto", "--device", "cpu")
    ended = run(*arguments, "--out", "r", "--time-budget", "10m")
    assert ended.code == 0, ended.err
    info, metrics = (json.loads((tmp_path / "r" / f"{name}.json").read_text()) for name in ("headstart", "metrics"))
    assert info["thaw"]["depth"] == "all"
    assert info["thaw"]["reason"].startswith("all layers and the embeddings, the deepest that fits 600 s (")
    assert [cost["depth"] for cost in info["thaw"]["costs"]] == [1, 2, 3, "all"]
    head, tuned = metrics["stages"]
    assert tuned["name"] == "thaw-all"
    assert f"Thaw      {info['thaw']['reason']}" in ended.err.splitlines()
    last = next(line for line in ended.err.splitlines() if line.startswith("Thawed "))
    assert last.endswith("not kept" if info["thaw"]["kept"] == "0" else ": kept")
    kept = metrics["validation"]["accuracy"]
    assert kept == max(head["validation_accuracy"], tuned["validation_accuracy"])
    if head["validation_accuracy"] != tuned["validation_accuracy"]:
        assert (info["thaw"]["kept"] == "all") == (tuned["validation_accuracy"] > head["validation_accuracy"])
    ended = run(*arguments, "--out", "none", "--time-budget", "0.000001s")
    assert ended.code == 0, ended.err
    info = json.loads((tmp_path / "none" / "headstart.json").read_text())
    assert (info["thaw"]["depth"], info["thaw"]["kept"]) == ("0", "0")
    assert info["thaw"]["reason"] == "nothing: no depth fits 0 s and the memory and disk that are free"
    assert f"Thaw      {info['thaw']['reason']}" in ended.err.splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none", "r", "small.csv"]


def test_more_layers_than_there_are_is_one_sentence(run: Run, tiny_bert: Path, small_table: Path) -> None:
    ended = run("train", small_table, "--model", tiny_bert, "--thaw", "4")
    assert ended.code == 2
    assert ended.err == f"headstart: --thaw 4: {tiny_bert} has 3 layers.\n"
