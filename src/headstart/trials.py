"""Training heads on stored features: the architecture's own, one as given, or the best of many; and in folds.

A trial on stored features costs a fraction of a second, so the default head is searched: first the sets of layers,
then the other settings on the two best sets; `--trials N` lets optuna search instead. The lowest validation loss wins,
which is steadier than accuracy on small validation parts. This room knows heads and the loop; it knows no files.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.config import TrainConfig
from headstart.encoder import Encoder
from headstart.errors import InputError
from headstart.features import Features
from headstart.model import (
    HeadSpec,
    NativeHead,
    PooledModel,
    head_inputs,
    native_feature,
    native_model,
    new_head,
    pooled_model,
)
from headstart.progress import bar
from headstart.train import Epoch, FeatureBatches, History, Schedule, class_weights, fit

FIRST_GUESS = {"width": 128, "dropout": 0.5, "lr": 1e-3, "weight_decay": 0.01}
REFINEMENTS: tuple[dict[str, float], ...] = (
    {"lr": 3e-4},
    {"lr": 3e-4, "width": 256},
    {"width": 64, "dropout": 0.2},
    {"width": 256, "dropout": 0.2},
    {"width": 0, "weight_decay": 1.0},
    {"width": 0},
    {"weight_decay": 1.0},
)
PRUNE = {1: 1.15, 3: 1.03}
"""A trial is stopped at these epochs if its validation loss is over the best trial's by then, times this."""

SEARCH_ROWS, TRIAL_ROWS = 20_000, 4_096
"""The built-in search and optuna's train on at most so many texts; the head they find is then trained on all."""


class Inputs(NamedTuple):
    """What a head reads of the training and validation texts, (n, d), and what was taken off and multiplied, (d,)."""

    train: torch.Tensor
    held: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor

    def part(self, index: torch.Tensor | slice) -> "Inputs":
        """Some of the d columns; a slice copies nothing."""
        return Inputs(self.train[:, index], self.held[:, index], self.mean[index], self.scale[index])


@dataclass(frozen=True)
class Task:
    """What a head is trained for: stored features and label indexes to learn from and to choose on, and settings."""

    encoder: Encoder
    train: Features
    validation: Features
    train_labels: NDArray[np.int64]
    validation_labels: NDArray[np.int64]
    names: tuple[str, ...]
    config: TrainConfig

    def raw(self, names: Sequence[str]) -> Inputs:
        """What a head reads of `names`, as it is, fp32."""
        train, held = (head_inputs(self.encoder, part, names) for part in (self.train, self.validation))
        return Inputs(train, held, torch.zeros(train.shape[1]), torch.ones(train.shape[1]))

    @functools.cached_property
    def standard(self) -> Inputs:
        """Everything stored, standardised once for all rivals.

        Training inputs are rounded to bf16 where the encoder computes in it: the head's products are then several
        times faster, and the features know no better.
        """
        train, held, _, _ = self.raw(self.train.layout)
        mean, scale = train.mean(dim=0), 1 / train.std(dim=0).clamp_min(1e-6)
        for part in (train, held):
            part.sub_(mean).mul_(scale)
        half = self.encoder.placement.precision == "bf16"
        return Inputs(train.bfloat16() if half else train, held, mean, scale)

    def inputs(self, names: tuple[str, ...]) -> Inputs:
        """What a head reads of `names`, standardised."""
        places = [self.train.layout.index(name) for name in names]
        width = self.encoder.hidden
        if places == list(range(places[0], places[-1] + 1)):
            return self.standard.part(slice(places[0] * width, (places[-1] + 1) * width))
        return self.standard.part((torch.tensor(places)[:, None] * width + torch.arange(width)).flatten())

    def schedule(self, lr: float = 1e-3, weight_decay: float = 0.01) -> Schedule:
        """The settings' schedule; what they leave open is filled in."""
        config = self.config
        decay = weight_decay if config.weight_decay is None else config.weight_decay
        return Schedule(config.epochs, config.lr or lr, decay, config.clip_norm, config.patience)


