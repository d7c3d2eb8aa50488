"""The one training loop: over batches of anything a model takes, stored features or tokens.

This room knows torch's optimisers. It knows nothing of tables, of files, or what the inputs mean.
"""

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.checkpoints import Checkpoints
from headstart.config import ClassWeight
from headstart.engine import side_by_side
from headstart.errors import TerminatedError

Validate = Callable[[nn.Module], tuple[float, float]]  # mean loss and accuracy, after each epoch, in eval mode
Keep = Literal["lowest loss", "most accurate", "last"]  # the epoch, on validation data, whose weights are kept
Part = tuple[Any, torch.Tensor]  # model inputs and their (texts,) labels


class Batches(Protocol):
    """What the loop trains on."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, number: int) -> Iterator[Sequence[Part]]:
        """Batches in an order that depends on the seed and `number` alone; their parts are computed side by side."""


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

    def epoch(self, number: int) -> Iterator[Sequence[Part]]:
        """Shuffled batches of one part."""
        for index in shuffled(len(self.labels), self.seed, number).split(self.batch_size):
            yield ((self.values[index], self.labels[index]),)


def shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    """(n,) indexes in the order of an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + epoch))


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train: most epochs, AdamW's settings, the largest gradient norm.

    Training stops after `patience` epochs without a better one (None: never), or at the `deadline`, a
    `time.monotonic()`. The learning rate is constant, or, with `warmup`, rises over that share of all steps and falls
    to 0 in a straight line; weights that are no matrices, and embeddings, are then not decayed.
    """

    epochs: int
    lr: float
    weight_decay: float
    clip_norm: float = 1.0
    patience: int | None = None
    keep: Keep = "lowest loss"
    warmup: float | None = None
    deadline: float = math.inf

    def prefers(self, one: "Epoch", other: "Epoch") -> bool:
        """Whether an epoch is to be kept rather than an earlier one."""
        if self.keep == "most accurate":
            return (one.validation_accuracy, -one.validation_loss) > (other.validation_accuracy, -other.validation_loss)
        return self.keep == "last" or one.validation_loss < other.validation_loss

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of one step, counted from 0."""
        if self.warmup is None:
            return self.lr
        rising = math.ceil(self.warmup * steps)
        return self.lr * min((step + 1) / max(1, rising), (steps - step) / max(1, steps - rising))


@dataclass(frozen=True)
class Epoch:
    """One epoch's record; losses are class-weighted means, seconds are wall seconds."""

    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float

    def words(self) -> str:
        """As a progress bar shows it."""
        losses = f"loss {self.train_loss:.3f}, validation {self.validation_loss:.3f}"
        return f"{losses} ({self.validation_accuracy:.3f})"


@dataclass(frozen=True)
class History:
    """All epochs, which one's weights were kept (counted from 0), and whether Ctrl-C ended it."""

    epochs: tuple[Epoch, ...]
    best: int
    interrupted: bool = False


@dataclass
class Position:
    """Where training is: `done` steps of an `epoch`, their losses, the records so far, and the best epoch's weights."""

    best_state: dict[str, torch.Tensor]
    epoch: int = 0
    done: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    records: list[Epoch] = field(default_factory=list)
    best: int = 0


def class_weights(labels: NDArray[np.int64], classes: int, kind: ClassWeight) -> torch.Tensor:
    """(classes,) fp32 weights in the loss; `balanced` is scikit-learn's n / (classes * count).

    A class without rows (possible where a split was given) weighs 1: it is never a target.
    """
    if kind == "none":
        return torch.ones(classes)
    counts = np.bincount(labels, minlength=classes)
    balanced = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts, balanced, 1.0)).float()


