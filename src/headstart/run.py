"""One run, from a table to a run folder. This room knows the order of the others, and nothing else."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headstart import data, metrics, report
from headstart.config import TrainConfig
from headstart.data import Dataset, Splits
from headstart.encoder import Encoder, choose_placement, load_encoder
from headstart.errors import DataError, InputError
from headstart.features import Features, frozen_features
from headstart.model import (
    HeadSpec,
    NativeHead,
    check_out,
    head_inputs,
    native_feature,
    native_model,
    new_folder,
    new_head,
    pooled_model,
    save_model,
)
from headstart.predict import Predictor, probabilities_of
from headstart.progress import Advance, bar
from headstart.tokens import LengthAdvice, advise_length
from headstart.train import Epoch, History, Schedule, class_weights
from headstart.trials import Part, Trial, pick_head, train_head

NATIVE_LR = 1e-3
"""For a native head on stored features; three times lower loses 0.5 to 2 points in as many epochs."""


@dataclass(frozen=True)
class Run:
    """What training came to.

    Attributes:
        folder: the run folder.
        metrics: the content of metrics.json.
        info: the content of headstart.json.
        report: scikit-learn's classification report on test.
        notices: what was found in the data and mended, one sentence each.
        interrupted: whether Ctrl-C ended training early.
    """

    folder: Path
    metrics: dict[str, Any]
    info: dict[str, Any]
    report: str
    notices: tuple[str, ...]
    interrupted: bool

    def summary(self) -> str:
        """One screen: what was done, what came out, where it is, what to do next."""
        return report.summary_text(self.info, self.metrics, self.report)


class Stopwatch:
    """Wall seconds of the named parts of a run.

    Args:
        started: `time.time()` when the whole began.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.seconds = dict.fromkeys(("read", "tokenize", "encode", "train", "evaluate"), 0.0)

    @contextlib.contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Add the block's wall seconds to `part`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begun

    def timing(self) -> dict[str, float]:
        """As `metrics.json` has it."""
        total = time.time() - self.started
        return {name: round(value, 3) for name, value in {**self.seconds, "total": total}.items()}


@dataclass(frozen=True)
class Head:
    """A trained head: as a whole model, on stored features, and in words."""

    model: Any
    logits: torch.Tensor
    validation_logits: torch.Tensor
    history: History
    description: dict[str, Any]


