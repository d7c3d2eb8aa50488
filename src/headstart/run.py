"""One run: train a head, thaw the encoder, keep what is better, test it once, and write the run folder."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headstart import data, metrics, report
from headstart.checkpoints import PLAN, Checkpoints, check_out, is_unfinished
from headstart.config import PLACES, HeadKind, TrainConfig
from headstart.encoder import Encode, Placement, encode
from headstart.engine import side_by_side
from headstart.errors import InputError, StoppedEarlyError, disk_errors
from headstart.explain import FEW, explain
from headstart.folders import new_folder, whole_file
from headstart.judge import judge
from headstart.model import Depth, load_run, rescale, save_model
from headstart.predict import decide, probabilities_of
from headstart.prepare import PARTS, Prepared, data_fingerprint, default_name, measured, prepare
from headstart.runs import read_json
from headstart.targets import Targets
from headstart.thaw import FineTuning, Thawed, deepest_within, layers_text, predicted_costs
from headstart.track import Log
from headstart.train import Epoch, History
from headstart.trials import Task, TrainedHead, in_folds, learning_curve, refit, train_head

LEFT = "Ctrl-C: the checkpoints in {} are left as they are; --resume goes on from the newest."
Announce = Callable[[str], None]
OnEpoch = Callable[[str, int, Epoch], bool]  # the stage, the epoch's number from 0, its record; whether to stop
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What training came to: the content of metrics.json and of headstart.json.

    `notices` say what was found in the data, and in the store, and mended.
    """

    folder: Path
    metrics: Json
    info: Json
    notices: tuple[str, ...]

    def summary(self) -> str:
        """One screen: what was done, what came out, where it is, what to do next."""
        return report.told("summary.txt", self.info, self.metrics)

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return report.told("run.html", self.info, self.metrics)


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


@dataclass(frozen=True)
class Means:
    """What computes the two things that take long: encoding and fine-tuning. This process does, or others for it."""

    encode: Encode = encode
    fine_tune: Callable[[FineTuning, Depth, Checkpoints, float, Callable[[int, Epoch], bool]], Thawed] = FineTuning.fit


HERE = Means()


def train(
    config: TrainConfig, started: float | None = None, announce: Announce = lambda _: None, means: Means = HERE
) -> Run:
    """Train, test once, and write the run folder; the total counts from `started`, a `time.time()`, or from now.

    `announce` is told what comes next, or has come out. An `InputError` is raised, with nothing written, if the data,
    the model, a setting or the output folder cannot be used, and a `TerminatedError` after SIGTERM.
    """
    started = time.time() if started is None else started
    out = out_folder(config)
    check_out(out, overwrite=config.overwrite, resume=config.resume)
    with Log(config, out, announce) as log:
        return _train(config, out, started, announce, log, means)


def _train(config: TrainConfig, out: Path, started: float, announce: Announce, log: Log, means: Means) -> Run:
    ready = prepare(config, means.encode)
    log.start()
    splits, names, seconds = ready.splits, ready.splits.train.names, {**ready.seconds, "train": 0.0, "evaluate": 0.0}
    with measured(seconds, "train"):
        learnt = learn(ready, config, out, announce, log.epoch, means)
    with measured(seconds, "evaluate"):
        held, tested = (logits.double().numpy() for logits in (learnt.validation_logits, learnt.test_logits))
        judged = judge(splits, held, tested, config.calibration)
        rescale(learnt.module, *judged.calibration)
    numbers, figures = judged.numbers, judged.figures
    numbers["stages"] = [stage_record(name, history) for name, history in learnt.stages.items()]
    numbers |= {"learning_curve": learnt.learning_curve, "features": ready.features.cost()}
    numbers |= {"folds": learnt.folds} if learnt.folds is not None else {}
    info = record(ready, config, learnt, out)
    info |= {"calibration": numbers["calibration"], "thresholds": list(judged.thresholds)}
    counts = splits.train.counts.tolist()
    figures |= {"histories": learnt.stages, "balance": dict(zip(names, counts, strict=True))}
    figures["lengths"] = report.length_bins(ready.advice.lengths)
    with new_folder(out, overwrite=config.overwrite or is_unfinished(out)) as folder:
        save_model(folder, learnt.model.whole(names), ready.encoder, ready.max_length, splits.train.problem)
        report.write_predictions(folder / "predictions.csv", splits.test, judged.probabilities, judged.thresholds)
        figures["mistakes"] = coloured(folder, figures["mistakes"], ready.encoder.placement)
        total = {**seconds, "total": time.time() - started}
        numbers["timing"] = info["timing"] = {name: round(value, 3) for name, value in total.items()}
        info["limits"] = report.lines_of("limits.txt", numbers)
        report.write_json(folder / "metrics.json", numbers)
        report.write_json(folder / "headstart.json", info)
        card, page = report.told("card.md", info, numbers), report.told("report.html", info, numbers, **figures)
        (folder / "README.md").write_text(card + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page + "\n", encoding="utf-8")
        if config.keep_checkpoints and info["thaw"].get("depth", "0") != "0":  # others would be an earlier run's
            for place in out.glob("checkpoint-*/"):
                shutil.copytree(place, folder / place.name)
    log.result(numbers)
    return Run(out, numbers, info, (*splits.notices, *ready.features.warnings))