def loss_and_accuracy(logits: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Class-weighted mean cross-entropy of (n, classes) logits, and the share of them that are right."""
    loss = nn.functional.cross_entropy(logits, truth, weight=weights)
    return float(loss), float((logits.argmax(dim=1) == truth).float().mean())


def fit(
    model: nn.Module,
    batches: Batches,
    validate: Validate,
    schedule: Schedule,
    weights: torch.Tensor,
    on_epoch: Callable[[int, Epoch], bool] = lambda number, epoch: False,
    checkpoints: Checkpoints | None = None,
) -> History:
    """Train what requires gradients of `model`, which gives (batch, classes) logits, with AdamW on cross-entropy.

    It is left with the weights of its best epoch, or its last. The loss of a batch is the mean weighted by the
    (classes,) `weights`; cross-entropy is LogSoftmax followed by the negative log likelihood, so a head that ends in
    LogSoftmax and one that gives logits train alike. `on_epoch` is called after each epoch with its number and record;
    training stops when it returns true. `checkpoints` are written when due, at each epoch's end, and on SIGTERM, which
    then raises a `TerminatedError`; the newest is resumed from. A run that is killed and resumed ends in the same
    bytes, since all that is random is a function of the seed and the epoch.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = _optimizer(named, schedule)
    found = checkpoints.newest() if checkpoints is not None else None
    at = Position(_copies(named)) if found is None else _restore(*found, named, optimizer)
    loss_of = nn.CrossEntropyLoss(weight=weights)
    interrupted = stop = False
    with termination() as terminated:

        def after_step(*, epoch_ended: bool = False) -> None:
            ending = terminated.is_set()
            if checkpoints is not None and (epoch_ended or ending or checkpoints.due()):
                checkpoints.save(at.epoch * len(batches) + at.done, *_state(at, named, optimizer))
            if ending:
                kept = "a checkpoint was written; --resume goes on from it" if checkpoints else "nothing was kept"
                raise TerminatedError(f"SIGTERM: training was ended; {kept}.")

        while at.epoch < schedule.epochs and not stop:
            if schedule.patience is not None and at.epoch - 1 - at.best >= schedule.patience:
                break
            started = time.perf_counter()
            try:
                _one_epoch(model, batches, optimizer, loss_of, schedule, at, after_step)
                model.eval()
                with torch.inference_mode():
                    held = validate(model)
                record = Epoch(float(torch.stack(at.losses).mean()), *held, time.perf_counter() - started)
                if not at.records or schedule.prefers(record, at.records[at.best]):
                    at.best, at.best_state = at.epoch, _copies(named)
                at.records.append(record)
                stop = on_epoch(at.epoch, record) or time.monotonic() > schedule.deadline
                at.epoch, at.done, at.losses = at.epoch + 1, 0, []
            except KeyboardInterrupt:
                if not at.records:
                    raise  # nothing to keep yet
                interrupted = True
                break
            after_step(epoch_ended=True)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(at.best_state[name])
    model.eval()
    return History(tuple(at.records), at.best, interrupted)


def _optimizer(named: Mapping[str, nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decayed = schedule.warmup is None or (parameter.ndim > 1 and "embeddings" not in name)
        groups.setdefault(schedule.weight_decay if decayed else 0.0, []).append(parameter)
    settings = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    return torch.optim.AdamW(settings, lr=schedule.lr, fused=True)


def _one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    loss_of: nn.CrossEntropyLoss,
    schedule: Schedule,
    at: Position,
    after_step: Callable[[], None],
) -> None:
    """The steps of an epoch that are not done yet, up to the deadline."""
    model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parts in itertools.islice(batches.epoch(at.epoch), at.done, None):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(at.epoch * len(batches) + at.done, schedule.epochs * len(batches))
        optimizer.zero_grad()
        at.losses.append(_backward(model, parts, loss_of, parameters))
        nn.utils.clip_grad_norm_(parameters, schedule.clip_norm, foreach=True)
        optimizer.step()
        at.done += 1
        after_step()
        if time.monotonic() > schedule.deadline:
            break


def _backward(
    model: nn.Module, parts: Sequence[Part], loss_of: nn.CrossEntropyLoss, parameters: Sequence[nn.Parameter]
) -> torch.Tensor:
    """Set the gradients of a batch's loss and return it; parts are computed side by side, their gradients summed."""
    if len(parts) == 1:
        loss = _loss(model, parts[0], loss_of)
        loss.backward()
        return loss.detach()
    shares = torch.stack([loss_of.weight[labels].sum() for _, labels in parts])
    shares = shares / shares.sum()

    def gradients(number: int) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        loss = _loss(model, parts[number], loss_of) * shares[number]
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    total = torch.zeros(())
    for loss, found in side_by_side(gradients, range(len(parts))):
        total += loss.cpu()
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return total


def _loss(model: nn.Module, part: Part, loss_of: nn.Module) -> torch.Tensor:
    inputs, labels = part
    half = isinstance(inputs, torch.Tensor) and inputs.dtype == torch.bfloat16
    with torch.autocast(labels.device.type, torch.bfloat16) if half else contextlib.nullcontext():
        logits = model(inputs)
    return loss_of(logits.float(), labels)


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """Set when SIGTERM comes during the block, if this is the main thread: only that may set handlers."""
    event, here = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set()) if here else None
    try:
        yield event
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def _copies(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def _state(
    at: Position, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything that the rest of the training depends on, as tensors and as JSON."""
    tensors = {f"now.{name}": parameter.detach() for name, parameter in named.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in at.best_state.items()}
    for name, parameter in named.items():
        tensors |= {f"{part}.{name}": tensor for part, tensor in optimizer.state.get(parameter, {}).items()}
    state = {"epoch": at.epoch, "done": at.done, "best": at.best, "losses": [float(loss) for loss in at.losses]}
    state["records"] = [asdict(record) for record in at.records]
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, state


def _restore(
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Position:
    best = {}
    for name, parameter in named.items():
        found = {part: tensors[key].to(parameter.device) for part in ADAM if (key := f"{part}.{name}") in tensors}
        parameter.data.copy_(tensors[f"now.{name}"])
        best[name] = tensors[f"best.{name}"].to(parameter.device)
        if found:
            optimizer.state[parameter] = found
    records, losses = [Epoch(**one) for one in state["records"]], [torch.tensor(loss) for loss in state["losses"]]
    return Position(best, state["epoch"], state["done"], losses, records, state["best"])


ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