def train(config: TrainConfig, started: float | None = None) -> Run:
    """Train, test once, and write the run folder.

    Args:
        config: the settings, from `headstart.config.settings`.
        started: `time.time()` when the process began, for the total; None: now.

    Raises:
        InputError: the data, the model, a setting or the output folder cannot be used; nothing is written.
    """
    watch = Stopwatch(time.time() if started is None else started)
    out = Path(config.out) if config.out is not None else Path("runs") / default_name(config.data)
    check_out(out, "replace" if config.overwrite else "refuse")
    with watch.measuring("read"):
        splits, raw_labels = read(config)
    placement = choose_placement(config.device, config.precision)
    with watch.measuring("encode"):
        encoder = load_encoder(config.model, placement)
    with watch.measuring("tokenize"):
        parts = (splits.train, splits.validation, splits.test)
        tokens = encoder.tokenizer([text for part in parts for text in part.texts], progress="tokenizing")
        advice = advise_length(tokens.lengths[: len(splits.train)], limit=encoder.max_length, hidden=encoder.hidden)
        max_length, why = choose_length(config, advice, encoder)
        cut = encoder.tokenizer.truncate(tokens, max_length)
    with watch.measuring("encode"):
        features = frozen_features(encoder, cut)
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    pieces = [replace(features, values=values) for values in np.split(features.values, bounds)]
    with watch.measuring("train"):
        head = train_any_head(config, encoder, splits, pieces)
    with watch.measuring("evaluate"):
        names = splits.train.names
        probabilities = probabilities_of(head.logits)
        numbers = {
            "test": metrics.evaluate(probabilities, splits.test.labels, names),
            "validation": metrics.evaluate(probabilities_of(head.validation_logits), splits.validation.labels, names),
            "baselines": metrics.baselines(
                splits.train.texts, splits.train.labels, splits.test.texts, splits.test.labels
            ),
            "stages": [stage_record("head", head.history)],
        }
        text = metrics.report_text(probabilities, splits.test.labels, names)
    info = {
        "headstart": importlib.metadata.version("headstart"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "out": str(out),
        "settings": config.to_dict(),
        "names": list(names),
        "labels": list(raw_labels),
        "columns": list(splits.train.columns),
        "data": data_fingerprint(splits),
        "split": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "notices": list(splits.notices),
        "max_length": max_length,
        "max_length_reason": why,
        "placement": placement.reason,
        "encoder_fingerprint": encoder.fingerprint,
        "head": head.description,
        "history": [asdict(epoch) for epoch in head.history.epochs],
        "interrupted": head.history.interrupted,
        "seed": config.seed,
        "versions": versions(),
    }
    with new_folder(out) as folder:
        save_model(folder, head.model, encoder, max_length)
        report.write_predictions(
            folder / "predictions.csv", splits.test.texts, splits.test.labels, probabilities, names
        )
        numbers["timing"] = info["timing"] = watch.timing()
        numbers["features"] = {name: getattr(features, name) for name in ("texts", "encoded", "reused", "bytes")}
        report.write_json(folder / "metrics.json", numbers)
        report.write_json(folder / "headstart.json", info)
        (folder / "README.md").write_text(report.model_card(info, numbers, text), encoding="utf-8")
    return Run(out, numbers, info, text, (*splits.notices, *features.warnings), head.history.interrupted)


def default_name(source: str) -> str:
    """A run's name from the name of its data: `reviews.csv.gz` gives `reviews`."""
    name = Path(source).name
    for ending in (".gz", *data.FORMATS):
        name = name.removesuffix(ending)
    return name or "run"


def read(config: TrainConfig) -> tuple[Splits, tuple[str, ...]]:
    """The three parts, with the names to show, and the labels as the table has them.

    Raises:
        DataError: with every problem found in any of the tables.
    """
    problems: list[str] = []
    whole = data.load(config.data, config.text, config.label)
    index = {label: i for i, label in enumerate(whole.names)}
    given: dict[str, Dataset | None] = {"validation": None, "test": None}
    for name in given:
        if source := getattr(config, name):
            try:
                given[name] = data.load(source, config.text, config.label, index=index, least_rows=1)
            except DataError as error:
                problems.extend(error.problems)
    if config.label_names is not None:
        if len(config.label_names) != len(whole.names):
            problems.append(
                f"--label-names gives {len(config.label_names)} names, and there are {len(whole.names)} labels: "
                f"{', '.join(whole.names[:12])}."
            )
        elif len(set(config.label_names)) != len(config.label_names):
            problems.append("--label-names gives the same name twice.")
    if problems:
        raise DataError(problems)
    duplicates: data.Duplicates = "as they fall" if config.recipe == "article" else "together"
    splits = data.split(whole, given["validation"], given["test"], seed=config.seed, duplicates=duplicates)
    shown = config.label_names or whole.names
    notices = [notice for part in (whole, *given.values()) if part is not None for notice in part.notices]
    return (
        Splits(
            replace(splits.train, names=shown),
            replace(splits.validation, names=shown),
            replace(splits.test, names=shown),
            (*notices, *splits.notices),
        ),
        whole.names,
    )


def choose_length(config: TrainConfig, advice: LengthAdvice, encoder: Encoder) -> tuple[int, str]:
    """The max_length to use and why.

    Raises:
        InputError: the one asked for is over what the model takes.
    """
    if config.max_length is None:
        return advice.advised, advice.reason
    if config.max_length > encoder.max_length:
        raise InputError(
            f"--max-length {config.max_length}: {config.model} takes at most {encoder.max_length} tokens. "
            f"The texts suggest {advice.advised}."
        )
    cut = float((advice.lengths > config.max_length).mean())
    source = "the article's" if config.recipe == "article" else "as asked"
    return config.max_length, f"{source}; {cut:.1%} of the training texts are cut (advised: {advice.advised})"


def train_any_head(config: TrainConfig, encoder: Encoder, splits: Splits, pieces: list[Features]) -> Head:
    """Train the head that the settings ask for on stored features."""
    labels = len(splits.train.names)
    weights = class_weights(splits.train.labels, labels, config.class_weight)
    train_part = Part(pieces[0], splits.train.labels)
    validation_part = Part(pieces[1], splits.validation.labels)
    if config.head == "native":
        return _native(config, encoder, splits, pieces, weights)
    if config.recipe == "article":
        trial, tried = _as_given(config, encoder, train_part, validation_part, labels, weights), 1
    else:
        trial, tried = pick_head(encoder, train_part, validation_part, labels, weights, config)
    trial.head.eval()
    with torch.inference_mode():
        validation_logits, logits = (
            trial.head(head_inputs(encoder, piece, trial.spec.features)) for piece in pieces[1:]
        )
    chosen = f"best of {tried} tried on validation data, " if tried > 1 else ""
    width = f"{trial.spec.width} hidden units" if trial.spec.width else "linear"
    reads = " + ".join(name.replace("mean-", "mean of layer ") for name in trial.spec.features)
    description = {
        "kind": "pooled",
        **asdict(trial.spec),
        "lr": trial.lr,
        "weight_decay": trial.weight_decay,
        "tried": tried,
        "description": f"pooled, {width}, on {reads}; {chosen}epoch {trial.history.best + 1}",
    }
    model = pooled_model(encoder, trial.head, trial.spec, splits.train.names)
    return Head(model, logits, validation_logits, trial.history, description)


def _as_given(
    config: TrainConfig, encoder: Encoder, train_part: Part, validation_part: Part, labels: int, weights: torch.Tensor
) -> Trial:
    """The article's head: one shape, one learning rate, nothing searched, inputs as they are."""
    names = config.head_features or ("pooler",)
    spec = HeadSpec(names, config.head_width or 0, config.head_dropout, standardize=False)
    inputs = head_inputs(encoder, train_part.features, names)
    held = head_inputs(encoder, validation_part.features, names)
    head = new_head(inputs, spec, labels, config.seed)
    schedule = schedule_of(config, NATIVE_LR)
    with _epochs(schedule) as on_epoch:
        history = train_head(
            head,
            (inputs, torch.from_numpy(train_part.labels)),
            (held, torch.from_numpy(validation_part.labels)),
            schedule,
            weights,
            config,
            on_epoch,
        )
    return Trial(spec, schedule.lr, schedule.weight_decay, history, head)


def _native(
    config: TrainConfig, encoder: Encoder, splits: Splits, pieces: list[Features], weights: torch.Tensor
) -> Head:
    names = splits.train.names
    head = NativeHead(native_model(encoder, names, config.seed))
    train_inputs, held, test = (head_inputs(encoder, piece, (native_feature(encoder),)) for piece in pieces)
    schedule = schedule_of(config, NATIVE_LR)
    with _epochs(schedule) as on_epoch:
        history = train_head(
            head,
            (train_inputs, torch.from_numpy(splits.train.labels)),
            (held, torch.from_numpy(splits.validation.labels)),
            schedule,
            weights,
            config,
            on_epoch,
        )
    with torch.inference_mode():
        validation_logits, logits = head(held), head(test)
    model = head.whole()
    description = {
        "kind": "native",
        "lr": schedule.lr,
        "weight_decay": schedule.weight_decay,
        "description": f"native ({type(model).__name__}), epoch {history.best + 1}",
    }
    return Head(model, logits, validation_logits, history, description)


def schedule_of(config: TrainConfig, lr: float) -> Schedule:
    """The settings' schedule, with `lr` and AdamW's own weight decay where none is set."""
    decay = 0.01 if config.weight_decay is None else config.weight_decay
    return Schedule(config.epochs, config.lr or lr, decay, config.clip_norm, config.patience)


@contextlib.contextmanager
def _epochs(schedule: Schedule) -> Iterator["functools.partial[bool]"]:
    with bar("training", schedule.epochs, "epochs") as advance:
        yield functools.partial(_advance_epoch, advance)


def _advance_epoch(advance: Advance, number: int, epoch: Epoch) -> bool:
    note = f"loss {epoch.train_loss:.3f}, validation {epoch.validation_loss:.3f} ({epoch.validation_accuracy:.3f})"
    advance(1, note)
    return False


def stage_record(name: str, history: History) -> dict[str, Any]:
    """One entry of `stages` in metrics.json."""
    return {
        "name": name,
        "epochs": len(history.epochs),
        "validation_accuracy": history.epochs[history.best].validation_accuracy,
        "seconds": round(sum(epoch.seconds for epoch in history.epochs), 3),
    }


def data_fingerprint(splits: Splits) -> dict[str, str]:
    """A sha256 of each part's texts and labels, in order."""
    prints = {}
    for name in ("train", "validation", "test"):
        part: Dataset = getattr(splits, name)
        content = json.dumps([part.texts, part.labels.tolist()], ensure_ascii=False)
        prints[name] = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return prints


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("torch", "transformers", "tokenizers", "polars", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


@dataclass(frozen=True)
class Evaluation:
    """A run's numbers on another table: see `headstart.metrics.evaluate`."""

    numbers: dict[str, Any]
    report: str
    notices: tuple[str, ...]


def evaluate(predictor: Predictor, source: str, text: str | None = None, label: str | None = None) -> Evaluation:
    """Test a loaded classifier on a labelled table.

    Labels may be given as the training table had them or as the run shows them.

    Raises:
        DataError: the table cannot be used, or has labels that the run does not know.
    """
    info, names = predictor.classifier.info, predictor.names
    index = {name: i for i, name in enumerate(names)}
    index |= {raw: i for i, raw in enumerate(info.get("labels", [])) if raw not in index}
    trained_text, trained_label = info.get("columns", (None, None))
    columns = data.scan(data.resolve_path(source)).collect_schema().names()
    table = data.load(
        source,
        text or (trained_text if trained_text in columns else None),
        label or (trained_label if trained_label in columns else None),
        index=index,
        least_rows=1,
    )
    scores = predictor.score(table.texts, progress="scoring")
    notices = list(table.notices)
    if cut := int(scores.cut.sum()):
        notices.append(f"{cut:,} of {len(table):,} texts were cut to {predictor.classifier.max_length} tokens.")
    numbers = metrics.evaluate(scores.probabilities, table.labels, names)
    return Evaluation(numbers, metrics.report_text(scores.probabilities, table.labels, names), tuple(notices))


def lengths(source: str, model: str, text: str | None = None) -> LengthAdvice:
    """The token lengths of a table's texts and the max_length they suggest; labels are not needed.

    Raises:
        DataError: the table cannot be read or has no text.
        ModelError: the model cannot be found.
    """
    from headstart.encoder import length_limit, load_config, load_tokenizer, locate

    texts = data.load_texts(source, text)
    folder = locate(model)
    shape = load_config(folder)
    _, tokenizer = load_tokenizer(folder)
    tokens = tokenizer(texts, progress="tokenizing")
    return advise_length(tokens.lengths, limit=length_limit(shape), hidden=int(shape.hidden_size))
