"""The one training loop: over batches of anything a model takes, stored features or tokens.

This room knows torch's optimisers. It knows nothing of tables, of files, or what the inputs mean.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim.adamw import adamw

from headstart.checkpoints import Checkpoints
from headstart.engine import side_by_side
from headstart.errors import InputError, TerminatedError, UnevenError
from headstart.interrupts import termination, undisturbed
from headstart.peers import add_up, seat
from headstart.progress import bar
from headstart.targets import weighted_loss

Validate = Callable[[nn.Module], tuple[float, float]]  # mean loss and accuracy, after each epoch, in eval mode
Keep = Literal["lowest loss", "most accurate", "last"]  # the epoch, on validation data, whose weights are kept
# What a model is called with; (n,) label indexes, or (n, labels) of 0 and 1; and what each counts in the loss.
Part = tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter beside its steps, as torch names it
OUT_OF_MEMORY = re.compile(r"(?i)out ?of ?memory|can.t allocate memory|memoryerror")  # as torch's devices say it


class Batches(Protocol):
    """What the loop trains on."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        """Batches from the `start`-th on, in an order of the seed and `number`; parts are computed side by side."""


@dataclass(frozen=True)
class FeatureBatches:
    """Batches of stored features, (n, d) `values`, `labels` and their `weights`; the last of an epoch may be smaller.

    Values are fp32, or bf16: then a model's products are in bf16 too, and its weights stay fp32. The seed and the
    epoch's number decide the order.
    """

    values: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        """Shuffled batches of one part."""
        for index in shuffled(len(self.labels), self.seed, number).split(self.batch_size)[start:]:
            yield (((self.values[index],), self.labels[index], self.weights[index]),)


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
    """One epoch's record; losses are class-weighted means, seconds are wall seconds, `lr` is the last step's."""

    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    lr: float

    def words(self) -> str:
        """As a progress bar shows it."""
        losses = f"loss {self.train_loss:.3f}, validation {self.validation_loss:.3f}"
        return f"{losses} ({self.validation_accuracy:.3f})"


@dataclass
class History:
    """All epochs, which one's weights were kept (counted from 0), steps taken, and whether Ctrl-C ended it.

    While training, also how many steps of the next epoch are done, and how often the parts of a batch were cut in two,
    since memory ran out.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    interrupted: bool = False
    done: int = 0
    halvings: int = 0

    @property
    def kept(self) -> Epoch:
        """The record of the epoch whose weights were kept."""
        return self.epochs[self.best]


def fit(
    model: nn.Module,
    batches: Batches,
    validate: Validate,
    schedule: Schedule,
    on_epoch: Callable[[int, Epoch], bool] = lambda number, epoch: False,
    checkpoints: Checkpoints | None = None,
    label: str | None = None,
) -> History:
    """Train what requires gradients of `model`, which gives (batch, classes) logits, with AdamW on cross-entropy.

    It is left with the weights of its best epoch. A batch's loss is a weighted mean: see `weighted_loss`; cross-entropy
    is LogSoftmax and then negative log likelihood, so heads that end in LogSoftmax train as others do.
    `on_epoch` is called with an epoch's number and record, and returns whether to stop. Ctrl-C cuts an epoch short and
    keeps the best so far; it is passed on if there is none. `label` names a bar of steps.

    `checkpoints` are written when due, at each epoch's end, and on SIGTERM, which then raises a `TerminatedError`; the
    newest is resumed from, and training ends in the same bytes, since all that is random is a function of the seed and
    the epoch. Where memory runs out, batches are computed in smaller pieces; an `InputError` if one text is too much.

    Processes that train together (see `peers`) each call this with their parts of the same batches; gradients are
    summed, so that all take the same steps. The first of them writes the checkpoints, also one at the very end.
    """
    training = Training(model, schedule)
    if checkpoints is not None and (found := checkpoints.newest()) is not None:
        training.resume(*found)
    add_up(steps_of_all := torch.tensor(float(training.history.steps)))
    if float(steps_of_all) != seat().size * training.history.steps:
        raise UnevenError("Workers found different checkpoints: --out has to be on a disk that all share.")
    at, steps, patience = training.history, schedule.epochs * len(batches), schedule.patience or math.inf
    most_steps = schedule.max_steps or math.inf
    announce: Callable[[str], None] = checkpoints.announce if checkpoints is not None else lambda said: None
    stop, here = False, seat()
    with termination() as terminated, bar(label, steps, "steps") as advance:
        advance(at.steps, "")

        def save() -> None:
            if checkpoints is not None and here.rank == 0:
                checkpoints.save(at.steps, *training.state())
            if terminated.is_set():
                kept = "a checkpoint was written; --resume goes on from it" if checkpoints else "nothing was kept"
                raise TerminatedError(f"SIGTERM: training was ended; {kept}.")

        def is_over() -> bool:
            return time.monotonic() > schedule.deadline or at.steps >= most_steps

        def one_epoch() -> None:  # its steps that are not done yet
            if at.done and at.steps >= most_steps:
                return
            model.train()
            for parts in batches.epoch(len(at.epochs), at.done):
                training.step(parts, schedule.lr_at(at.steps, steps), announce)
                advance(1, at.epochs[-1].words() if at.epochs else "")
                if terminated.is_set() or (checkpoints is not None and checkpoints.due()):
                    save()
                if is_over():
                    return

        try:
            while not stop and len(at.epochs) < schedule.epochs and len(at.epochs) - at.best <= patience:
                if at.epochs and not at.done and at.steps >= most_steps:
                    break  # resumed at its end
                started = time.perf_counter()
                try:
                    one_epoch()
                except KeyboardInterrupt:
                    if not at.done:
                        raise
                    at.interrupted = True
                model.eval()
                with torch.inference_mode():
                    held = validate(model)
                training.end_epoch(*held, time.perf_counter() - started, schedule.lr_at(at.steps - 1, steps))
                stop = on_epoch(len(at.epochs) - 1, at.epochs[-1]) or at.interrupted or is_over()
                if not stop or here.size > 1 or terminated.is_set():
                    save()
        except KeyboardInterrupt:
            if not at.epochs:
                raise  # nothing to keep yet
            at.interrupted, at.steps, at.done = True, at.steps - at.done, 0
    copy_tensors(training.best, training.named)
    for one in training.parameters:
        one.grad = None  # memory for nothing
    model.eval()
    return at


