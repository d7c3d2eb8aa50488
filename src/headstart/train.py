"""The one training loop: over batches of anything a model takes, stored features or tokens.

This room knows torch's optimisers. It knows nothing of tables, of files, or what the inputs mean.
"""

import contextlib
import math
import re
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
from torch.optim.adamw import adamw

from headstart.checkpoints import Checkpoints
from headstart.config import ClassWeight
from headstart.engine import side_by_side
from headstart.errors import InputError, TerminatedError
from headstart.progress import bar

Validate = Callable[[nn.Module], tuple[float, float]]  # mean loss and accuracy, after each epoch, in eval mode
Keep = Literal["lowest loss", "most accurate", "last"]  # the epoch, on validation data, whose weights are kept
Part = tuple[Sequence[torch.Tensor], torch.Tensor]  # what a model is called with, and (texts,) labels

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter, as torch names it
OUT_OF_MEMORY = re.compile(r"(?i)out ?of ?memory|can.t allocate memory|memoryerror")  # as torch's devices say it


class Batches(Protocol):
    """What the loop trains on."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        """Batches from the `start`-th on, in an order of the seed and `number`; parts are computed side by side."""


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

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        """Shuffled batches of one part."""
        for index in shuffled(len(self.labels), self.seed, number).split(self.batch_size)[start:]:
            yield (((self.values[index],), self.labels[index]),)


def shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    """(n,) indexes in the order of an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + epoch))


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train: most epochs, AdamW's settings, the largest gradient norm.

    Training stops after `patience` epochs without a better one (None: never), after `max_steps`, or at the `deadline`,
    a `time.monotonic()`. The learning rate is constant, or, with `warmup`, rises over that share of all steps and falls
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
    max_steps: int | None = None

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
    """All epochs, which one's weights were kept (counted from 0), steps taken, and whether Ctrl-C ended it."""

    epochs: tuple[Epoch, ...]
    best: int
    steps: int = 0
    interrupted: bool = False


@dataclass
class Position:
    """Where training is: `done` steps of an `epoch`, `steps` in all, the epoch's losses, records, the best's weights.

    `halvings` is how often the parts of a batch were cut in two, since memory ran out.
    """

    best_state: dict[str, torch.Tensor]
    epoch: int = 0
    done: int = 0
    steps: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    records: list[Epoch] = field(default_factory=list)
    best: int = 0
    halvings: int = 0


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
    label: str | None = None,
) -> History:
    """Train what requires gradients of `model`, which gives (batch, classes) logits, with AdamW on cross-entropy.

    It is left with the weights of its best epoch. A batch's loss is the mean weighted by the (classes,) `weights`;
    cross-entropy is LogSoftmax and then negative log likelihood, so heads that end in LogSoftmax train as others do.
    `on_epoch` is called with an epoch's number and record, and returns whether to stop. Ctrl-C cuts an epoch short and
    keeps the best so far; it is passed on if there is none. `label` names a bar of steps.

    `checkpoints` are written when due, at each epoch's end, and on SIGTERM, which then raises a `TerminatedError`; the
    newest is resumed from, and training ends in the same bytes, since all that is random is a function of the seed and
    the epoch. Where memory runs out, batches are computed in smaller pieces; an `InputError` if one text is too much.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters, optimizer = list(named.values()), AdamW(named, schedule)
    found = checkpoints.newest() if checkpoints is not None else None
    at = Position(_copies(named)) if found is None else _restore(*found, named, optimizer)
    announce: Callable[[str], None] = checkpoints.announce if checkpoints is not None else lambda _: None
    steps, interrupted, stop = schedule.epochs * len(batches), False, False
    with termination() as terminated, bar(label, steps, "steps") as advance:
        advance(at.steps, "")

        def after_step(*, epoch_ended: bool = False) -> None:
            ending = terminated.is_set()
            due = epoch_ended or (at.done < len(batches) and (ending or checkpoints is None or checkpoints.due()))
            if checkpoints is not None and due:
                checkpoints.save(at.steps, *_state(at, named, optimizer))
            if ending and due:
                kept = "a checkpoint was written; --resume goes on from it" if checkpoints else "nothing was kept"
                raise TerminatedError(f"SIGTERM: training was ended; {kept}.")

        def is_over() -> bool:
            return time.monotonic() > schedule.deadline or at.steps >= (schedule.max_steps or math.inf)

        def one_epoch() -> None:  # its steps that are not done yet
            model.train()
            for parts in batches.epoch(at.epoch, at.done):
                at.losses.append(_gradients(model, parts, weights, parameters, at, announce))
                nn.utils.clip_grad_norm_(parameters, schedule.clip_norm, foreach=True)
                optimizer.step(schedule.lr_at(at.steps, steps))
                at.done, at.steps = at.done + 1, at.steps + 1
                advance(1, at.records[-1].words() if at.records else "")
                after_step()
                if is_over():
                    return

        while at.epoch < schedule.epochs and not stop:
            if schedule.patience is not None and at.epoch - 1 - at.best >= schedule.patience:
                break
            started = time.perf_counter()
            try:
                try:
                    one_epoch()
                except KeyboardInterrupt:
                    if not at.done:
                        raise
                    interrupted = True
                model.eval()
                with torch.inference_mode():
                    held = validate(model)
                record = Epoch(float(torch.stack(at.losses).mean()), *held, time.perf_counter() - started)
                if not at.records or schedule.prefers(record, at.records[at.best]):
                    at.best, at.best_state = at.epoch, _copies(named)
                at.records.append(record)
                stop = on_epoch(at.epoch, record) or interrupted or is_over()
                at.epoch, at.done, at.losses = at.epoch + 1, 0, []
                if not stop:
                    after_step(epoch_ended=True)
            except KeyboardInterrupt:
                if not at.records:
                    raise  # nothing to keep yet
                interrupted = stop = True
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(at.best_state[name])
    model.eval()
    return History(tuple(at.records), at.best, at.steps, interrupted)


class AdamW:
    """Torch's fused AdamW (Loshchilov and Hutter 2019), its defaults, as a function of what it remembers.

    The class of that name imports torch's compiler when one is made, which takes a second.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], schedule: Schedule) -> None:
        self.named = named
        self.state = {
            name: dict(zip(ADAM, (one.new_zeros(()), torch.zeros_like(one), torch.zeros_like(one)), strict=True))
            for name, one in named.items()
        }
        groups: dict[float, list[str]] = {}
        for name, parameter in named.items():
            decayed = schedule.warmup is None or (parameter.ndim > 1 and "embeddings" not in name)
            groups.setdefault(schedule.weight_decay if decayed else 0.0, []).append(name)
        self.groups = groups

    def step(self, lr: float) -> None:
        """Change every parameter that has a gradient."""
        same = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False, "fused": True}
        for decay, names in self.groups.items():
            given = {name: one for name in names if (one := self.named[name]).grad is not None}
            steps, means, squares = ([self.state[name][part] for name in given] for part in ADAM)
            gradients = [one.grad for one in given.values()]
            with torch.no_grad():
                adamw(list(given.values()), gradients, means, squares, [], steps, lr=lr, weight_decay=decay, **same)


