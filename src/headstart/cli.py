"""The command line: one short function a command, heavy imports inside.

Results go to stdout, progress and remarks to stderr. This room knows the other rooms' doors and nothing behind them.
"""

import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headstart.config import ClassWeight, Device, HeadKind, Precision, Recipe
from headstart.errors import FULL, HeadstartError, InputError, StoppedEarlyError, disk_errno, printable

app = typer.Typer(
    name="headstart",
    help="Your own labelled text in, a tested BERT classifier out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Each long option may be written with underscores, as Hugging Face's scripts do.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
cache = typer.Typer(help="What headstart keeps between runs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache, name="cache")

DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="A .csv, .tsv, .jsonl, .json or .parquet table (also .gz), or: sample.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, as headstart train makes.")]
TextOption = Annotated[
    str | None, typer.Option("--text", "--text-column-name", metavar="COL", help="The column with the text.")
]
LabelOption = Annotated[
    str | None, typer.Option("--label", "--label-column-name", metavar="COL", help="The column with the label.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "--model-name-or-path", metavar="MODEL", help="minilm (embedded), a Hub id, or a folder."),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Number format of the frozen encoder.")]


@app.command()
def train(
    data: DataArgument,
    validation: Annotated[
        str | None, typer.Option("--validation", "--validation-file", metavar="FILE", help="A table to choose on.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", "--test-file", metavar="FILE", help="A table to test on, once.")
    ] = None,
    text: TextOption = None,
    label: LabelOption = None,
    label_names: Annotated[
        str | None, typer.Option("--label-names", metavar="A,B,…", help="Names to show, in label order.")
    ] = None,
    model: ModelOption = None,
    recipe: Annotated[Recipe, typer.Option("--recipe", help="The set of defaults to start from.")] = "headstart",
    thaw: Annotated[str, typer.Option("--thaw", metavar="0", help="Encoder layers to train; 0: none.")] = "0",
    head: Annotated[HeadKind | None, typer.Option("--head", help="pooled, or the architecture's own.")] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", help="Heads that optuna tries, on stored features.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="K", help="Cross-validate, then train the head on all but test.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", "--num-train-epochs", metavar="N", help="Most epochs.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--per-device-train-batch-size", metavar="N", help="Texts a training step."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", "--learning-rate", metavar="X", help="AdamW's learning rate.")
    ] = None,
    max_length: Annotated[
        str | None, typer.Option("--max-length", "--max-seq-length", metavar="auto|N", help="Tokens kept of a text.")
    ] = None,
    class_weight: Annotated[
        ClassWeight | None, typer.Option("--class-weight", help="How classes count in the loss.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Decides split, weights, order (2021).")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    out: Annotated[
        str | None, typer.Option("--out", "--output-dir", metavar="DIR", help="The run folder (runs/NAME).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", "--overwrite-output-dir", help="Replace a run folder that is there.")
    ] = False,
) -> None:
    """Train a classifier on DATA, test it once, and write a run folder."""
    given = {name: value for name, value in locals().items() if name not in ("data", "recipe")}
    given["label_names"] = tuple(label_names.split(",")) if label_names is not None else None
    given["max_length"] = whole_number("--max-length", max_length, "auto")
    train_and_print(data, recipe, given)


def train_and_print(data: str, recipe: Recipe, given: dict[str, Any]) -> None:
    """Train, print the one screen, and end with 130 if Ctrl-C cut it short."""
    from headstart import run
    from headstart.config import settings

    result = run.train(settings(data, recipe, **given), started=process_started())
    for notice in result.notices:
        note(notice)
    say(result.summary())
    if result.interrupted:
        raise StoppedEarlyError("Ctrl-C: training ended early; the best head so far was tested and saved.")