@dataclass(frozen=True)
class TrainedHead:
    """A head with the weights of its best epoch; `spec` is None for the architecture's own, `tried` counts rivals."""

    encoder: Encoder
    head: nn.Module
    features: tuple[str, ...]
    spec: HeadSpec | None
    schedule: Schedule
    history: History
    tried: int = 1

    @property
    def validation_loss(self) -> float:
        """Of the epoch kept."""
        return self.history.epochs[self.history.best].validation_loss

    def logits(self, features: Features) -> torch.Tensor:
        """(n, labels) logits of stored features."""
        with torch.inference_mode():
            return self.head(head_inputs(self.encoder, features, self.features))

    def whole(self, names: Sequence[str]) -> PooledModel | Any:
        """The encoder and the head as what a run folder holds."""
        if isinstance(self.head, NativeHead):
            return self.head.whole()
        assert self.spec is not None
        return pooled_model(self.encoder, self.head, self.spec, names)

    def description(self) -> dict[str, Any]:
        """What headstart.json says of the head."""
        epoch = f"epoch {self.history.best + 1}"
        settings = {"lr": self.schedule.lr, "weight_decay": self.schedule.weight_decay, "tried": self.tried}
        if self.spec is None:
            return {"kind": "native", **settings, "description": f"the architecture's own, {epoch}"}
        width = f"{self.spec.width} hidden units" if self.spec.width else "linear"
        layers = ", ".join(name.removeprefix("mean-") for name in self.features if name.startswith("mean-"))
        others = [name for name in self.features if not name.startswith("mean-")]
        reads = " and ".join([*others, *([f"means of layers {layers}"] if layers else [])])
        chosen = f"best of {self.tried} tried on validation data, " if self.tried > 1 else ""
        words = f"pooled, {width}, on {reads}; {chosen}{epoch}"
        return {"kind": "pooled", **asdict(self.spec), **settings, "description": words}


