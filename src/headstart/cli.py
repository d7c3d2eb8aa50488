"""The command line: one short function a command, heavy imports inside; results on stdout, all else on stderr."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from headstart.config import (
    HUGGING_FACE,
    Calibration,
    ClassWeight,
    Device,
    HeadKind,
    Long,
    Precision,
    ProblemChoice,
    Recipe,
    ServeConfig,
    as_toml,
    from_file,
    settings,
)
from headstart.errors import (
    FULL,
    HeadstartError,
    InputError,
    StoppedEarlyError,
    count_of,
    disk_errno,
    disk_errors,
    printable,
)
from headstart.folders import whole_file

# Each long option may be written with underscores, as Hugging Face's scripts do.
CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}
ABOUT = "Your own labelled text in, a tested BERT classifier out."
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(name="headstart", help=ABOUT, add_completion=False, context_settings=CONTEXT, **PLAIN)
cache = typer.Typer(help="What headstart keeps between runs.", **PLAIN)
app.add_typer(cache, name="cache")


def opt(names: str, text: str) -> Any:
    """An option of this name, and of Hugging Face's where that is another; then what its value is shown as."""
    name, *shown = names.split()
    other = HUGGING_FACE.get(name[2:].replace("-", "_"), "").replace("_", "-")
    return typer.Option(name, *([f"--{other}"] if other else []), metavar=" ".join(shown) or None, help=text)


def find(name: str) -> str:
    """A run folder's path, also of a Hub id that the local Hub cache has."""
    from headstart.runs import find_run

    return find_run(name)


Words = str | None
Whole = int | None
Flag = bool | None
TABLE = "A .csv, .tsv, .jsonl, .json or .parquet table (also .gz), or: sample."
DataArgument = Annotated[str, typer.Argument(metavar="DATA", help=TABLE)]
A_RUN = "A run folder, as headstart train makes, or that of another transformers classifier."
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help=A_RUN, callback=find)]
TextOption = Annotated[Words, opt("--text COL", "The column with the text.")]
LabelOption = Annotated[Words, opt("--label COL", "The column with the label.")]
ModelOption = Annotated[Words, opt("--model MODEL", "minilm (embedded), a Hub id, or a folder.")]
DeviceOption = Annotated[Device, opt("--device", "Where to compute.")]
PrecisionOption = Annotated[Precision, opt("--precision", "Number format of the encoder.")]
RayOption = Annotated[Words, opt("--ray [ADDRESS]", "By a Ray cluster: there, at RAY_ADDRESS, or one made here.")]
WorkersOption = Annotated[Whole, opt("--workers N", "With --ray: so many at once (a core or a GPU each).")]


