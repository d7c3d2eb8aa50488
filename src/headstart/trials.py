"""Training heads on stored features: the architecture's own, one as given, or the best of a few dozen.

A trial on stored features costs a fraction of a second, so the default head is searched: first the sets of layers,
then the other settings on the two best sets. The lowest validation loss wins, which is steadier than accuracy on
small validation parts. This room knows heads and the loop; it knows nothing of files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.config import TrainConfig
from headstart.encoder import Encoder
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
PRUNE_AFTER, PRUNE_MARGIN = 3, 1.03
"""A trial is stopped at this epoch if its validation loss is over the best trial's by then, times the margin."""


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
    """The head that the settings ask for, trained: native, as given by a recipe, or the best of a few dozen."""
    config = task.config
    if config.head != "native" and config.recipe != "article":
        return pick_head(task)
    with bar("training", config.epochs, "epochs") as advance:

        def show(number: int, epoch: Epoch) -> bool:
            losses = f"loss {epoch.train_loss:.3f}, validation {epoch.validation_loss:.3f}"
            advance(1, f"{losses} ({epoch.validation_accuracy:.3f})")
            return False

        if config.head == "native":
            head = NativeHead(native_model(task.encoder, task.names, config.seed))
            return _fit(task, head, (native_feature(task.encoder),), None, task.schedule(), show)
        spec = HeadSpec(
            config.head_features or ("pooler",), config.head_width or 0, config.head_dropout, standardize=False
        )
        return _fit(task, _fresh(task, spec), spec.features, spec, task.schedule(), show)


def _fresh(task: Task, spec: HeadSpec) -> nn.Module:
    inputs = head_inputs(task.encoder, task.train, spec.features)
    return new_head(inputs, spec, len(task.names), task.config.seed)


def _fit(
    task: Task,
    head: nn.Module,
    features: tuple[str, ...],
    spec: HeadSpec | None,
    schedule: Schedule,
    on_epoch: Callable[[int, Epoch], bool],
) -> TrainedHead:
    inputs = head_inputs(task.encoder, task.train, features)
    held = head_inputs(task.encoder, task.validation, features)
    weights = class_weights(task.train_labels, len(task.names), task.config.class_weight)
    truth = torch.from_numpy(task.validation_labels)

    def validate(model: nn.Module) -> tuple[float, float]:
        logits = torch.cat([model(part) for part in held.split(8192)])
        loss = nn.functional.cross_entropy(logits, truth, weight=weights)
        return float(loss), float((logits.argmax(dim=1) == truth).float().mean())

    batches = FeatureBatches(inputs, torch.from_numpy(task.train_labels), task.config.batch_size, task.config.seed)
    history = fit(head, batches, validate, schedule, weights, on_epoch)
    return TrainedHead(task.encoder, head, features, spec, schedule, history)


def layer_sets(layout: Sequence[str]) -> list[tuple[str, ...]]:
    """Sets of stored features worth trying: each upper layer's mean, runs of neighbouring layers, everything."""
    means = [name for name in layout if name.startswith("mean-")]
    sets: list[tuple[str, ...]] = [(name,) for name in means[len(means) // 2 :]]
    for size in (2, 3, 4):
        sets += [tuple(means[end - size : end]) for end in (len(means), len(means) - 1) if end >= size]
    return list(dict.fromkeys([*sets, tuple(means), tuple(layout)]))


def pick_head(task: Task) -> TrainedHead:
    """Try a few dozen pooled heads and return the one with the lowest validation loss.

    What the person has set (learning rate, layers, width, …) is kept; the rest is searched. Ctrl-C keeps the best
    so far.
    """
    config = task.config
    sets = [config.head_features] if config.head_features is not None else layer_sets(task.train.layout)
    fixed = {
        name: value
        for name, value in (("width", config.head_width), ("lr", config.lr), ("weight_decay", config.weight_decay))
        if value is not None
    }
    guesses = [{**FIRST_GUESS, **change, **fixed} for change in ({}, *REFINEMENTS)]
    first, *refinements = [guess for i, guess in enumerate(guesses) if guess not in guesses[:i]]
    tried: list[TrainedHead] = []

    def attempt(features: tuple[str, ...], guess: dict[str, float]) -> TrainedHead:
        lead = best_of(tried).history.epochs[:PRUNE_AFTER] if tried else ()
        hopeless = PRUNE_MARGIN * min((epoch.validation_loss for epoch in lead), default=float("inf"))

        def behind(number: int, epoch: Epoch) -> bool:
            return number + 1 == PRUNE_AFTER and epoch.validation_loss > hopeless

        spec = HeadSpec(features, int(guess["width"]), guess["dropout"])
        schedule = task.schedule(guess["lr"], guess["weight_decay"])
        return _fit(task, _fresh(task, spec), features, spec, schedule, behind)

    def candidates() -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
        for features in sets:
            yield features, first
        for leader in sorted(tried, key=lambda one: one.validation_loss)[:2]:
            for guess in refinements:
                yield leader.features, guess

    interrupted = False
    with bar("trying heads", len(sets) + min(2, len(sets)) * len(refinements), "heads") as advance:
        try:
            for features, guess in candidates():
                tried.append(attempt(features, guess))
                advance(1, f"best loss {best_of(tried).validation_loss:.3f}")
                if tried[-1].history.interrupted:
                    break
        except KeyboardInterrupt:
            if not tried:
                raise  # nothing to keep yet
            interrupted = True
    best = best_of(tried)
    interrupted = interrupted or tried[-1].history.interrupted
    return replace(best, history=replace(best.history, interrupted=interrupted), tried=len(tried))


def best_of(tried: Sequence[TrainedHead]) -> TrainedHead:
    """The head with the lowest validation loss, the earliest of equals."""
    return min(tried, key=lambda one: one.validation_loss)
