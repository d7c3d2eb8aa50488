"""Picking the default head on validation data: layers, width, learning rate, weight decay.

With stored features a trial costs a fraction of a second, so a few dozen are tried: first the sets of layers, then
the other settings on the two best sets. The lowest validation loss wins, which is steadier than accuracy on small
validation parts. This room knows heads and the loop; it knows nothing of files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.config import TrainConfig
from headstart.encoder import Encoder
from headstart.features import Features
from headstart.model import HeadSpec, head_inputs, new_head
from headstart.progress import bar
from headstart.train import Epoch, FeatureBatches, History, Schedule, fit

REFINEMENTS: tuple[dict[str, float], ...] = (
    {"lr": 3e-4},
    {"lr": 3e-4, "width": 256},
    {"width": 64, "dropout": 0.2},
    {"width": 256, "dropout": 0.2},
    {"width": 0, "weight_decay": 1.0},
    {"width": 0, "weight_decay": 0.01},
    {"weight_decay": 1.0},
)
FIRST_GUESS = {"width": 128, "dropout": 0.5, "lr": 1e-3, "weight_decay": 0.01}
PRUNE_AFTER, PRUNE_MARGIN = 3, 1.03
"""A trial is stopped at this epoch if its validation loss is over the best trial's by then, times the margin."""


@dataclass(frozen=True)
class Part:
    """Stored features of one part of the data, and its labels."""

    features: Features
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Trial:
    """One trained head.

    Attributes:
        spec: its shape.
        lr: its learning rate.
        weight_decay: its weight decay.
        history: what training it was like.
        head: with the weights of its best epoch.
    """

    spec: HeadSpec
    lr: float
    weight_decay: float
    history: History
    head: nn.Module

    @property
    def validation_loss(self) -> float:
        """Of the epoch kept."""
        return self.history.epochs[self.history.best].validation_loss


def layer_sets(layout: Sequence[str]) -> list[tuple[str, ...]]:
    """Sets of stored features worth trying: each upper layer's mean, runs of neighbouring layers, everything."""
    means = [name for name in layout if name.startswith("mean-")]
    upper = means[len(means) // 2 :]
    sets: list[tuple[str, ...]] = [(name,) for name in upper]
    for size in (2, 3, 4):
        sets += [tuple(means[end - size : end]) for end in (len(means), len(means) - 1) if end >= size]
    sets += [tuple(means), tuple(layout)]
    return list(dict.fromkeys(sets))


def scorer(
    inputs: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> Callable[[nn.Module], tuple[float, float]]:
    """A `Validate` on stored features: the weighted mean loss and the plain accuracy."""

    def validate(model: nn.Module) -> tuple[float, float]:
        logits = torch.cat([model(part) for part in inputs.split(8192)])
        loss = nn.functional.cross_entropy(logits, labels, weight=weights)
        return float(loss), float((logits.argmax(dim=1) == labels).float().mean())

    return validate


def train_head(
    model: nn.Module,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    schedule: Schedule,
    weights: torch.Tensor,
    config: TrainConfig,
    on_epoch: Callable[[int, Epoch], bool] = lambda number, epoch: False,
) -> History:
    """Train any head on stored features: (inputs, labels) to learn from and to validate on."""
    batches = FeatureBatches(*train, batch_size=config.batch_size, seed=config.seed)
    return fit(model, batches, scorer(*validation, weights), schedule, weights, on_epoch)


def pick_head(
    encoder: Encoder, train: Part, validation: Part, labels: int, weights: torch.Tensor, config: TrainConfig
) -> tuple[Trial, int]:
    """Try a few dozen heads and return the best one and how many were tried.

    What the person has set (`--lr`, layers, width, …) is kept; the rest is searched.

    Args:
        encoder: that the features came from.
        train: to learn from.
        validation: to choose on.
        labels: how many there are.
        weights: (labels,) in the loss.
        config: the run's settings.
    """
    sets = [config.head_features] if config.head_features is not None else layer_sets(train.features.layout)
    fixed = {
        name: value
        for name, value in (("width", config.head_width), ("lr", config.lr), ("weight_decay", config.weight_decay))
        if value is not None
    }
    first = {**FIRST_GUESS, **fixed}
    refinements: list[dict[str, float]] = []
    for change in REFINEMENTS:
        guess = {**first, **change, **fixed}
        if guess != first and guess not in refinements:
            refinements.append(guess)
    targets = torch.from_numpy(train.labels), torch.from_numpy(validation.labels)
    tried: list[Trial] = []

    def attempt(names: tuple[str, ...], guess: dict[str, float]) -> Trial:
        spec = HeadSpec(names, int(guess["width"]), guess["dropout"])
        inputs = head_inputs(encoder, train.features, names)
        held = head_inputs(encoder, validation.features, names)
        head = new_head(inputs, spec, labels, config.seed)
        lead = best_of(tried).history.epochs[:PRUNE_AFTER] if tried else ()

        def behind(number: int, epoch: Epoch) -> bool:
            return (
                number + 1 == PRUNE_AFTER
                and bool(lead)
                and epoch.validation_loss > PRUNE_MARGIN * min(one.validation_loss for one in lead)
            )

        schedule = Schedule(config.epochs, guess["lr"], guess["weight_decay"], config.clip_norm, config.patience)
        history = train_head(head, (inputs, targets[0]), (held, targets[1]), schedule, weights, config, behind)
        return Trial(spec, guess["lr"], guess["weight_decay"], history, head)

    def candidates() -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
        for names in sets:
            yield names, first
        for leader in sorted(tried, key=lambda trial: trial.validation_loss)[:2]:
            for guess in refinements:
                yield leader.spec.features, guess

    with bar("trying heads", len(sets) + min(2, len(sets)) * len(refinements), "heads") as advance:
        for names, guess in candidates():
            try:
                tried.append(attempt(names, guess))
            except KeyboardInterrupt:
                if not tried:
                    raise  # nothing to keep yet
                best = best_of(tried)
                return replace(best, history=replace(best.history, interrupted=True)), len(tried)
            advance(1, f"best loss {best_of(tried).validation_loss:.3f}")
            if tried[-1].history.interrupted:
                break
    return best_of(tried), len(tried)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest validation loss, the earliest of equals."""
    return min(trials, key=lambda trial: trial.validation_loss)
