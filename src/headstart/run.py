"""One run, from a table to a run folder. This room knows the order of the others, and nothing else."""

import contextlib
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

from headstart import data, metrics, report, tables
from headstart.config import TrainConfig
from headstart.data import Dataset, Splits
from headstart.encoder import Encoder, choose_placement, load_encoder
from headstart.errors import DataError, InputError
from headstart.features import Features, frozen_features
from headstart.model import check_out, new_folder, save_model
from headstart.predict import Predictor, probabilities_of
from headstart.tokens import LengthAdvice, advise_length
from headstart.train import History
from headstart.trials import Task, TrainedHead, in_folds, refit, train_head


@dataclass(frozen=True)
class Run:
    """What training came to: the content of metrics.json and headstart.json, and scikit-learn's report on test.

    `notices` say what was found in the data and mended; `interrupted` is whether Ctrl-C ended training early.
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


@contextlib.contextmanager
def measured(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's wall seconds to those of `part`."""
    begun = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - begun


def train(config: TrainConfig, started: float | None = None) -> Run:
    """Train, test once, and write the run folder; the total counts from `started`, a `time.time()`, or from now.

    Raises:
        InputError: the data, the model, a setting or the output folder cannot be used; nothing is written.
    """
    started = time.time() if started is None else started
    seconds = dict.fromkeys(("read", "tokenize", "encode", "train", "evaluate"), 0.0)
    out = Path(config.out) if config.out is not None else Path("runs") / default_name(config.data)
    check_out(out, overwrite=config.overwrite)
    with measured(seconds, "read"):
        splits, raw_labels = read(config)
    placement = choose_placement(config.device, config.precision)
    with measured(seconds, "encode"):
        encoder = load_encoder(config.model, placement)
    with measured(seconds, "tokenize"):
        parts = (splits.train, splits.validation, splits.test)
        tokens = encoder.tokenizer([text for part in parts for text in part.texts], progress="tokenizing")
        advice = advise_length(tokens.lengths[: len(splits.train)], limit=encoder.max_length, hidden=encoder.hidden)
        max_length, why = choose_length(config, advice, encoder)
        cut = encoder.tokenizer.truncate(tokens, max_length)
    with measured(seconds, "encode"):
        features = frozen_features(encoder, cut)
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    pieces = [features.take(part) for part in np.split(np.arange(len(tokens)), bounds)]
    names = splits.train.names
    with measured(seconds, "train"):
        task = Task(encoder, pieces[0], pieces[1], splits.train.labels, splits.validation.labels, names, config)
        chosen = train_head(task)
        head, cross = chosen, None
        if config.folds is not None and not chosen.history.interrupted:
            head, cross = train_on_all(task, chosen, splits, features)
    with measured(seconds, "evaluate"):
        probabilities = probabilities_of(head.logits(pieces[2]))
        held = probabilities_of(chosen.logits(pieces[1]))  # by the head that has not been trained on them
        numbers = {
            "test": metrics.evaluate(probabilities, splits.test.labels, names),
            "validation": metrics.evaluate(held, splits.validation.labels, names),
            "baselines": metrics.baselines(
                splits.train.texts, splits.train.labels, splits.test.texts, splits.test.labels
            ),
            "stages": [stage_record("head", chosen.history)],
        }
        if cross is not None:
            numbers["folds"] = cross
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
        "head": head.description(),
        "history": [asdict(epoch) for epoch in chosen.history.epochs],
        "interrupted": chosen.history.interrupted,
        "seed": config.seed,
        "versions": versions(),
    }
    with new_folder(out, overwrite=config.overwrite) as folder:
        save_model(folder, head.whole(names), encoder, max_length)
        report.write_predictions(
            folder / "predictions.csv", splits.test.texts, splits.test.labels, probabilities, names
        )
        total = {**seconds, "total": time.time() - started}
        numbers["timing"] = info["timing"] = {name: round(value, 3) for name, value in total.items()}
        numbers["features"] = features.cost()
        report.write_json(folder / "metrics.json", numbers)
        report.write_json(folder / "headstart.json", info)
        (folder / "README.md").write_text(report.model_card(info, numbers, text), encoding="utf-8")
    return Run(out, numbers, info, text, (*splits.notices, *features.warnings), chosen.history.interrupted)


