"""The one training loop: over batches of anything a model takes, stored features or tokens.

This room knows torch's optimisers. It knows nothing of files, tables, or what the inputs mean.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.config import ClassWeight

Validate = Callable[[nn.Module], tuple[float, float]]
"""Called after each epoch with the model in eval mode; returns the mean loss and the accuracy."""

Keep = Literal["best", "last"]
"""Whose weights a model is left with: those of the epoch with the lowest validation loss, or of the last one."""


class Batches(Protocol):
    """What the loop trains on."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, number: int) -> Iterator[tuple[Any, torch.Tensor]]:
        """Pairs of model inputs and (batch,) labels, in an order that depends on the seed and `number` alone."""


@dataclass(frozen=True)
class FeatureBatches:
    """Batches of stored features, (n, d) `values` and (n,) `labels`; the last of an epoch may be smaller.

    Values are fp32, or bf16: then a model's products are in bf16 too, and its weights stay fp32. The seed and the
    epoch's number decide the order.
    """

    values: torch.Tensor
    labels: torch.Tensor
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled batches."""
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        order = torch.randperm(len(self.labels), generator=generator)
        for index in order.split(self.batch_size):
            yield self.values[index], self.labels[index]


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train: most epochs, AdamW's settings, the largest gradient norm.

    Training stops after `patience` epochs without a lower validation loss (None: never).
    """

    epochs: int
    lr: float
    weight_decay: float
    clip_norm: float = 1.0
    patience: int | None = None
    keep: Keep = "best"


@dataclass(frozen=True)
class Epoch:
    """One epoch's record; losses are class-weighted means, seconds are wall seconds."""

    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class History:
    """All epochs, which one's weights were kept (counted from 0), and whether Ctrl-C ended it."""

    epochs: tuple[Epoch, ...]
    best: int
    interrupted: bool = False


def class_weights(labels: NDArray[np.int64], classes: int, kind: ClassWeight) -> torch.Tensor:
    """(classes,) fp32 weights in the loss; `balanced` is scikit-learn's n / (classes * count).

    A class without rows (possible where a split was given) weighs 1: it is never a target.
    """
    if kind == "none":
        return torch.ones(classes)
    counts = np.bincount(labels, minlength=classes)
    balanced = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts, balanced, 1.0)).float()


def fit(
    model: nn.Module,
    batches: Batches,
    validate: Validate,
    schedule: Schedule,
    weights: torch.Tensor,
    on_epoch: Callable[[int, Epoch], bool] = lambda number, epoch: False,
) -> History:
    """Train `model` with AdamW on cross-entropy and leave it with the weights of its best epoch (or its last).

    Best is the lowest validation loss. Cross-entropy is LogSoftmax followed by the negative log likelihood, so a
    head that ends in LogSoftmax and one that gives logits train alike. The loss of a batch is the mean weighted
    by `weights`.

    Args:
        model: gives (batch, classes) logits; its parameters that require gradients are trained.
        batches: see `Batches`.
        validate: see `Validate`.
        schedule: see `Schedule`.
        weights: (classes,) weights in the loss.
        on_epoch: called after each epoch with its number and record; training stops when it returns true.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    loss_of = nn.CrossEntropyLoss(weight=weights)
    epochs: list[Epoch] = []
    best = 0
    best_state = copy.deepcopy(model.state_dict())
    interrupted = False
    for number in range(schedule.epochs):
        started = time.perf_counter()
        try:
            train_loss = _one_epoch(model, batches.epoch(number), optimizer, loss_of, schedule.clip_norm)
            model.eval()
            with torch.inference_mode():
                validation_loss, accuracy = validate(model)
            record = Epoch(train_loss, validation_loss, accuracy, time.perf_counter() - started)
            better = not epochs or validation_loss < epochs[best].validation_loss or schedule.keep == "last"
            if better:
                best_state = copy.deepcopy(model.state_dict())
            epochs.append(record)
            best = number if better else best
            stop = on_epoch(number, epochs[-1])
        except KeyboardInterrupt:
            if not epochs:
                raise  # nothing to keep yet
            interrupted = True
            break
        if stop or (schedule.patience is not None and number - best >= schedule.patience):
            break
    model.load_state_dict(best_state)
    model.eval()
    return History(tuple(epochs), best, interrupted)


def _one_epoch(
    model: nn.Module,
    batches: Iterator[tuple[Any, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_of: nn.Module,
    clip_norm: float,
) -> float:
    model.train()
    losses = []
    parameters = optimizer.param_groups[0]["params"]
    for inputs, labels in batches:
        half = isinstance(inputs, torch.Tensor) and inputs.dtype == torch.bfloat16
        with torch.autocast(labels.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            logits = model(inputs)
        loss = loss_of(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())