def train_head(task: Task) -> TrainedHead:
    """The head that the settings ask for, trained: native, as given by a recipe, or the best of many.

    Raises:
        InputError: `--trials` without optuna.
    """
    config = task.config
    with one_thread():
        if config.head != "native" and config.recipe != "article":
            return pick_head(task)
        with bar("training", config.epochs, "epochs") as advance:

            def show(number: int, epoch: Epoch) -> bool:
                losses = f"loss {epoch.train_loss:.3f}, validation {epoch.validation_loss:.3f}"
                advance(1, f"{losses} ({epoch.validation_accuracy:.3f})")
                return False

            if config.head == "native":
                return _fit(task, (native_feature(task.encoder),), None, task.schedule(), show)
            features = config.head_features or ("pooler",)
            spec = HeadSpec(features, config.head_width or 0, config.head_dropout, standardize=False)
            return _fit(task, features, spec, task.schedule(), show)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread for the block: a head's steps are so small that a second one mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    task: Task,
    features: tuple[str, ...],
    spec: HeadSpec | None,
    schedule: Schedule,
    on_epoch: Callable[[int, Epoch], bool] = lambda number, epoch: False,
) -> TrainedHead:
    inputs = task.inputs(features) if spec is not None and spec.standardize else task.raw(features)
    weights = class_weights(task.train_labels, len(task.names), task.config.class_weight)
    truth = torch.from_numpy(task.validation_labels)

    def validate(model: nn.Module) -> tuple[float, float]:
        logits = torch.cat([model(part) for part in inputs.held.split(8192)])
        loss = nn.functional.cross_entropy(logits, truth, weight=weights)
        return float(loss), float((logits.argmax(dim=1) == truth).float().mean())

    size = task.config.batch_size or min(512, max(32, len(task.train) // 8))
    batches = FeatureBatches(inputs.train, torch.from_numpy(task.train_labels), size, task.config.seed)
    if spec is None:
        native = NativeHead(native_model(task.encoder, task.names, task.config.seed))
        history = fit(native, batches, validate, schedule, weights, on_epoch)
        return TrainedHead(task.encoder, native, features, spec, schedule, history)
    head = new_head(inputs.train.shape[1], spec, len(task.names), task.config.seed)
    history = fit(head.layers, batches, validate, schedule, weights, on_epoch)
    head.mean.copy_(inputs.mean)
    head.scale.copy_(inputs.scale)
    return TrainedHead(task.encoder, head, features, spec, schedule, history)


# --- searching


class Candidate(NamedTuple):
    """A head to try: its features, its width, dropout, lr and weight_decay, and when to give it up."""

    features: tuple[str, ...]
    guess: dict[str, float]
    hopeless: Callable[[int, Epoch], bool]


Search = Generator[Candidate, TrainedHead, None]
"""Yields candidates and is sent each one trained."""


def layer_sets(layout: Sequence[str]) -> list[tuple[str, ...]]:
    """Sets of stored features worth trying: each upper layer's mean, runs of neighbouring layers, everything."""
    means = [name for name in layout if name.startswith("mean-")]
    sets: list[tuple[str, ...]] = [(name,) for name in means[len(means) // 2 :]]
    for size in (2, 3, 4):
        sets += [tuple(means[end - size : end]) for end in (len(means), len(means) - 1) if end >= size]
    return list(dict.fromkeys([*sets, tuple(means), tuple(layout)]))


def pick_head(task: Task) -> TrainedHead:
    """Try many pooled heads and return the one with the lowest validation loss.

    What the person has set (learning rate, layers, width, …) is kept; the rest is searched. Ctrl-C keeps the best
    so far.
    """
    config = task.config
    sample = task
    most = SEARCH_ROWS if config.trials is None else TRIAL_ROWS
    if len(task.train) > most:
        some = np.sort(np.random.default_rng(config.seed).permutation(len(task.train))[:most])
        sample = replace(task, train=task.train.take(some), train_labels=task.train_labels[some])
    sets = [config.head_features] if config.head_features is not None else layer_sets(task.train.layout)
    given = {"width": config.head_width, "lr": config.lr, "weight_decay": config.weight_decay}
    fixed = {name: value for name, value in given.items() if value is not None}
    search, count = ladder(sets, fixed) if config.trials is None else optuna_search(sets, fixed, config)
    tried: list[TrainedHead] = []
    interrupted = False
    with bar("trying heads", count, "heads") as advance:
        try:
            candidate = next(search)
            while True:
                features, guess, hopeless = candidate
                spec = HeadSpec(features, int(guess["width"]), guess["dropout"])
                schedule = task.schedule(guess["lr"], guess["weight_decay"])
                tried.append(_fit(sample, features, spec, schedule, hopeless))
                advance(1, f"best loss {best_of(tried).validation_loss:.3f}")
                if interrupted := tried[-1].history.interrupted:
                    break
                candidate = search.send(tried[-1])
        except StopIteration:
            pass
        except KeyboardInterrupt:
            if not tried:
                raise  # nothing to keep yet
            interrupted = True
    best = best_of(tried)
    if sample is not task and not interrupted:
        best = _fit(task, best.features, best.spec, best.schedule)
        interrupted = best.history.interrupted
    return replace(best, history=replace(best.history, interrupted=interrupted), tried=len(tried))


def best_of(tried: Sequence[TrainedHead]) -> TrainedHead:
    """The head with the lowest validation loss, the earliest of equals."""
    return min(tried, key=lambda one: one.validation_loss)


def ladder(sets: Sequence[tuple[str, ...]], fixed: dict[str, float]) -> tuple[Search, int]:
    """Each set of layers with a first guess, then refinements on the two best sets; and how many that is."""
    guesses = [{**FIRST_GUESS, **change, **fixed} for change in ({}, *REFINEMENTS)]
    first, *refinements = [guess for i, guess in enumerate(guesses) if guess not in guesses[:i]]
    tried: list[TrainedHead] = []

    def hopeless(number: int, epoch: Epoch) -> bool:
        if not tried or number + 1 not in PRUNE:
            return False
        lead = best_of(tried).history.epochs[: number + 1]
        return epoch.validation_loss > PRUNE[number + 1] * min(one.validation_loss for one in lead)

    def search() -> Search:
        for features in sets:
            tried.append((yield Candidate(features, first, hopeless)))
        for leader in sorted(tried, key=lambda one: one.validation_loss)[:2]:
            for guess in refinements:
                tried.append((yield Candidate(leader.features, guess, hopeless)))

    return search(), len(sets) + min(2, len(sets)) * len(refinements)


def optuna_search(sets: Sequence[tuple[str, ...]], fixed: dict[str, float], config: TrainConfig) -> tuple[Search, int]:
    """`config.trials` candidates by optuna's TPE, weak ones stopped by successive halving (Li et al. 2018).

    Raises:
        InputError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("--trials needs optuna. Install it with: pip install 'headstart[tune]'") from error
    assert config.trials is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.seed)
    study = optuna.create_study(
        sampler=sampler, pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    )
    study.enqueue_trial({"layers": len(sets) - 1, **FIRST_GUESS})

    def search() -> Search:
        for _ in range(config.trials or 0):
            trial = study.ask()
            guess = {
                "width": trial.suggest_categorical("width", (0, 64, 128, 256)),
                "dropout": trial.suggest_float("dropout", 0.0, 0.7),
                "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
                "weight_decay": trial.suggest_float("weight_decay", 1e-4, 10.0, log=True),
            }
            features = sets[trial.suggest_int("layers", 0, len(sets) - 1)]

            def hopeless(number: int, epoch: Epoch, trial: Any = trial) -> bool:
                trial.report(epoch.validation_loss, number + 1)
                return bool(trial.should_prune())

            study.tell(trial, (yield Candidate(features, {**guess, **fixed}, hopeless)).validation_loss)

    return search(), config.trials


# --- folds


def in_folds(task: Task, head: TrainedHead, groups: NDArray[np.int64]) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """(n, labels) logits of each training text from a head like `head` that has not seen it, and (n,) its fold.

    The head's features, settings and number of epochs are repeated in each fold; the task's validation part is not
    used. Texts of one of the (n,) `groups`, such as copies, share a fold.

    Raises:
        InputError: a class has too few rows for so many folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = task.config.folds or 5
    if (least := int(np.bincount(task.train_labels).min())) < folds:
        raise InputError(f"--folds {folds}: the rarest label has only {least} rows outside the test part.")
    logits = torch.empty(len(task.train), len(task.names))
    fold_of = np.empty(len(task.train), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=task.config.seed)
    pairs = splitter.split(np.empty((len(task.train), 1)), task.train_labels, groups)
    with bar("folds", folds, "folds") as advance:
        for number, (rest, held) in enumerate(pairs):
            seen, unseen = task.train.take(rest), task.train.take(held)
            labels = task.train_labels
            fold = Task(task.encoder, seen, unseen, labels[rest], labels[held], task.names, task.config)
            logits[torch.from_numpy(held)] = refit(fold, head).logits(fold.validation)
            fold_of[held] = number
            advance(1, "")
    return logits, fold_of


def refit(task: Task, head: TrainedHead) -> TrainedHead:
    """A head like `head`, trained on all of the task's training texts for as many epochs as `head` was best after."""
    schedule = replace(head.schedule, epochs=head.history.best + 1, patience=None, keep="last")
    with one_thread():
        return replace(_fit(task, head.features, head.spec, schedule), tried=head.tried)