def default_name(source: str) -> str:
    """A run's name from the name of its data: `reviews.csv.gz` gives `reviews`."""
    return tables.ENDING.sub("", Path(source).name) or "run"


def read(config: TrainConfig) -> tuple[Splits, tuple[str, ...]]:
    """The three parts, with the names to show, and the labels as the table has them.

    All problems of all tables are raised together.
    """
    problems: list[str] = []
    whole = data.load(config.data, config.text, config.label)
    shown = config.label_names or whole.names
    given: dict[str, Dataset | None] = {"validation": None, "test": None}
    for name in given:
        if source := getattr(config, name):
            try:
                table = data.load(source, config.text, config.label, known=[whole.names], least_rows=1)
                given[name] = replace(table, names=shown)
            except DataError as error:
                problems.extend(error.problems)
    if len(shown) != len(whole.names):
        problems.append(
            f"--label-names gives {len(shown)} names, and there are {len(whole.names)} labels: "
            f"{', '.join(whole.names[:12])}."
        )
    elif len(set(shown)) != len(shown):
        problems.append("--label-names gives the same name twice.")
    if problems:
        raise DataError(problems)
    duplicates: data.Duplicates = "as they fall" if config.recipe == "article" else "together"
    splits = data.split(replace(whole, names=shown), **given, seed=config.seed, duplicates=duplicates)
    return splits, whole.names


def choose_length(config: TrainConfig, advice: LengthAdvice, encoder: Encoder) -> tuple[int, str]:
    """The max_length to use and why; an `InputError` if the one asked for is over what the model takes."""
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


def train_on_all(
    task: Task, chosen: TrainedHead, splits: Splits, features: Features
) -> tuple[TrainedHead, dict[str, Any]]:
    """Cross-validate a head like `chosen` on all but the test part, then train it there; with the folds' numbers.

    Raises:
        InputError: a class has too few rows for so many folds.
    """
    texts = splits.train.texts + splits.validation.texts
    labels = np.concatenate([splits.train.labels, splits.validation.labels])
    everything = replace(task, train=features.take(np.arange(len(texts))), train_labels=labels)
    _, groups = np.unique([data.text_key(text) for text in texts], return_inverse=True)
    logits, fold_of = in_folds(everything, chosen, groups)
    right = logits.argmax(dim=1).numpy() == labels
    accuracy = [float(right[fold_of == fold].mean()) for fold in np.unique(fold_of)]
    spread = {"mean": float(np.mean(accuracy)), "std": float(np.std(accuracy, ddof=1))}
    return refit(everything, chosen), {"k": len(accuracy), "accuracy": accuracy, **spread}


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
    parts: dict[str, Dataset] = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    contents = {
        name: json.dumps([part.texts, part.labels.tolist()], ensure_ascii=False) for name, part in parts.items()
    }
    return {name: hashlib.sha256(one.encode("utf-8", "surrogatepass")).hexdigest() for name, one in contents.items()}


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("torch", "transformers", "tokenizers", "polars", "scikit-learn", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True)
class Evaluation:
    """A run's numbers on another table: see `headstart.metrics.evaluate`."""

    numbers: dict[str, Any]
    report: str
    notices: tuple[str, ...]


def evaluate(predictor: Predictor, source: str, text: str | None = None, label: str | None = None) -> Evaluation:
    """Test a loaded classifier on a labelled table.

    Its labels are all as the training table had them, or all as the run shows them.

    Raises:
        DataError: the table cannot be used, or has labels that the run does not know.
    """
    info, names = predictor.classifier.info, predictor.names
    trained_text, trained_label = info.get("columns", (None, None))
    columns = tables.scan(tables.resolve_path(source)).collect_schema().names()
    table = data.load(
        source,
        text or (trained_text if trained_text in columns else None),
        label or (trained_label if trained_label in columns else None),
        known=(info.get("labels", names), names),
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
