"""One run, from a table to a run folder. This room knows the order of the others, and nothing else."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headstart import data, metrics, report, tables
from headstart.checkpoints import PLAN, Checkpoints, check_out, is_unfinished
from headstart.config import PLACES, HeadKind, TrainConfig, from_file, settings
from headstart.data import Dataset, Splits
from headstart.encoder import (
    Encoder,
    Placement,
    choose_placement,
    encode,
    length_limit,
    load_config,
    load_tokenizer,
    locate,
)
from headstart.engine import side_by_side
from headstart.errors import DataError, InputError, StoppedEarlyError, disk_errors
from headstart.explain import Neighbour, explain, nearest
from headstart.features import Features, frozen_features
from headstart.folders import new_folder, whole_file
from headstart.judge import judge
from headstart.model import Depth, check_depth, cool, load_run, save_model
from headstart.predict import Predictor
from headstart.runs import read_json
from headstart.thaw import FineTuning, Thawed, deepest_within, layers_text, predicted_costs
from headstart.tokens import LengthAdvice, Tokens, advise_length
from headstart.train import History
from headstart.trials import Task, TrainedHead, in_folds, learning_curve, refit, train_head

LEFT = "Ctrl-C: the checkpoints in {} are left as they are; --resume goes on from the newest."
PARTS = ("train", "validation", "test")  # as `Splits` has them
Announce = Callable[[str], None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What training came to: the content of metrics.json and headstart.json, and scikit-learn's report on test.

    `notices` say what was found in the data and mended; `interrupted` is whether Ctrl-C ended training early.
    """

    folder: Path
    metrics: Json
    info: Json
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


@dataclass(frozen=True)
class Prepared:
    """All that precedes training: the parts and their raw labels, the encoder, token ids, features, and max_length."""

    splits: Splits
    raw_labels: tuple[str, ...]
    encoder: Encoder
    tokens: Tokens
    features: Features
    index: list[NDArray[np.int64]]
    advice: LengthAdvice
    max_length: int
    max_length_reason: str

    def task(self, config: TrainConfig) -> Task:
        """The head's task."""
        train, validation = self.splits.train, self.splits.validation
        seen, held = (self.features.take(part) for part in self.index[:2])
        return Task(self.encoder, seen, held, train.labels, validation.labels, train.names, config)

    def fine_tuning(self, config: TrainConfig, probe: TrainedHead | None = None) -> FineTuning:
        """The task of fine-tuning, which starts from the architecture's own head trained on stored features."""
        if probe is None or probe.spec is not None:
            plain = replace(head_settings(config), head="native", trials=None, recipe="headstart")
            probe = train_head(self.task(plain))
        if probe.history.interrupted:
            raise KeyboardInterrupt
        train, validation = self.splits.train, self.splits.validation
        start, parts = probe.whole(train.names), (self.index[0], self.index[1], self.index[2])
        return FineTuning(self.encoder, self.tokens, parts, train.labels, validation.labels, train.names, config, start)


def head_settings(config: TrainConfig) -> TrainConfig:
    """The settings of the head stage: those for epochs and steps are fine-tuning's where there is any."""
    if config.thaw == "0":
        return config
    head: HeadKind = "native" if config.head == "native" or config.thaw != "auto" else "auto"
    return replace(config, head=head, epochs=None, lr=None, batch_size=None, weight_decay=None)


def prepare(config: TrainConfig, seconds: dict[str, float]) -> Prepared:
    """Read, split, tokenise and encode; `seconds` has the time added to its parts."""
    with measured(seconds, "read"):
        splits, raw_labels = read(config)
    placement = choose_placement(config.device, config.precision)
    with measured(seconds, "encode"):
        encoder = Encoder(config.model, placement)
    if config.thaw.isdecimal() and config.thaw != "0":
        check_depth(encoder, int(config.thaw))
    with measured(seconds, "tokenize"):
        parts = (splits.train, splits.validation, splits.test)
        tokens = encoder.tokenizer([text for part in parts for text in part.texts], progress="tokenizing")
        advice = advise_length(tokens.lengths[: len(splits.train)], limit=encoder.max_length, hidden=encoder.hidden)
        max_length, why = choose_length(config, advice, encoder)
        cut = encoder.tokenizer.truncate(tokens, max_length)
    with measured(seconds, "encode"):
        features = frozen_features(encoder, cut)
    index = np.split(np.arange(len(tokens)), np.cumsum([len(part) for part in parts])[:-1])
    return Prepared(splits, raw_labels, encoder, cut, features, index, advice, max_length, why)