def head_settings(config: TrainConfig) -> TrainConfig:
    """The settings of the head stage: those for epochs and steps are fine-tuning's where there is any."""
    if config.thaw == "0":
        return config
    head: HeadKind = "native" if config.head == "native" or config.thaw != "auto" else "auto"
    return replace(config, head=head, epochs=None, lr=None, batch_size=None, weight_decay=None)


def head_task(ready: Prepared, config: TrainConfig) -> Task:
    """What a head is trained for."""
    return Task(ready.encoder, *ready.featured[:2], *ready.targets[:2], ready.splits.train.names, config)


def fine_tuning(ready: Prepared, config: TrainConfig, probe: TrainedHead | None = None) -> FineTuning:
    """The task of fine-tuning, which starts from the architecture's own head trained on stored features."""
    if probe is None or probe.spec is not None:
        plain = replace(head_settings(config), head="native", trials=None, recipe="headstart")
        probe = train_head(head_task(ready, plain))
    if probe.history.interrupted:
        raise KeyboardInterrupt
    names = ready.splits.train.names
    start = probe.whole(names)
    return FineTuning(ready.encoder, ready.tokens, ready.index, ready.targets, names, config, start)


def learn(
    ready: Prepared,
    config: TrainConfig,
    out: Path,
    announce: Announce,
    on_epoch: OnEpoch = lambda *_: False,
    means: Means = HERE,
) -> Learnt:
    """Train the head, on all folds where asked for, and fine-tune; keep what is better on validation data."""
    if config.class_weight == "auto" and ready.splits.train.problem == "ordered":
        config = replace(config, class_weight="none")  # else answers would stray to the rare ends
    task = head_task(ready, head_settings(config))
    chosen = head = train_head(task)
    for number, epoch in enumerate(chosen.history.epochs):
        on_epoch("head", number, epoch)
    interrupted = chosen.history.interrupted
    if interrupted and config.resume and is_unfinished(out):
        raise StoppedEarlyError(LEFT.format(out))
    stages, fine, cross = {"head": chosen.history}, None, None
    plan, curve = Json(), list[Json]()
    if config.folds is not None and not interrupted:
        head, cross = train_on_all(task, chosen, ready)
    if config.thaw != "0" and not interrupted:
        fine, plan = thaw_after(ready, chosen, config, out, announce, on_epoch, means)
        interrupted = "interrupted" in plan
    if fine is not None:
        stages[f"thaw-{fine.depth}"], interrupted = fine.history, fine.history.interrupted
    if config.recipe != "article" and len(ready.splits.test) and not interrupted:
        with contextlib.suppress(KeyboardInterrupt):  # all that matters has been learnt
            curve = learning_curve(task, chosen)
    if fine is not None and plan["kept"] != "0":
        held, tested = fine.validation_logits, fine.test_logits
        return Learnt(fine, fine.model, held, tested, stages, plan, cross, interrupted, curve)
    # A head trained on all but test is validated by the one that has not seen the validation part.
    held = ready.targets[1].mean(chosen.logits(ready.featured[1]))
    tested = ready.targets[2].mean(head.logits(ready.featured[2]))
    return Learnt(head, head.head, held, tested, stages, plan, cross, interrupted, curve)


def record(ready: Prepared, config: TrainConfig, learnt: Learnt, out: Path) -> Json:
    """The content of headstart.json, but for the calibration and the timing."""
    splits, train, model = ready.splits, ready.splits.train, learnt.model
    info: Json = {"headstart": importlib.metadata.version("headstart"), "out": str(out)}
    info |= {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "settings": asdict(config)}
    info |= {"names": list(train.names), "labels": list(ready.raw_labels), "columns": list(train.columns)}
    info |= {"data": data_fingerprint(splits), "split": dict(zip(PARTS, map(len, splits[:3]), strict=True))}
    info |= {"notices": list(splits.notices)}
    info |= {"problem": train.problem, "long": config.long}
    info |= {"max_length": ready.max_length, "max_length_reason": ready.max_length_reason}
    info |= {"placement": ready.encoder.placement.reason, "encoder_fingerprint": ready.encoder.fingerprint}
    info |= {"head": model.description(), "history": [asdict(epoch) for epoch in model.history.epochs]}
    info |= {"thaw": {"kept": "0", **learnt.plan}, "interrupted": learnt.interrupted}
    return {**info, "seed": config.seed, "versions": versions()}


