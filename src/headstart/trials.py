"""Training heads on stored features: the architecture's own, one as given, the best of many; in folds. No files."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.config import TrainConfig
from headstart.data import strata
from headstart.encoder import Encoder
from headstart.engine import PooledHead
from headstart.errors import InputError
from headstart.features import Features
from headstart.model import HeadSpec, NativeHead, PooledModel, head_inputs, native_feature, native_model
from headstart.progress import bar
from headstart.targets import Targets, class_weights, loss_and_accuracy
from headstart.train import Epoch, FeatureBatches, History, Keep, Schedule, fit

HEAD_EPOCHS = 60
FIRST_GUESS = {"width": 128, "dropout": 0.5, "lr": 1e-3, "weight_decay": 0.01}
REFINEMENTS: tuple[dict[str, Any], ...] = (
    *({"lr": 3e-4}, {"lr": 3e-4, "width": 256}, {"width": 64, "dropout": 0.2}, {"width": 256, "dropout": 0.2}),
    *({"width": 0, "weight_decay": 1.0}, {"width": 0}, {"weight_decay": 1.0}),
)
PRUNE = {1: 1.15, 3: 1.03}  # a trial is stopped at these epochs if its loss is over the best one's by then, times this
CURVE = ((0.125, 512), (0.5, 2048))  # shares of the training texts for a learning curve, and the most texts they may be
SEARCH_ROWS, TRIAL_ROWS = 20_000, 4_096  # texts that the built-in search and optuna's train on; the head found, on all

Hopeless = Callable[[int, Epoch], bool]  # whether to give a head up, by an epoch of it
Attempt = Callable[[tuple[str, ...], dict[str, float], Hopeless], "TrainedHead"]  # trains one rival


@dataclass(frozen=True)
class Task:
    """What a head is trained for: stored features, of pieces of texts, to learn from and to choose on, and settings.

    `wanted` is what the texts of `train` should be given, `held` those of `validation`.
    """

    encoder: Encoder
    train: Features
    validation: Features
    wanted: Targets
    held: Targets
    names: tuple[str, ...]
    config: TrainConfig

    def take(self, index: NDArray[np.int64]) -> "Task":
        """The task with only the training texts at `index`."""
        return replace(self, train=self.train.take(self.wanted.places(index)), wanted=self.wanted.take(index))

    def fold(self, rest: NDArray[np.int64], held: NDArray[np.int64]) -> "Task":
        """The task that learns from the training texts at `rest`, and chooses on those at `held`."""
        validation = self.train.take(self.wanted.places(held))
        return replace(self.take(rest), validation=validation, held=self.wanted.take(held))

    def inputs(self, features: tuple[str, ...], *, standardize: bool) -> list[torch.Tensor]:
        """What a head reads of training and validation texts, (n, d), and what it was shifted and scaled by, (d,)."""
        if not standardize:
            parts = (self.train, self.validation)
            return [*(head_inputs(self.encoder, part, features) for part in parts), torch.zeros(1), torch.ones(1)]
        # Neighbours among what rivals may read: not copied.
        width, start = self.encoder.hidden, (self.config.head_features or self.train.layout).index(features[0])
        return [part[..., start * width : (start + len(features)) * width] for part in self.standard]

    @functools.cached_property
    def standard(self) -> list[torch.Tensor]:
        """The inputs of all that rivals may read, standardised once for all of them."""
        train, held, *_ = self.inputs(self.config.head_features or self.train.layout, standardize=False)
        mean, scale = train.mean(dim=0), 1 / train.std(dim=0).clamp_min(1e-6)
        for part in (train, held):
            part.sub_(mean).mul_(scale)
        # In bf16 the head's products are several times faster, and the features of such an encoder know no better.
        return [train.bfloat16() if self.encoder.placement.precision == "bf16" else train, held, mean, scale]

    def plan(self, features: tuple[str, ...], guess: dict[str, float]) -> tuple[HeadSpec, Schedule]:
        """A pooled head on `features` and how it is trained: as set, or else as guessed."""
        config = self.config
        given = {"width": config.head_width, "dropout": config.head_dropout}
        given |= {"lr": config.lr, "weight_decay": config.weight_decay}
        plan = FIRST_GUESS | guess | {name: value for name, value in given.items() if value is not None}
        epochs, lr, decay = config.epochs or HEAD_EPOCHS, plan["lr"], plan["weight_decay"]
        schedule = Schedule(epochs, lr, decay, config.clip_norm, config.patience)
        return HeadSpec(features, int(plan["width"]), plan["dropout"]), schedule


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

    def logits(self, features: Features) -> torch.Tensor:
        """(n, labels) logits of stored features."""
        with torch.inference_mode():
            return self.head(head_inputs(self.encoder, features, self.features))

    def whole(self, names: Sequence[str]) -> Any:
        """The encoder and the head as what a run folder holds: a `PooledModel` or a transformers model."""
        return self.head.model.eval() if self.spec is None else PooledModel(self.encoder, self.head, self.spec, names)

    def description(self) -> dict[str, Any]:
        """What headstart.json says of the head."""
        epoch = f"epoch {self.history.best + 1}"
        settings = {"lr": self.schedule.lr, "weight_decay": self.schedule.weight_decay, "tried": self.tried}
        if self.spec is None:
            return {"kind": "native", **settings, "description": f"the architecture's own, {epoch}"}
        width = f"{self.spec.width} hidden units" if self.spec.width else "linear"
        reads = [name for name in self.features if not name.startswith("mean-")]
        if means := ", ".join(name.removeprefix("mean-") for name in self.features if name not in reads):
            reads.append(f"means of layers {means}")
        chosen = f"best of {self.tried} tried on validation data, " if self.tried > 1 else ""
        words = f"pooled, {width}, on {' and '.join(reads)}; {chosen}{epoch}"
        return {"kind": "pooled", **asdict(self.spec), **settings, "description": words}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread for the block: a head's steps are so small that a second one mostly waits."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        yield


@one_thread()
def train_head(task: Task) -> TrainedHead:
    """The head that the settings ask for, trained: native, as given by a recipe, or the best of many."""
    config = task.config
    spec, schedule = task.plan(config.head_features or ("pooler",), {"width": 0})
    if config.head == "native":
        return _fit(task, None, schedule, label="training")
    if config.recipe == "article":
        return _fit(task, replace(spec, standardize=False), schedule, label="training")
    return pick_head(task)


def _fit(
    task: Task, spec: HeadSpec | None, schedule: Schedule, stop: Hopeless = lambda *_: False, label: str | None = None
) -> TrainedHead:
    features = (native_feature(task.encoder),) if spec is None else spec.features
    inputs, held, mean, scale = task.inputs(features, standardize=spec is not None and spec.standardize)
    classes = class_weights(task.wanted.labels, len(task.names), task.config.class_weight)
    truth = task.held.tensors(classes)

    def validate(model: nn.Module) -> tuple[float, float]:
        return loss_and_accuracy(task.held.mean(torch.cat([model(part) for part in held.split(8192)])), *truth)

    size = task.config.batch_size or min(512, max(32, len(task.train) // 8))
    batches = FeatureBatches(inputs, *task.wanted.by_piece(classes), size, task.config.seed)
    head: nn.Module
    if spec is None:
        head = trained = NativeHead(native_model(task.encoder, task.names, task.config.seed))
    else:
        torch.manual_seed(task.config.seed)
        head = PooledHead(inputs.shape[1], spec.width, len(task.names), spec.dropout)
        head.mean.copy_(mean)
        head.scale.copy_(scale)
        trained = head.layers  # `inputs` come standardised
    history = fit(trained, batches, validate, schedule, stop, label=label)
    return TrainedHead(task.encoder, head, features, spec, schedule, history)


def layer_sets(layout: Sequence[str]) -> list[tuple[str, ...]]:
    """Sets of stored features worth trying: each upper layer's mean, runs of neighbouring layers, everything."""
    means = [name for name in layout if name.startswith("mean-")]
    upper = [(name,) for name in means[len(means) // 2 :]]
    runs = [tuple(means[end - size : end]) for size in (2, 3, 4) for end in (len(means), len(means) - 1) if end >= size]
    return list(dict.fromkeys([*upper, *runs, tuple(means), tuple(layout)]))


def pick_head(task: Task) -> TrainedHead:
    """The best on validation of many pooled heads, in what the person has not set; Ctrl-C keeps the best so far."""
    config = task.config
    most = SEARCH_ROWS if config.trials is None else TRIAL_ROWS
    if len(task.wanted) > most:
        best = pick_head(task.take(np.sort(np.random.default_rng(config.seed).permutation(len(task.wanted))[:most])))
        return best if best.history.interrupted else replace(_fit(task, best.spec, best.schedule), tried=best.tried)
    sets = [config.head_features] if config.head_features is not None else layer_sets(task.train.layout)
    settled = None not in (config.head_width, config.lr, config.weight_decay)  # only dropout would be left
    guesses = (FIRST_GUESS,) if settled else (FIRST_GUESS, *REFINEMENTS)
    first, *refinements = {task.plan((), guess): guess for guess in guesses}.values()  # each once
    tried: list[TrainedHead] = []
    with bar("trying heads", config.trials or len(sets) + len(sets[:2]) * len(refinements), "heads") as advance:

        def attempt(features: tuple[str, ...], guess: dict[str, float], hopeless: Hopeless) -> TrainedHead:
            tried.append(_fit(task, *task.plan(features, guess), hopeless))
            advance(1, f"best loss {best_of(tried).history.kept.validation_loss:.3f}")
            if tried[-1].history.interrupted:
                raise KeyboardInterrupt
            return tried[-1]

        def behind(number: int, epoch: Epoch) -> bool:
            if not tried or number + 1 not in PRUNE:
                return False
            lead = best_of(tried).history.epochs[: number + 1]
            return epoch.validation_loss > PRUNE[number + 1] * min(one.validation_loss for one in lead)

        try:
            if config.trials is not None:
                optuna_search(sets, task, attempt)
            else:
                rivals = [attempt(features, first, behind) for features in sets]
                for leader in sorted(rivals, key=lambda one: one.history.kept.validation_loss)[:2]:
                    for guess in refinements:
                        attempt(leader.features, guess, behind)
        except KeyboardInterrupt:
            if not tried:
                raise  # nothing to keep yet
            best = best_of(tried)
            return replace(best, history=replace(best.history, interrupted=True), tried=len(tried))
    return replace(best_of(tried), tried=len(tried))


def best_of(tried: Sequence[TrainedHead]) -> TrainedHead:
    """The head with the lowest validation loss (steadier than accuracy on small parts), the earliest of equals."""
    return min(tried, key=lambda one: one.history.kept.validation_loss)


def optuna_search(sets: Sequence[tuple[str, ...]], task: Task, attempt: Attempt) -> None:
    """Try `--trials` heads by optuna's TPE, weak ones stopped by successive halving (Li et al. 2018)."""
    try:
        import optuna
    except ImportError as error:
        raise InputError("--trials needs optuna. Install it with: pip install 'headstart[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=task.config.seed), pruner=pruner)
    study.enqueue_trial({"layers": len(sets) - 1, **FIRST_GUESS})

    def loss(trial: optuna.Trial) -> float:
        trial.suggest_categorical("width", (0, 64, 128, 256))
        trial.suggest_float("dropout", 0.0, 0.7)
        trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        trial.suggest_float("weight_decay", 1e-4, 10.0, log=True)
        features = sets[trial.suggest_int("layers", 0, len(sets) - 1)]

        def hopeless(number: int, epoch: Epoch) -> bool:
            trial.report(epoch.validation_loss, number + 1)
            return trial.should_prune()

        return attempt(features, trial.params, hopeless).history.kept.validation_loss

    study.optimize(loss, n_trials=task.config.trials)


def in_folds(task: Task, head: TrainedHead, groups: NDArray[np.int64]) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """(n, labels) logits of each training text from a `refit` that has not seen it, and (n,) its fold.

    Texts of one of the (n,) `groups`, such as copies, share a fold. The task's validation part is not used.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds, n, classes = task.config.folds or 5, len(task.wanted), strata(task.wanted.labels)
    if (least := int(np.unique(classes, return_counts=True)[1].min())) < folds:
        raise InputError(f"--folds {folds}: the rarest label has only {least} rows outside the test part.")
    logits = torch.empty(n, len(task.names))
    fold_of = np.empty_like(classes)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=task.config.seed)
    with bar("folds", folds, "folds") as advance:
        for number, (rest, held) in enumerate(splitter.split(np.empty((n, 1)), classes, groups)):
            fold = task.fold(rest, held)
            logits[torch.from_numpy(held)] = fold.held.mean(refit(fold, head).logits(fold.validation))
            fold_of[held] = number
            advance(1, "")
    return logits, fold_of


@one_thread()
def refit(task: Task, head: TrainedHead, keep: Keep = "last") -> TrainedHead:
    """A head like `head`, trained on all of the task's training texts for as many epochs as `head` was best after."""
    schedule = replace(head.schedule, epochs=head.history.best + 1, patience=None, keep=keep)
    return replace(_fit(task, head.spec, schedule), tried=head.tried)


def learning_curve(task: Task, head: TrainedHead) -> list[dict[str, Any]]:
    """Validation accuracy of heads like `head`, each trained on so many of the texts; the last is `head` itself."""
    order = np.random.default_rng(task.config.seed).permutation(len(task.wanted))
    parts = [task.take(np.sort(order[: min(round(share * len(order)), most)])) for share, most in CURVE]
    known = [part for part in parts if part.wanted.seen == task.wanted.seen]
    heads = [*((part, refit(part, head, "lowest loss")) for part in known), (task, head)]
    return [{"texts": len(of.wanted), "validation_accuracy": one.history.kept.validation_accuracy} for of, one in heads]