@app.command()
def evaluate(
    run: RunArgument,
    data: DataArgument,
    text: TextOption = None,
    label: LabelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Test a trained classifier on another labelled table."""
    from headstart import predict, report
    from headstart.run import evaluate as evaluate_on

    result = evaluate_on(predict.load(run, device=device, precision=precision), data, text, label)
    for notice in result.notices:
        note(notice)
    say(report.evaluation_text(result.numbers, result.report))


@app.command("predict")
def predict_command(
    run: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to label.")] = None,
    source: Annotated[
        str | None, typer.Option("--input", metavar="FILE|-", help="A table, or - for a text a line on stdin.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE|-", help="Where the table goes; - is stdout, as CSV.")
    ] = None,
    text: TextOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Label texts given as arguments, on stdin (a text a line), or in a table."""
    if texts and source is not None:
        raise InputError("Give texts or --input, not both.")
    if source is None and not texts and sys.stdin.isatty():
        raise InputError('Give texts ("…"), a table (--input FILE), or lines on stdin.')
    if output is not None and source in (None, "-"):
        raise InputError("--output goes with --input FILE; labels of single texts are printed.")
    from headstart import predict

    predictor = predict.load(run, device=device, precision=precision)
    if source is not None and source != "-":
        summary = predict.predict_file(predictor, source, output or "-", text)
        note(f"{summary.rows:,} rows labelled" + (f" in {output}." if output not in (None, "-") else "."))
        if summary.blank:
            note(f"{summary.blank:,} of them have an empty text and got no label.")
        cut = summary.cut
    else:
        cut = print_labels(predictor, texts)
    if cut:
        note(
            f"{cut:,} texts were cut to max_length ({predictor.classifier.max_length} tokens): their ends went unread."
        )


def print_labels(predictor: Any, texts: list[str] | None) -> int:
    """Print `label  confidence  text` for each text given, or each line of stdin; returns how many were cut."""
    from headstart.predict import label_lines

    lines = texts if texts else (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
    at_once = 1 if sys.stdin.isatty() else 1024
    cut = 0
    for answer in label_lines(predictor, lines, at_once):
        say(f"{answer.label}\t{answer.confidence:.3f}\t{answer.text}".replace("\n", " "))
        cut += answer.cut
    return cut


@app.command()
def lengths(
    data: DataArgument,
    model: ModelOption = None,
    text: TextOption = None,
    png: Annotated[
        str | None, typer.Option("--png", metavar="FILE", help="The histogram as a picture (NAME-lengths.png).")
    ] = None,
) -> None:
    """Token lengths of DATA and the max_length they suggest, with what each candidate would cut and cost."""
    from headstart import report
    from headstart.run import default_name
    from headstart.run import lengths as lengths_of

    advice = lengths_of(data, model or "minilm", text)
    picture = Path(png or f"{default_name(data)}-lengths.png")
    report.save_histogram(advice, picture)
    say(report.lengths_text(advice))
    say(f"Histogram: {picture}")


@cache.command("info")
def cache_info() -> None:
    """Where the feature store is and what it holds."""
    from headstart.features import cache_info as info

    found = info()
    say(f"Folder    {found.folder}")
    say(f"Features  {found.texts:,} texts from {found.shelves} encoder{'' if found.shelves == 1 else 's'}")
    say(f"Size      {found.bytes / 1e6:,.1f} MB of at most {found.max_bytes / 1e6:,.0f} MB")


@cache.command("clear")
def cache_clear() -> None:
    """Delete every stored feature."""
    from headstart.features import clear_cache

    say(f"Freed {clear_cache() / 1e6:,.1f} MB.")


DEMO_TEXTS = (
    "A lovely little hotel, and we will be back.",
    "Great camera, but the battery dies by noon.",
    "The update deleted my notes and nobody at support has answered.",
)


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", "--output-dir", metavar="DIR", help="The run folder.")] = "runs/demo",
) -> None:
    """Train on the sample set, test, and label three sentences; no network is needed."""
    say("$ headstart train sample")
    train_and_print("sample", "headstart", {"out": out, "overwrite": True})
    say(f'\n$ headstart predict {out} "…" "…" "…"')
    from headstart import predict

    print_labels(predict.load(out), list(DEMO_TEXTS))


def whole_number(option: str, value: str | None, word: Literal["auto"]) -> int | Literal["auto"] | None:
    """The value of an option that takes a whole number or a word; None where it was not given.

    Raises:
        InputError: neither.
    """
    if value is None or value == word:
        return word if value else None
    if not value.isdecimal():
        raise InputError(f"{option} takes {word} or a whole number, not {value!r}.")
    return int(value)


def process_started() -> float:
    """`time.time()` when this process began, so that imports count in the total."""
    import psutil

    return float(psutil.Process().create_time())


def say(text: str) -> None:
    """Print a result on stdout, a line at a time; what a table holds cannot drive the terminal."""
    for line in text.split("\n"):
        typer.echo(printable(line))


def note(message: str) -> None:
    """Say something on stderr."""
    typer.echo(printable(message), err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the person's input, 1 our fault, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the terminal's encoding lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        app(args=arguments, prog_name="headstart")
    except SystemExit as end:  # typer ends so, also after Ctrl-C
        if end.code == StoppedEarlyError.exit_code:
            note("headstart: interrupted; nothing was kept.")
        raise
    except HeadstartError as error:
        for line in str(error).splitlines():
            note(f"headstart: {line}")
        sys.exit(error.exit_code)
    except Exception as error:
        if disk_errno(error) in FULL:  # of stdout, say; files that headstart writes have their own sentence
            note("headstart: the disk is full. Free some space and run it again.")
            sys.exit(InputError.exit_code)
        traceback.print_exc()
        note("headstart: this is our fault, not yours. Please report it with the lines above.")
        sys.exit(HeadstartError.exit_code)


if __name__ == "__main__":
    main()