def coloured(folder: Path, mistakes: Sequence[Json], placement: Placement) -> list[Json]:
    """Mistakes with the words that pushed each, as the model in `folder` has it."""
    if not mistakes:
        return []
    classifier = load_run(folder, replace(placement, precision="fp32"))
    words = side_by_side(lambda one: explain(classifier, one["text"], FEW).words, mistakes)
    return [{**one, "words": some} for one, some in zip(mistakes, words, strict=True)]


def thaw_after(
    ready: Prepared,
    head: TrainedHead,
    config: TrainConfig,
    out: Path,
    announce: Announce,
    on_epoch: OnEpoch,
    means: Means,
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
        task = fine_tuning(ready, config, head)
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
        fine = means.fine_tune(task, depth, checkpoints, deadline, functools.partial(on_epoch, f"thaw-{depth}"))
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
    costs, within = predicted_costs(task, out), f"{config.time_budget:,.0f} s"
    best = deepest_within(costs, config.time_budget)
    depth, why = "0", f"nothing: no depth fits {within} and the memory and disk that are free"
    if best is not None:
        depth = str(best.depth)
        why = f"{layers_text(best.depth)}, the deepest that fits {within} ({best.seconds:,.0f} s predicted)"
    return {"depth": depth, "reason": why, "costs": [cost._asdict() for cost in costs]}


def depth_of(thaw: str) -> Depth:
    """The depth that a setting names."""
    return "all" if thaw == "all" else int(thaw)


def quality(history: History) -> tuple[float, float]:
    """How training came out on validation, more being better: in accuracy, and at the same in loss."""
    best = history.epochs[history.best]
    return best.validation_accuracy, -best.validation_loss


def run_key(ready: Prepared, config: TrainConfig) -> str:
    """A sha256 of everything that decides the result of fine-tuning."""
    aside = (*PLACES, "time_budget", "checkpoint_minutes", "keep_checkpoints", "report_to")
    decisive = {name: value for name, value in asdict(config).items() if name not in aside}
    parts = [decisive, data_fingerprint(ready.splits), ready.encoder.fingerprint, versions(), torch.get_num_threads()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def costs(config: TrainConfig) -> str:
    """Train the head, and say what each depth of fine-tuning would cost; nothing is written but the feature store."""
    found = predicted_costs(fine_tuning(prepare(config), config), out_folder(config))
    return report.filled("costs.txt", {"costs": found, "budget": config.time_budget})


def is_finished(out: Path) -> bool:
    """Whether a folder holds a run, and not one that has not ended."""
    return (out / "headstart.json").is_file() and not is_unfinished(out)


def out_folder(config: TrainConfig) -> Path:
    """Where a run goes."""
    return Path(config.out) if config.out is not None else Path("runs") / default_name(config.data)


def train_on_all(task: Task, chosen: TrainedHead, ready: Prepared) -> tuple[TrainedHead, Json]:
    """Cross-validate a head like `chosen` on all but test and train it there; an `InputError` if a class is small."""
    wanted = Targets.joined(ready.targets[:2])
    everything = replace(task, train=ready.features.take(np.concatenate(ready.index[:2])), wanted=wanted)
    keys = [data.text_key(text) for part in ready.splits[:2] for text in part.texts]
    _, groups = np.unique(keys, return_inverse=True)
    logits, fold_of = in_folds(everything, chosen, groups)
    half = () if wanted.labels.ndim == 1 else (0.5,) * len(task.names)
    said = decide(probabilities_of(logits, ready.splits.train.problem), half).labels
    right = metrics.are_right(said, wanted.labels)
    accuracy = [float(right[fold_of == fold].mean()) for fold in np.unique(fold_of)]
    spread = {"mean": float(np.mean(accuracy)), "std": float(np.std(accuracy, ddof=1))}
    return refit(everything, chosen), {"k": len(accuracy), "accuracy": accuracy, **spread}


def stage_record(name: str, history: History) -> Json:
    """One entry of `stages` in metrics.json."""
    accuracy, seconds = quality(history)[0], round(sum(epoch.seconds for epoch in history.epochs), 3)
    return {"name": name, "epochs": len(history.epochs), "validation_accuracy": accuracy, "seconds": seconds}


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("headstart", "torch", "transformers", "tokenizers", "polars", "scikit-learn", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