@dataclass(frozen=True)
class Learnt:
    """What training came to: the model kept, its module whose last layer makes logits, and what it says of held texts.

    `stages` are the histories by name, `plan` what was decided of thawing, `folds` what cross-validation found.
    """

    model: TrainedHead | Thawed
    module: torch.nn.Module
    validation_logits: torch.Tensor
    test_logits: torch.Tensor
    stages: dict[str, History]
    plan: Json
    folds: Json | None
    interrupted: bool
    learning_curve: list[Json]


def train(config: TrainConfig, started: float | None = None, announce: Announce = lambda _: None) -> Run:
    """Train, test once, and write the run folder; the total counts from `started`, a `time.time()`, or from now.

    `announce` is told what comes next, or has come out. An `InputError` is raised, with nothing written, if the data,
    the model, a setting or the output folder cannot be used, and a `TerminatedError` after SIGTERM.
    """
    started = time.time() if started is None else started
    seconds = dict.fromkeys(("read", "tokenize", "encode", "train", "evaluate"), 0.0)
    out = out_folder(config)
    check_out(out, overwrite=config.overwrite, resume=config.resume)
    ready = prepare(config, seconds)
    splits, names = ready.splits, ready.splits.train.names
    with measured(seconds, "train"):
        learnt = learn(ready, config, out, announce)
    with measured(seconds, "evaluate"):
        judged = judge(splits, learnt.validation_logits, learnt.test_logits, config.calibration)
        cool(learnt.module, len(names), judged.temperature)
        text = metrics.report_text(judged.probabilities, splits.test.labels, names)
    stages = [stage_record(name, history) for name, history in learnt.stages.items()]
    numbers = {**judged.numbers, "stages": stages, "learning_curve": learnt.learning_curve}
    numbers |= {"features": ready.features.cost()} | ({"folds": learnt.folds} if learnt.folds is not None else {})
    info = record(ready, config, learnt, out) | {"calibration": judged.numbers["calibration"]}
    curves = {name: [asdict(epoch) for epoch in history.epochs] for name, history in learnt.stages.items()}
    figures = {**judged.figures, "curves": curves, "lengths": report.length_bins(ready.advice.lengths)}
    counts = np.bincount(splits.train.labels, minlength=len(names)).tolist()
    figures["balance"] = [{"name": name, "texts": count} for name, count in zip(names, counts, strict=True)]
    with new_folder(out, overwrite=config.overwrite or is_unfinished(out)) as folder:
        save_model(folder, learnt.model.whole(names), ready.encoder, ready.max_length)
        report.write_predictions(folder / "predictions.csv", splits.test, judged.probabilities)
        figures["mistakes"] = coloured(folder, figures["mistakes"], ready.encoder.placement)
        total = {**seconds, "total": time.time() - started}
        numbers["timing"] = info["timing"] = {name: round(value, 3) for name, value in total.items()}
        report.write_json(folder / "metrics.json", numbers)
        report.write_json(folder / "headstart.json", info)
        (folder / "README.md").write_text(report.model_card(info, numbers, text), encoding="utf-8")
        (folder / "report.html").write_text(report.page(info, numbers, text, figures), encoding="utf-8")
        if config.keep_checkpoints:
            for place in out.glob("checkpoint-*/"):
                shutil.copytree(place, folder / place.name)
    return Run(out, numbers, info, text, (*splits.notices, *ready.features.warnings), learnt.interrupted)