@app.command()
def train(
    data: DataArgument,
    validation: Annotated[Words, opt("--validation FILE", "A table to choose on.")] = None,
    test: Annotated[Words, opt("--test FILE", "A table to test on, once.")] = None,
    text: TextOption = None,
    label: LabelOption = None,
    label_names: Annotated[Words, opt("--label-names A,B,…", "Names to show, in label order.")] = None,
    model: ModelOption = None,
    recipe: Annotated[Recipe | None, opt("--recipe", "The set of defaults to start from.")] = None,
    thaw: Annotated[Words, opt("--thaw 0|K|all|auto", "Top layers to fine-tune; auto: what the budget allows.")] = None,
    time_budget: Annotated[Words, opt("--time-budget 10m", "What --thaw auto may spend on it: 90s, 10m, 1h.")] = None,
    dry_run: Annotated[Flag, opt("--dry-run", "Say what each depth would cost, and stop.")] = None,
    no_store: Annotated[bool, opt("--no-store", "Do not keep the frozen layers' hidden states.")] = False,
    calibration: Annotated[Calibration | None, opt("--calibration", "Of confidence, on validation data.")] = None,
    head: Annotated[HeadKind | None, opt("--head", "pooled, or the architecture's own.")] = None,
    trials: Annotated[Whole, opt("--trials N", "Heads that optuna tries, on stored features.")] = None,
    folds: Annotated[Whole, opt("--folds K", "Cross-validate, then train the head on all but test.")] = None,
    epochs: Annotated[Whole, opt("--epochs N", "Most epochs.")] = None,
    batch_size: Annotated[Whole, opt("--batch-size N", "Texts a training step.")] = None,
    lr: Annotated[float | None, opt("--lr X", "AdamW's learning rate.")] = None,
    max_length: Annotated[Words, opt("--max-length auto|N", "Tokens kept of a text.")] = None,
    long: Annotated[Long | None, opt("--long", "What is read of texts over max_length.")] = None,
    problem: Annotated[ProblemChoice | None, opt("--problem", "One label a text, several, or ordered (stars).")] = None,
    class_weight: Annotated[ClassWeight | None, opt("--class-weight", "How classes count in the loss.")] = None,
    seed: Annotated[Whole, opt("--seed N", "Decides split, weights, order (2021).")] = None,
    device: Annotated[Device | None, opt("--device", "Where to compute.")] = None,
    precision: Annotated[Precision | None, opt("--precision", "Number format of the encoder.")] = None,
    out: Annotated[Words, opt("--out DIR", "The run folder (runs/NAME).")] = None,
    overwrite: Annotated[Flag, opt("--overwrite", "Replace a run folder that is there.")] = None,
    resume: Annotated[Flag, opt("--resume", "Go on from the newest whole checkpoint.")] = None,
    checkpoint_minutes: Annotated[float | None, opt("--checkpoint-minutes N", "Between two of them (10).")] = None,
    keep_checkpoints: Annotated[Flag, opt("--keep-checkpoints", "Leave the last ones in the run folder.")] = None,
    report_to: Annotated[Words, opt("--report-to NAMES", "none, tensorboard, mlflow, trackio, wandb; or a,b.")] = None,
    selfcheck_resume: Annotated[bool, opt("--selfcheck-resume", "Prove on few rows that resuming is exact.")] = False,
    config: Annotated[Words, opt("--config FILE", "Settings from a .toml, or RUN/headstart.json to repeat it.")] = None,
    save_config: Annotated[Words, opt("--save-config FILE", "Write these settings for --config; and train.")] = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
) -> None:
    """Train a classifier on DATA, test it once, and write a run folder."""
    given = dict(locals())  # each parameter is a setting, but for these
    for name in ("data", "config", "save_config", "no_store", "selfcheck_resume", "ray", "workers"):
        del given[name]
    given["store"] = False if no_store else None
    if max_length is not None and max_length.isdecimal():
        given["max_length"] = int(max_length)
    asked = {name: value for name, value in given.items() if value is not None}
    chosen = settings(data, **(from_file(config) if config is not None else {}) | asked)
    if save_config is not None:
        with disk_errors(save_config), whole_file(Path(save_config)) as temporary:
            temporary.write_text(as_toml(chosen, Path(save_config)), encoding="utf-8")
        note(f"{save_config}: has these settings now; --config reads them.")
    if workers is not None and chosen.thaw in ("0", "auto"):
        raise InputError("--workers N shares out fine-tuning: it goes with --thaw K or --thaw all.")
    check_workers(ray, workers)
    if ray is not None and (chosen.dry_run or selfcheck_resume):
        raise InputError("--ray trains; --dry-run and --selfcheck-resume are about this machine.")
    import psutil

    from headstart import run, selfcheck
    from headstart.encoder import choose_placement

    if selfcheck_resume:
        say(selfcheck.check_resume(chosen, note))
    elif chosen.dry_run:
        say(run.costs(chosen))
    elif chosen.resume and run.is_finished(run.out_folder(chosen)):
        note(f"{run.out_folder(chosen)}: is finished; nothing is left to resume.")
    else:
        started = psutil.Process().create_time()  # so that imports count in the total
        with cluster_at(ray, workers) as cluster:
            means = run.HERE
            if cluster is not None:
                fine_tune = cluster.fine_tune if workers is not None else means.fine_tune
                if workers is not None:
                    cluster.seats(choose_placement(chosen.device, "auto").device.type)  # or they are refused at once
                means = run.Means(cluster.encode, fine_tune)
            result = run.train(chosen, started, note, means)
        note(*result.notices)
        say(result.summary())
        if result.info["interrupted"]:
            raise StoppedEarlyError("Ctrl-C: training ended early; the best so far was tested and saved.")