class Training:
    """A model in training: its steps, and all that the rest of them depends on, which is what a checkpoint holds."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.model, self.schedule, self.history = model, schedule, History()
        self.named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.parameters = list(self.named.values())
        self.best = {name: one.detach().clone() for name, one in self.named.items()}
        self.sums = dict[int, torch.Tensor]()
        self.optimizer, self.losses = AdamW(self.named, schedule), list[torch.Tensor]()  # of the epoch's steps
        kinds = {"now": self.named, "best": self.best, **self.optimizer.state}
        self.tensors = {f"{kind}.{name}": one.detach() for kind, of in kinds.items() for name, one in of.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `resume` takes, as tensors and as JSON."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        return {**tensors, "losses": torch.tensor(self.losses)}, asdict(self.history)

    def resume(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Be where another one was."""
        copy_tensors(tensors, self.tensors)
        self.losses = list(tensors["losses"].to(self.parameters[0].device))
        self.history = History(**{**state, "epochs": [Epoch(**record) for record in state["epochs"]]})

    def step(self, parts: Sequence[Part], lr: float, announce: Callable[[str], None]) -> None:
        """One step of AdamW down the loss of a batch, in pieces that fit the memory."""
        at, whole = self.history, sum((weights.sum() for _, _, weights in parts), torch.zeros(()))
        add_up(whole)
        while (loss := self._gradients(parts, whole)) is None:
            at.halvings += 1
            torch.cuda.empty_cache()  # where there is none, it does nothing
            announce(f"Memory ran out: each batch is now computed in {2**at.halvings} times as many pieces.")
        self._join(loss)
        self._clip()
        with undisturbed():
            self.losses.append(loss)
            self.optimizer.step(lr)
            at.done, at.steps = at.done + 1, at.steps + 1

    def end_epoch(self, validation_loss: float, validation_accuracy: float, seconds: float, lr: float) -> None:
        """Note what the epoch came to, and its weights if it is the best."""
        at, train_loss = self.history, float(torch.stack(self.losses).mean())
        with undisturbed():
            at.epochs.append(Epoch(train_loss, validation_loss, validation_accuracy, seconds, lr))
            if len(at.epochs) == 1 or self.schedule.prefers(at.epochs[-1], at.kept):
                at.best = len(at.epochs) - 1
                copy_tensors(self.named, self.best)
            at.done, self.losses = 0, []

    def _join(self, loss: torch.Tensor) -> None:
        """Sum the loss and the gradients over the processes that train together."""
        if seat().size == 1:
            return
        given = torch.tensor([float(one.grad is not None) for one in self.parameters], device=loss.device)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        add_up(loss, given, *(one.grad for one in self.parameters if one.grad is not None))
        for parameter, count in zip(self.parameters, given.tolist(), strict=True):
            parameter.grad = parameter.grad if count else None

    def _gradients(self, parts: Sequence[Part], whole: torch.Tensor) -> torch.Tensor | None:
        """Set the gradients of a batch's loss and return it; None where memory runs out.

        `whole` is what the whole batch counts, of which other processes may have parts, too.
        """
        for parameter in self.parameters:
            parameter.grad = None
        pieces = [piece for part in parts for piece in _cut(part, 2**self.history.halvings)]
        try:
            return self._backward(pieces, whole)
        except (RuntimeError, MemoryError) as error:
            if not OUT_OF_MEMORY.search(f"{type(error).__name__} {error}"):
                raise
            if all(len(labels) == 1 for _, labels, _ in pieces):
                hint = "Thaw fewer layers (--thaw K), or cut texts shorter (--max-length)."
                raise InputError(f"Memory runs out even with one text at a time. {hint}") from error
        return None

    def _backward(self, parts: Sequence[Part], whole: torch.Tensor) -> torch.Tensor:
        """The same where memory is enough; parts are computed side by side, their gradients summed."""
        one_step = getattr(self.model, "one_step", None)
        if len(parts) == 1 and seat().size == 1 and one_step is None:
            loss = self._loss(parts[0])
            loss.backward()
            return loss.detach()
        shares = [float(weights.sum() / whole.clamp_min(1e-12)) for _, _, weights in parts]
        total = torch.zeros((), device=self.parameters[0].device)
        # Where memory ran out, one after the other. Other devices have a queue each, and wait for nothing.
        at_once = total.device.type == "cpu" and not self.history.halvings
        with one_step() if one_step is not None else contextlib.nullcontext(self.parameters) as leaves:

            def gradients(number: int) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
                loss = self._loss(parts[number]) * shares[number]
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                return loss.detach(), [one.coalesce() if one is not None and one.is_sparse else one for one in found]

            for loss, found in (side_by_side if at_once else map)(gradients, range(len(parts))):
                total += loss.to(total.device)
                for number, gradient in enumerate(found):
                    if gradient is not None:
                        self._add(number, gradient)
        return total

    def _add(self, number: int, gradient: torch.Tensor) -> None:
        """Add to a parameter's gradient, in memory that is kept: to get as much anew takes longer than to fill it."""
        parameter = self.parameters[number]
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
        elif parameter.device.type != "cpu":  # which keep freed memory by themselves
            parameter.grad = gradient.to(parameter.dtype)
        else:
            if number not in self.sums:
                self.sums[number] = torch.empty_like(parameter)
            parameter.grad = self.sums[number]
            parameter.grad.zero_().add_(gradient) if gradient.is_sparse else parameter.grad.copy_(gradient)

    def _clip(self) -> None:
        """Scale the gradients down to the largest norm that is allowed."""
        given = [one.grad for one in self.parameters if one.grad is not None]
        norm = nn.utils.get_total_norm(given)
        if norm.device.type != "cpu" or not norm <= self.schedule.clip_norm:  # elsewhere to ask would be to wait
            nn.utils.clip_grads_with_norm_(self.parameters, self.schedule.clip_norm, norm)

    def _loss(self, part: Part) -> torch.Tensor:
        inputs, labels, weights = part
        half, where = inputs[0].dtype == torch.bfloat16, inputs[0].device
        labels, weights = labels.to(where), weights.to(where)  # before work is queued, for which this would wait
        with torch.autocast(labels.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            logits = self.model(*inputs).float()
        return weighted_loss(logits, labels, weights)


def _cut(part: Part, pieces: int) -> list[Part]:
    inputs, labels, weights = part
    cut = zip(*(one.chunk(pieces) for one in inputs), strict=True)
    return list(zip(cut, labels.chunk(pieces), weights.chunk(pieces), strict=True))


def copy_tensors(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Give each tensor of `target` the values that `source` has by its name."""
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


class AdamW:
    """Torch's fused AdamW (Loshchilov and Hutter 2019), its defaults, as a function of what it remembers.

    The class of that name imports torch's compiler when one is made, which takes a second.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], schedule: Schedule) -> None:
        self.named, self.groups = named, dict[float, list[str]]()
        self.state = {kind: {name: torch.zeros_like(one) for name, one in named.items()} for kind in MOMENTS}
        self.state["step"] = {name: one.new_zeros(()) for name, one in named.items()}
        for name, parameter in named.items():
            decayed = schedule.warmup is None or (parameter.ndim > 1 and "embeddings" not in name)
            self.groups.setdefault(schedule.weight_decay if decayed else 0.0, []).append(name)

    def step(self, lr: float) -> None:
        """Change every parameter that has a gradient."""
        same = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False, "fused": True}
        for decay, names in self.groups.items():
            given = {name: one for name in names if (one := self.named[name]).grad is not None}
            means, squares, steps = ([remembered[name] for name in given] for remembered in self.state.values())
            gradients = [one.grad for one in given.values()]
            with torch.no_grad():
                adamw(list(given.values()), gradients, means, squares, [], steps, lr=lr, weight_decay=decay, **same)