def learn(ready: Prepared, config: TrainConfig, out: Path, announce: Announce) -> Learnt:
    """Train the head, on all folds where asked for, and fine-tune; keep what is better on validation data."""
    task = ready.task(head_settings(config))
    chosen = train_head(task)
    if chosen.history.interrupted and config.resume and is_unfinished(out):
        raise StoppedEarlyError(LEFT.format(out))
    head, cross, fine, interrupted = chosen, None, None, chosen.history.interrupted
    plan: Json = {}
    if config.folds is not None and not interrupted:
        head, cross = train_on_all(task, chosen, ready.splits, ready.features)
    if config.thaw != "0" and not interrupted:
        fine, plan = thaw_after(ready, chosen, config, out, announce)
        interrupted = fine.history.interrupted if fine is not None else "interrupted" in plan
    curve: list[Json] = []
    if config.recipe != "article" and not interrupted:
        with contextlib.suppress(KeyboardInterrupt):  # all that matters has been learnt
            curve = learning_curve(task, chosen)
    stages = {"head": chosen.history} | ({f"thaw-{fine.depth}": fine.history} if fine is not None else {})
    if fine is not None and plan["kept"] != "0":
        held, tested = fine.validation_logits, fine.test_logits
        return Learnt(fine, fine.model, held, tested, stages, plan, cross, interrupted, curve)
    # A head trained on all but test is validated by the one that has not seen the validation part.
    held, tested = chosen.logits(ready.features.take(ready.index[1])), head.logits(ready.features.take(ready.index[2]))
    return Learnt(head, head.head, held, tested, stages, plan, cross, interrupted, curve)


def record(ready: Prepared, config: TrainConfig, learnt: Learnt, out: Path) -> Json:
    """The content of headstart.json, but for the timing."""
    splits, names = ready.splits, ready.splits.train.names
    info: Json = {"headstart": importlib.metadata.version("headstart"), "out": str(out)}
    info |= {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "settings": asdict(config)}
    info |= {"names": list(names), "labels": list(ready.raw_labels)}
    info |= {"columns": list(splits.train.columns), "data": data_fingerprint(splits)}
    info |= {"split": dict(zip(PARTS, map(len, splits[:3]), strict=True)), "notices": list(splits.notices)}
    info |= {"max_length": ready.max_length, "max_length_reason": ready.max_length_reason}
    info |= {"placement": ready.encoder.placement.reason, "encoder_fingerprint": ready.encoder.fingerprint}
    history = learnt.model.history
    info |= {"head": learnt.model.description(), "history": [asdict(epoch) for epoch in history.epochs]}
    info |= {"thaw": {"kept": "0", **learnt.plan}, "interrupted": learnt.interrupted}
    return {**info, "seed": config.seed, "versions": versions()}


def coloured(folder: Path, mistakes: Sequence[Json], placement: Placement) -> list[Json]:
    """Mistakes with the words that pushed each, as the model in `folder` has it."""
    if not mistakes:
        return []
    classifier = load_run(folder, replace(placement, precision="fp32"))

    def with_words(mistake: Json) -> Json:
        return {**mistake, "words": explain(classifier, mistake["text"], "gradients at a few points").words}

    return list(side_by_side(with_words, mistakes))


def thaw_after(
    ready: Prepared, head: TrainedHead, config: TrainConfig, out: Path, announce: Announce
) -> tuple[Thawed | None, Json]:
    """Fine-tune as deep as was asked for or as the time allows; and what was predicted and decided, for headstart.json.

    The depth is written down first, so that a run that is resumed has the same.
    """
    announce(f"Head      validation accuracy {quality(head.history)[0]:.3f}")
    plan: Json = read_json(out, PLAN) if is_unfinished(out) and config.resume else {}
    key = run_key(ready, config)
    if plan and plan["key"] != key:
        hint = "Give the same ones as then, or start anew with --overwrite."
        raise InputError(f"{out}: holds a run with other settings, data or versions that has not ended. {hint}")
    try:
        task = ready.fine_tuning(config, head)
        if not plan:
            plan = {"key": key, **choose_depth(task, config, out)}
        announce(f"Thaw      {plan['reason']}")
        if plan["depth"] == "0":
            return None, plan
        depth = depth_of(plan["depth"])
        if depth != "all" and config.store:
            size = 2 * ready.encoder.hidden * len(ready.tokens.ids) / 1e6
            announce(f"Store     {size:,.0f} MB of hidden states below them (--no-store computes them anew each epoch)")
        checkpoints = Checkpoints(out, config.checkpoint_minutes, announce)
        if not config.resume:
            checkpoints.clear()
        begun = time.monotonic()
        with disk_errors(out), whole_file(out / PLAN) as temporary:
            report.write_json(temporary, plan)
        deadline = begun + config.time_budget if config.thaw == "auto" else math.inf
        fine = task.fit(depth, checkpoints, deadline)
    except KeyboardInterrupt:
        if plan and any(out.glob("checkpoint-*/")):
            raise StoppedEarlyError(LEFT.format(out)) from None
        return None, {**plan, "interrupted": True}
    better = config.thaw != "auto" or quality(fine.history) > quality(head.history)
    announce(f"Thawed    validation accuracy {quality(fine.history)[0]:.3f}: {'kept' if better else 'not kept'}")
    seconds, cut = time.monotonic() - begun, fine.history.interrupted or time.monotonic() > deadline
    plan |= {"kept": plan["depth"] if better else "0", "steps": fine.history.steps if cut else None}
    return fine, {**plan, "seconds": round(seconds, 3)}