@app.command()
def evaluate(
    folder: RunArgument,
    data: DataArgument,
    text: TextOption = None,
    label: LabelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Test a trained classifier on another labelled table."""
    from headstart import judge, predict, report, tables

    predictor = predict.load(folder, device=device, precision=precision, texts=tables.count_rows(data))
    numbers, notices = judge.evaluate(predictor, data, text, label)
    note(*notices)
    say(report.filled("evaluation.txt", {"test": numbers}))


@app.command("predict")
def predict_command(
    folder: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to label.")] = None,
    source: Annotated[Words, opt("--input FILE|-", "A table, or - for a text a line on stdin.")] = None,
    output: Annotated[Words, opt("--output FILE|-", "Where the table goes; - is stdout, as CSV.")] = None,
    text: TextOption = None,
    min_confidence: Annotated[float | None, opt("--min-confidence P", "Answer `abstain` below it.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    ray: RayOption = None,
    workers: WorkersOption = None,
) -> None:
    """Label texts given as arguments, on stdin (a text a line), in a table, or in many (a pattern) into a folder."""
    check_workers(ray, workers)
    if texts and source is not None:
        raise InputError("Give texts or --input, not both.")
    if source is None and not texts and sys.stdin.isatty():
        raise InputError('Give texts ("…"), a table (--input FILE), or lines on stdin.')
    if output is not None and source in (None, "-"):
        raise InputError("--output goes with --input FILE; labels of single texts are printed.")
    from headstart import predict, tables

    if ray is not None and source in (None, "-"):
        raise InputError("--ray goes with --input, and --output DIR: texts by themselves are labelled here.")
    if source is not None and source != "-" and (ray is not None or tables.is_many(source, output)):
        if output in (None, "-") or tables.ENDING.search(str(output)):
            raise InputError("Many tables are labelled into a folder: give --output DIR.")
        from headstart import bulk, report
        from headstart.places import absolute

        job = bulk.Job(absolute(folder), absolute(str(output)), text, min_confidence, device, precision)
        with cluster_at(ray, workers) as cluster:
            how: dict[str, Any] = {}
            if cluster is not None:
                how = {"each": cluster.each, "score": cluster.score, "check": cluster.check}
            summary = bulk.score_tables(job, source, note, **how)
        say(report.filled("bulk.txt", {**summary, "output": output}))
        return
    count = 0 if source in (None, "-") else tables.count_rows(source)
    predictor = predict.load(folder, device=device, precision=precision, min_confidence=min_confidence, texts=count)
    if min_confidence is not None and (held := predict.answered_in_test(Path(folder), min_confidence)) is not None:
        note(f"At least {min_confidence} sure: {held[0]:.0%} of the test texts, {held[1]:.3f} of those right.")
    cut = 0
    if source is not None and source != "-":
        rows, blank, cut = predict.predict_file(predictor, source, output or "-", text)
        note(f"{rows:,} rows labelled" + (f" in {output}." if output not in (None, "-") else "."))
        if blank:
            note(f"{blank:,} of them have an empty text and got no label.")
    else:
        lines = texts or (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
        for answer in predict.label_lines(predictor, lines, at_once=1 if sys.stdin.isatty() else 1024):
            say(f"{answer.label}\t{answer.confidence:.3f}\t{answer.text}".replace("\n", " "))
            cut += answer.cut
    if cut:
        note(f"{cut:,} texts were cut to max_length ({predictor.classifier.max_length} tokens): the ends went unread.")


@app.command()
def audit(
    data: DataArgument,
    validation: Annotated[Words, opt("--validation FILE", "A table that should share no text with DATA.")] = None,
    test: Annotated[Words, opt("--test FILE", "Another one.")] = None,
    text: TextOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    seed: Annotated[Whole, opt("--seed N", "Decides the folds (2021).")] = None,
    out: Annotated[  # a file, so it is not called as folders are
        Words, typer.Option("--out", metavar="FILE", help="All rows with what was found, worst first (NAME-audit.csv).")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """What is wrong with DATA before training: its rows' problems, and labels that a classifier contradicts."""
    given = dict(locals())  # each parameter is a setting, but for this
    del given["out"]
    chosen = settings(**given, thaw="0")
    from headstart import audit, prepare, report

    path = Path(out or f"{prepare.default_name(data)}-audit.csv")
    found = audit.audit(chosen, path)
    say(report.audit_text(found, data, path))


@app.command()
def explain(
    folder: RunArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text whose label is to be explained.")],
    as_json: Annotated[bool, opt("--json", "Print JSON.")] = False,
    as_html: Annotated[bool, opt("--html", "Print a page with the words coloured.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Which words of TEXT pushed its label, by integrated gradients, and the training texts nearest to it."""
    if as_json and as_html:
        raise InputError("--json and --html: give one of them.")
    import dataclasses
    import json

    from rich.console import Console

    from headstart import report
    from headstart.encoder import choose_placement
    from headstart.explain import explain, neighbours
    from headstart.model import load_run

    found = dataclasses.asdict(explain(load_run(folder, choose_placement(device, "fp32")), text))
    found["nearest"] = []
    try:
        found["nearest"] = neighbours(Path(folder), text)
    except InputError as error:
        note(f"The nearest training texts are not shown. {error}")
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
    elif as_html:
        typer.echo(report.filled("explain.html", found))
    else:
        if sys.stdout.isatty():
            Console(emoji=False, highlight=False).print(report.filled("explain.rich", found))
        say(report.filled("explain.txt", found))


@app.command()
def export(
    folder: RunArgument,
    int8: Annotated[bool, opt("--int8", "Weights in 8 bits: smaller and faster, a little less exact.")] = False,
    force: Annotated[bool, opt("--force", "Keep an export that the gate would refuse.")] = False,
    test: Annotated[Words, opt("--test FILE", "A labelled table to judge by (the run's own test rows).")] = None,
) -> None:
    """Write RUN/onnx: predict and serve then need neither torch nor transformers. Refused if its answers differ."""
    from headstart import report
    from headstart.export import export

    found = export(Path(folder), "int8" if int8 else "fp32", "warns" if force else "refuses", test)
    say(report.filled("export.txt", {**vars(found), "run": folder}))


@app.command()
def calibrate(
    folder: RunArgument,
    data: DataArgument,
    text: TextOption = None,
    label: LabelOption = None,
    out: Annotated[Words, opt("--out DIR", "The new run folder (runs/NAME-calibrated).")] = None,
    overwrite: Annotated[bool, opt("--overwrite", "Replace a run folder that is there.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Fit a classifier's confidence to DATA, on which it must not have been trained; writes a new run folder."""
    from headstart import report
    from headstart.calibrate import calibrate

    made = Path(out) if out is not None else Path("runs") / f"{Path(folder).resolve().name}-calibrated"
    found = calibrate(Path(folder), data, made, text, label, device, overwrite=overwrite)
    note(*found["notices"])
    say(report.filled("calibrated.txt", found))


@app.command()
def push(
    folder: RunArgument,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where to, on the Hugging Face Hub.")],
    private: Annotated[bool, opt("--private", "Only you, or your organisation, can see it.")] = False,
    with_texts: Annotated[
        bool, opt("--with-texts", "Also what shows test texts: predictions.csv, report.html.")
    ] = False,
    dry_run: Annotated[bool, opt("--dry-run", "Say what would go, and send nothing.")] = False,
) -> None:
    """Put a run folder on the Hugging Face Hub: the model, its numbers and its card, and no texts unless asked."""
    from headstart import hub, report

    upload = hub.pack(Path(folder), repo, private=private, with_texts=with_texts)
    if dry_run:
        say(report.filled("push.txt", {**vars(upload), "sizes": upload.sizes, "with_texts": with_texts}))
    else:
        say(report.filled("pushed.txt", {**vars(upload), "url": hub.push(upload)}))


@app.command()
def serve(
    folder: RunArgument,
    host: Annotated[Words, opt("--host ADDRESS", "The address to listen on (127.0.0.1).")] = None,
    port: Annotated[Whole, opt("--port N", "The port; 0 takes a free one (8080).")] = None,
    api_key_env: Annotated[
        Words, opt("--api-key-env NAME", "The environment variable with the key to ask for.")
    ] = None,
    min_confidence: Annotated[float | None, opt("--min-confidence P", "Answer `abstain` first below it.")] = None,
    max_body_bytes: Annotated[Whole, opt("--max-body-bytes N", "Largest request (2000000).")] = None,
    max_batch: Annotated[Whole, opt("--max-batch N", "Most texts a request (32).")] = None,
    max_waiting: Annotated[Whole, opt("--max-waiting N", "Most texts that wait; more get 429 (512).")] = None,
    max_connections: Annotated[Whole, opt("--max-connections N", "Most open connections (1000).")] = None,
    timeout: Annotated[float | None, opt("--timeout S", "Seconds for an answer (30).")] = None,
    read_timeout: Annotated[
        float | None, opt("--read-timeout S", "Seconds for headers, and body, to come (10).")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    ray: RayOption = None,
    workers: WorkersOption = None,
) -> None:
    """Answer over HTTP, with a page to try it at /, as text-embeddings-inference and Hugging Face's clients ask."""
    given = dict(locals())  # each parameter is a setting, but for these
    check_workers(ray, workers)
    for name in ("folder", "device", "precision", "ray", "workers"):
        del given[name]
    config = ServeConfig(**{name: value for name, value in given.items() if value is not None})
    try:
        from headstart.serve import server
    except ImportError as error:
        raise InputError("serve needs more. Install it with: pip install 'headstart[serve]'") from error
    if ray is not None and read_timeout is not None:
        raise InputError("--read-timeout goes without --ray, whose own server reads requests.")
    with cluster_at(ray, workers) as cluster:
        if cluster is None:
            server.serve(folder, config, device, precision, note)
        else:
            from headstart.serve import replicas

            replicas.serve(cluster, str(Path(folder).absolute()), config, device, precision, note)


@app.command()
def lengths(
    data: DataArgument,
    model: ModelOption = None,
    text: TextOption = None,
    png: Annotated[Words, opt("--png FILE", "The histogram as a picture (NAME-lengths.png).")] = None,
) -> None:
    """Token lengths of DATA and the max_length they suggest, with what each candidate would cut and cost."""
    from headstart import prepare, report

    advice = prepare.lengths(data, model or "minilm", text)
    picture = Path(png or f"{prepare.default_name(data)}-lengths.png")
    report.save_histogram(advice, picture)
    say(f"{report.lengths_text(advice)}\nHistogram: {picture}")


@cache.command("info")
def cache_info() -> None:
    """Where the feature store is and what it holds."""
    from headstart.features import cache_info as info

    found = info()
    say(f"Folder    {found.folder}")
    say(f"Features  {found.texts:,} texts from {count_of(found.shelves, 'encoder')}")
    say(f"Size      {found.bytes / 1e6:,.1f} MB of at most {found.max_bytes / 1e6:,.0f} MB")


@cache.command("clear")
def cache_clear() -> None:
    """Delete every stored feature."""
    from headstart.features import clear_cache

    say(f"Freed {clear_cache() / 1e6:,.1f} MB.")


@app.command()
def demo(out: Annotated[str, opt("--out DIR", "The run folder.")] = "runs/demo") -> None:
    """Train on the sample set, test, and label three sentences; no network is needed."""
    complaint = "The update deleted my notes and nobody at support has answered."
    texts = ["A lovely little hotel, and we will be back.", "Great camera, but the battery dies by noon.", complaint]
    say("$ headstart train sample")
    train("sample", out=out, overwrite=True)
    say(f'\n$ headstart predict {out} "…" "…" "…"')
    predict_command(out, texts)


def check_workers(ray: str | None, workers: int | None) -> None:
    """Refuse a number of workers that cannot be, or without a cluster."""
    if ray is None and workers is not None:
        raise InputError("--workers N goes with --ray.")
    if workers is not None and workers < 1:
        raise InputError(f"--workers must be more than 0, and {workers} was given.")


@contextlib.contextmanager
def cluster_at(address: str | None, workers: int | None) -> Iterator[Any]:
    """The Ray cluster that was asked for, None without one; nothing of Ray is imported then."""
    if address is None:
        yield None
        return
    from headstart import scale

    with scale.connected(address, workers) as cluster:
        yield cluster


def with_address(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a `--ray` that names no cluster names the usual one."""
    found = list[str]()
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        bare = argument == "--ray" and following.startswith("-")
        found += [f"--ray={os.environ.get('RAY_ADDRESS') or 'local'}" if bare else argument]
    return found


def say(text: str) -> None:
    """Print a result on stdout, a line at a time; what a table holds cannot drive the terminal."""
    typer.echo("\n".join(map(printable, text.split("\n"))))


def note(*messages: str) -> None:
    """Say something on stderr, a line each."""
    for message in messages:
        typer.echo(printable(message), err=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the person's input, 1 our fault, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the terminal's encoding lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        app(args=with_address(sys.argv[1:] if arguments is None else arguments), prog_name="headstart")
    except SystemExit as end:  # typer ends so, also after Ctrl-C
        if end.code == StoppedEarlyError.exit_code:
            note("headstart: interrupted; nothing was kept.")
        raise
    except HeadstartError as error:
        note(*(f"headstart: {line}" for line in str(error).splitlines()))
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("headstart"):
            note(f"headstart: this needs {error.name}, which is not installed here. pip install headstart brings it.")
            sys.exit(InputError.exit_code)
        if disk_errno(error) in FULL:  # of stdout, say; files that headstart writes have their own sentence
            note("headstart: the disk is full. Free some space and run it again.")
            sys.exit(InputError.exit_code)
        traceback.print_exc()
        note("headstart: this is our fault, not yours. Please report it with the lines above.")
        sys.exit(HeadstartError.exit_code)


if __name__ == "__main__":
    main()