def _gradients(
    model: nn.Module,
    parts: Sequence[Part],
    weights: torch.Tensor,
    parameters: Sequence[nn.Parameter],
    at: Position,
    announce: Callable[[str], None],
) -> torch.Tensor:
    """Set the gradients of a batch's loss and return it, in pieces that fit the memory."""
    while True:
        for parameter in parameters:
            parameter.grad = None
        pieces = parts
        for _ in range(at.halvings):
            pieces = [half for part in pieces for half in _halves(part)]
        try:
            return _backward(model, pieces, weights, parameters)
        except (RuntimeError, MemoryError) as error:
            if not OUT_OF_MEMORY.search(f"{type(error).__name__} {error}"):
                raise
            if all(len(labels) == 1 for _, labels in pieces):
                hint = "Thaw fewer layers (--thaw K), or cut texts shorter (--max-length)."
                raise InputError(f"Memory runs out even with one text at a time. {hint}") from error
        at.halvings += 1  # outside the handler, whose traceback holds on to what filled the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        announce(f"Memory ran out: each batch is now computed in {2**at.halvings} times as many pieces.")


def _halves(part: Part) -> list[Part]:
    inputs, labels = part
    size = -(-len(labels) // 2)
    return list(zip(zip(*(one.split(size) for one in inputs), strict=True), labels.split(size), strict=True))


def _backward(
    model: nn.Module, parts: Sequence[Part], weights: torch.Tensor, parameters: Sequence[nn.Parameter]
) -> torch.Tensor:
    """Set the gradients of a batch's loss and return it; parts are computed side by side, their gradients summed."""
    if len(parts) == 1:
        loss = _loss(model, parts[0], weights)
        loss.backward()
        return loss.detach()
    shares = torch.stack([weights[labels].sum() for _, labels in parts])
    shares = shares / shares.sum()

    def gradients(number: int) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        loss = _loss(model, parts[number], weights) * float(shares[number])
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    on_cpu = parameters[0].device.type == "cpu"  # of other devices each has its own queue, and they wait for nothing
    total = torch.zeros((), device=parameters[0].device)
    for loss, found in (side_by_side if on_cpu else map)(gradients, range(len(parts))):
        total += loss.to(total.device)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return total


def _loss(model: nn.Module, part: Part, weights: torch.Tensor) -> torch.Tensor:
    inputs, labels = part
    half = inputs[0].dtype == torch.bfloat16
    with torch.autocast(labels.device.type, torch.bfloat16) if half else contextlib.nullcontext():
        logits = model(*inputs).float()
    where = logits.device
    return nn.functional.cross_entropy(logits, labels.to(where), weight=weights.to(where))


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
    at: Position, named: Mapping[str, nn.Parameter], optimizer: AdamW
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything that the rest of the training depends on, as tensors and as JSON."""
    tensors = {f"now.{name}": parameter.detach() for name, parameter in named.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in at.best_state.items()}
    tensors |= {f"{part}.{name}": one for name, parts in optimizer.state.items() for part, one in parts.items()}
    state = {name: getattr(at, name) for name in ("epoch", "done", "steps", "best", "halvings")}
    state |= {"losses": [float(loss) for loss in at.losses], "records": [asdict(record) for record in at.records]}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, state


def _restore(
    tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], named: Mapping[str, nn.Parameter], optimizer: AdamW
) -> Position:
    for name, parameter in named.items():
        parameter.data.copy_(tensors[f"now.{name}"])
        for part, remembered in optimizer.state[name].items():
            remembered.copy_(tensors[f"{part}.{name}"])
    best = {name: tensors[f"best.{name}"].to(parameter.device) for name, parameter in named.items()}
    device = next(iter(best.values())).device
    lists = {"losses": [torch.tensor(loss, device=device) for loss in state["losses"]]}
    return Position(best, **{**state, **lists, "records": [Epoch(**one) for one in state["records"]]})