def choose_depth(task: FineTuning, config: TrainConfig, out: Path) -> Json:
    """How deep to thaw and why, and with `auto` what each depth was predicted to cost."""
    if config.thaw != "auto":
        return {"depth": config.thaw, "reason": f"{layers_text(depth_of(config.thaw))}, as asked"}
    costs = predicted_costs(task, out)
    listed = [cost._asdict() for cost in costs]
    best = deepest_within(costs, config.time_budget)
    why = f"nothing: no depth fits {config.time_budget:,.0f} s and the memory and disk that are free"
    if best is not None:
        why = f"the deepest that fits {config.time_budget:,.0f} s ({best.seconds:,.0f} s predicted)"
        why = f"{layers_text(best.depth)}, {why}"
    return {"depth": str(best.depth) if best is not None else "0", "reason": why, "costs": listed}


def depth_of(thaw: str) -> Depth:
    """The depth that a setting names."""
    return "all" if thaw == "all" else int(thaw)


def quality(history: History) -> tuple[float, float]:
    """How training came out on validation, more being better: in accuracy, and at the same in loss."""
    best = history.epochs[history.best]
    return best.validation_accuracy, -best.validation_loss


def run_key(ready: Prepared, config: TrainConfig) -> str:
    """A sha256 of everything that decides the result of fine-tuning."""
    aside = (*PLACES, "time_budget", "checkpoint_minutes", "keep_checkpoints")
    decisive = {name: value for name, value in asdict(config).items() if name not in aside}
    parts = [decisive, data_fingerprint(ready.splits), ready.encoder.fingerprint, versions(), torch.get_num_threads()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def costs(config: TrainConfig) -> str:
    """Train the head, and say what each depth of fine-tuning would cost; nothing is written but the feature store."""
    ready = prepare(config, dict.fromkeys(("read", "tokenize", "encode"), 0.0))
    return report.costs_text(predicted_costs(ready.fine_tuning(config), out_folder(config)), config.time_budget)


def is_finished(out: Path) -> bool:
    """Whether a folder holds a run, and not one that has not ended."""
    return (out / "headstart.json").is_file() and not is_unfinished(out)


def out_folder(config: TrainConfig) -> Path:
    """Where a run goes."""
    return Path(config.out) if config.out is not None else Path("runs") / default_name(config.data)


def default_name(source: str) -> str:
    """A run's name from the name of its data: `reviews.csv.gz` gives `reviews`."""
    return tables.ENDING.sub("", Path(source).name) or "run"


def read(config: TrainConfig) -> tuple[Splits, tuple[str, ...]]:
    """The three parts, with the names to show, and the labels as the table has them; all problems are told at once."""
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
        labels = f"{len(whole.names)} labels: {', '.join(whole.names[:12])}"
        problems.append(f"--label-names gives {len(shown)} names, and there are {labels}.")
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
        most = f"{config.model} takes at most {encoder.max_length} tokens"
        raise InputError(f"--max-length {config.max_length}: {most}. The texts suggest {advice.advised}.")
    cut = float((advice.lengths > config.max_length).mean())
    source = "the article's" if config.recipe == "article" else "as asked"
    return config.max_length, f"{source}; {cut:.1%} of the training texts are cut (advised: {advice.advised})"


def train_on_all(task: Task, chosen: TrainedHead, splits: Splits, features: Features) -> tuple[TrainedHead, Json]:
    """Cross-validate a head like `chosen` on all but test and train it there; an `InputError` if a class is small."""
    texts = splits.train.texts + splits.validation.texts
    labels = np.concatenate([splits.train.labels, splits.validation.labels])
    everything = replace(task, train=features.take(np.arange(len(texts))), train_labels=labels)
    _, groups = np.unique([data.text_key(text) for text in texts], return_inverse=True)
    logits, fold_of = in_folds(everything, chosen, groups)
    right = logits.argmax(dim=1).numpy() == labels
    accuracy = [float(right[fold_of == fold].mean()) for fold in np.unique(fold_of)]
    spread = {"mean": float(np.mean(accuracy)), "std": float(np.std(accuracy, ddof=1))}
    return refit(everything, chosen), {"k": len(accuracy), "accuracy": accuracy, **spread}


def stage_record(name: str, history: History) -> Json:
    """One entry of `stages` in metrics.json."""
    accuracy, seconds = quality(history)[0], round(sum(epoch.seconds for epoch in history.epochs), 3)
    return {"name": name, "epochs": len(history.epochs), "validation_accuracy": accuracy, "seconds": seconds}


def data_fingerprint(splits: Splits) -> dict[str, str]:
    """A sha256 of each part's texts and labels, in order."""
    parts = {name: [part.texts, part.labels.tolist()] for name, part in zip(PARTS, splits[:3], strict=True)}
    contents = {name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}
    return {name: hashlib.sha256(one.encode("utf-8", "surrogatepass")).hexdigest() for name, one in contents.items()}


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("torch", "transformers", "tokenizers", "polars", "scikit-learn", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True)
class Evaluation:
    """A run's numbers on another table: see `headstart.metrics.evaluate`."""

    numbers: Json
    report: str
    notices: tuple[str, ...]


def evaluate(predictor: Predictor, source: str, text: str | None = None, label: str | None = None) -> Evaluation:
    """Test a classifier on a table labelled all as in training, or all as the run shows labels; else a `DataError`."""
    info, names = predictor.classifier.info, predictor.names
    columns = tables.scan(tables.resolve_path(source)).collect_schema().names()
    usual = (name if name in columns else None for name in info.get("columns", (None, None)))
    text, label = (given or trained for given, trained in zip((text, label), usual, strict=True))
    table = data.load(source, text, label, known=(info.get("labels", names), names), least_rows=1)
    scores = predictor.score(table.texts, progress="scoring")
    notices = list(table.notices)
    if cut := int(scores.cut.sum()):
        notices.append(f"{cut:,} of {len(table):,} texts were cut to {predictor.classifier.max_length} tokens.")
    numbers = metrics.evaluate(scores.probabilities, table.labels, names)
    return Evaluation(numbers, metrics.report_text(scores.probabilities, table.labels, names), tuple(notices))


def neighbours(folder: Path, text: str) -> list[Neighbour]:
    """The training texts of a run that are most like a text; an `InputError` if its table is gone or has changed."""
    info = read_json(folder, "headstart.json")
    config = settings(info["settings"]["data"], **from_file(str(folder / "headstart.json")))
    ready = prepare(config, dict.fromkeys(("read", "tokenize", "encode"), 0.0))
    if data_fingerprint(ready.splits) != info["data"]:
        raise InputError(f"{config.data}: has changed since {folder} was trained.")
    encoder, train = ready.encoder, ready.splits.train
    tokens = encoder.tokenizer.truncate(encoder.tokenizer([text]), ready.max_length)
    ((_, vectors),) = encode(encoder, tokens, ready.features.layout)
    wanted = replace(ready.features, distinct=vectors, rows=np.zeros(1, np.int64))
    return nearest(ready.features.take(ready.index[0]), train.texts, [train.names[i] for i in train.labels], wanted)


def lengths(source: str, model: str, text: str | None = None) -> LengthAdvice:
    """Token lengths of a table's texts and the max_length they suggest; a `DataError` or `ModelError` if not found."""
    texts = data.load_texts(source, text)
    folder = locate(model)
    shape = load_config(folder)
    tokens = load_tokenizer(folder)[1](texts, progress="tokenizing")
    return advise_length(tokens.lengths, limit=length_limit(shape), hidden=int(shape.hidden_size))
