"""Fine-tuning: the layers above a frozen prefix, trained together with the head, as deep as the time allows.

The prefix runs once: its hidden states are kept on disk without padding, in half precision, and an epoch costs only the
layers above. This room knows tokens, hidden states and what each depth costs; the loop is the same as for heads.
"""

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from headstart.checkpoints import Checkpoints
from headstart.config import TrainConfig
from headstart.encoder import Encoder
from headstart.engine import side_by_side
from headstart.errors import count_of, disk_errors
from headstart.features import cache_folder, whole_file
from headstart.model import Depth, ThawedModel
from headstart.progress import bar
from headstart.tokens import Tokens, like_length_batches
from headstart.train import Epoch, History, Part, Schedule, class_weights, fit, loss_and_accuracy, shuffled

EPOCHS, LR, BATCH, WEIGHT_DECAY, WARMUP = 3, 1e-4, 32, 0.01, 0.1
WINDOW = 50  # batches of like length are cut from so many shuffled ones, as transformers' group_by_length does
MOST_TOKENS = 2048
PROBES = 4  # batches that the cost of a step is measured on, spread over the lengths
Indexes = NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """n texts as a thawed model takes them: token ids, or hidden states after `below` frozen layers where that is set.

    `kept` are those states, (tokens, hidden) in half precision; without them they are computed each time.
    """

    encoder: Encoder
    tokens: Tokens
    pad_id: int
    below: int | None = None
    kept: Any = None

    @property
    def lengths(self) -> Indexes:
        """(n,) tokens a text."""
        return self.tokens.lengths

    def inputs(self, index: Indexes) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length) ids, or (batch, length, hidden) states, of the texts at `index`, and their 0/1 mask."""
        ids, mask = map(torch.from_numpy, self.tokens.padded(index, self.pad_id))
        if self.below is None:
            return ids, mask
        if self.kept is None:
            engine, device = self.encoder.engine, self.encoder.placement.device
            assert engine is not None
            with torch.inference_mode():
                states = engine.states(ids.to(device), mask.to(device), self.below)
            return states.clamp(-65504, 65504).half().cpu().clone(), mask
        states = torch.zeros(*ids.shape, self.kept.shape[1], dtype=torch.float16)
        bounds = zip(self.tokens.offsets[index], self.tokens.offsets[index + 1], strict=True)
        states[mask.bool()] = torch.from_numpy(np.concatenate([self.kept[begin:end] for begin, end in bounds]))
        return states, mask

    def keep(self) -> "Texts":
        """Run the prefix over all texts once and keep it on disk, or find that it has been; a `DiskError` if full."""
        name = hashlib.sha256(self.tokens.ids.tobytes() + self.tokens.offsets.tobytes()).hexdigest()[:32]
        path = cache_folder() / "features" / f"states-{self.encoder.fingerprint}-{self.below}" / f"{name}.npy"
        if not path.is_file():
            shape = (len(self.tokens.ids), self.encoder.hidden)
            with disk_errors(path), whole_file(path) as temporary:
                self.fill(np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)).flush()
        return replace(self, kept=np.load(path, mmap_mode="r"))

    def fill(self, kept: Any) -> Any:
        """Run the prefix over all texts into a (tokens, hidden) array."""
        batches = like_length_batches(self.lengths, most_tokens=MOST_TOKENS)
        with bar("running the frozen layers", len(self.tokens), "texts") as advance:
            for index, (states, mask) in side_by_side(lambda index: (index, self.inputs(index)), batches):
                rows = np.concatenate([np.arange(*self.tokens.offsets[i : i + 2]) for i in index.tolist()])
                kept[rows] = states[mask.bool()].numpy()
                advance(len(index), "")
        return kept


@dataclass(frozen=True)
class TokenBatches:
    """Batches of like length of the texts at (n,) `index` with (n,) `labels`, each cut into `parts` side by side."""

    texts: Texts
    index: Indexes
    labels: Indexes
    batch_size: int
    seed: int
    parts: int

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def epoch(self, number: int) -> Iterator[Sequence[Part]]:
        """Batches of an epoch; the shuffle, and so the batches, depend on the seed and `number` alone."""
        order, size, lengths = (
            shuffled(len(self), self.seed + 1, number),
            self.batch_size,
            self.texts.lengths[self.index],
        )
        windows = shuffled(len(self.labels), self.seed, number).split(WINDOW * size)
        ordered = np.concatenate([one[np.argsort(-lengths[one], kind="stable")] for one in map(np.asarray, windows)])
        for place in order.tolist():
            batch = ordered[place * size : (place + 1) * size]
            pieces = [piece for part in range(self.parts) if len(piece := batch[part :: self.parts])]
            yield [(self.texts.inputs(self.index[one]), torch.from_numpy(self.labels[one])) for one in pieces]


def logits_of(model: torch.nn.Module, texts: Texts, index: Indexes, labels: int) -> torch.Tensor:
    """(len(index), labels) fp32 logits of the texts at `index`, by a model in eval mode."""
    found = torch.empty(len(index), labels)

    def score(places: Indexes) -> tuple[Indexes, torch.Tensor]:
        with torch.inference_mode():
            return places, model(texts.inputs(index[places])).float().cpu()

    for places, logits in side_by_side(score, like_length_batches(texts.lengths[index], most_tokens=MOST_TOKENS)):
        found[torch.from_numpy(places)] = logits
    return found


class Thawed(NamedTuple):
    """A fine-tuned transformers model, with the weights of its best epoch, and (n, labels) logits it gave."""

    depth: Depth
    model: Any
    history: History
    validation_logits: torch.Tensor
    test_logits: torch.Tensor
    schedule: Schedule

    def whole(self, names: Sequence[str]) -> Any:
        """What a run folder holds; its `names` are in its configuration already."""
        return self.model

    def description(self) -> dict[str, Any]:
        """What headstart.json says of the head."""
        words = f"the architecture's own, fine-tuned with {layers_text(self.depth)}, epoch {self.history.best + 1}"
        settings = {"lr": self.schedule.lr, "weight_decay": self.schedule.weight_decay}
        return {"kind": "native", **settings, "description": words}


@dataclass(frozen=True)
class FineTuning:
    """What is fine-tuned: all texts' token ids, truncated, and which of them train, validate and test, with labels.

    `start` is a `...ForSequenceClassification` model to start from.
    """

    encoder: Encoder
    tokens: Tokens
    parts: tuple[Indexes, Indexes, Indexes]
    train_labels: Indexes
    validation_labels: Indexes
    names: tuple[str, ...]
    config: TrainConfig
    start: Any

    @property
    def schedule(self) -> Schedule:
        """The settings' schedule, or the defaults of fine-tuning."""
        config = self.config
        decay = WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
        epochs, lr = config.epochs or EPOCHS, config.lr or LR
        return Schedule(epochs, lr, decay, config.clip_norm, config.patience, "most accurate", WARMUP)

    def thawed(self, depth: Depth) -> tuple[ThawedModel, Texts]:
        """A copy of `start`, thawed to `depth`, and what it reads; nothing is computed or kept yet."""
        pad_id = self.encoder.tokenizer.pad_id
        used = np.unique(np.append(self.tokens.ids, pad_id)).astype(np.int64)
        model = ThawedModel(self.encoder, copy.deepcopy(self.start), depth, used)
        if depth != "all":
            return model, Texts(self.encoder, self.tokens, pad_id, self.encoder.layers - depth)
        known = pad_id if model.used is None else int(np.searchsorted(model.used, pad_id))
        return model, Texts(self.encoder, model.ids(self.tokens), known)

    def batches(self, texts: Texts) -> TokenBatches:
        """The training texts' batches; a CPU's cores each take a part of a batch."""
        cores = torch.get_num_threads() if self.encoder.placement.device.type == "cpu" else 1
        size = self.config.batch_size or BATCH
        return TokenBatches(texts, self.parts[0], self.train_labels, size, self.config.seed, cores)

    def fit(self, depth: Depth, checkpoints: Checkpoints | None = None, deadline: float = math.inf) -> Thawed:
        """Train the top `depth` layers and the head together.

        A `ModelError` if this family cannot be thawed so deep, a `DiskError` if something cannot be written, a
        `TerminatedError` after SIGTERM.
        """
        model, texts = self.thawed(depth)
        if texts.below is not None and self.config.store:
            texts = texts.keep()
        schedule, count = replace(self.schedule, deadline=deadline), len(self.names)
        weights = class_weights(self.train_labels, count, self.config.class_weight)
        truth = torch.from_numpy(self.validation_labels)

        def validate(model: torch.nn.Module) -> tuple[float, float]:
            return loss_and_accuracy(logits_of(model, texts, self.parts[1], count), truth, weights)

        with bar(f"fine-tuning {layers_text(depth)}", schedule.epochs, "epochs") as advance:

            def show(number: int, epoch: Epoch) -> bool:
                advance(1, epoch.words())
                return False

            device = self.encoder.placement.device
            history = fit(model, self.batches(texts), validate, schedule, weights.to(device), show, checkpoints)
        held, test = (logits_of(model, texts, part, count) for part in self.parts[1:])
        return Thawed(depth, model.whole(), history, held, test, schedule)


def layers_text(depth: Depth) -> str:
    """A depth in words."""
    return "all layers and the embeddings" if depth == "all" else f"the top {count_of(depth, 'layer')}"


class Cost(NamedTuple):
    """What fine-tuning to a depth is predicted to take: wall seconds, bytes of memory, bytes of disk."""

    depth: Depth
    seconds: float
    memory: int
    disk: int


def predicted_costs(task: FineTuning) -> list[Cost]:
    """The cost of each depth, the shallowest first: a few steps of three of them are measured, the rest reckoned."""
    numbers = range(1, task.encoder.layers + 1) if task.encoder.engine is not None else range(0)
    ends = sorted({*numbers[:1], *numbers[-1:]})
    seconds = np.interp(numbers, ends, [_seconds(task, depth) for depth in ends]).tolist() if ends else []
    costs: list[tuple[Depth, float]] = [*zip(numbers, seconds, strict=True), ("all", _seconds(task, "all"))]
    return [Cost(depth, taken, *_room(task, depth)) for depth, taken in costs]


def _seconds(task: FineTuning, depth: Depth) -> float:
    """Predicted wall seconds of `task.fit`, from steps on a few batches, each taken once before it is timed."""
    size, lengths = task.config.batch_size or BATCH, task.tokens.lengths
    by_length = np.argsort(lengths[task.parts[0]], kind="stable")
    middles = ((np.arange(PROBES) + 0.5) / PROBES * len(by_length)).astype(int)
    some = np.unique(np.concatenate([by_length[max(0, at - size // 2) : at + size // 2] for at in middles]))
    tokens, every = task.tokens.take(task.parts[0][some]), np.arange(len(some))
    probe = replace(task, tokens=tokens, parts=(every, every, every), train_labels=task.train_labels[some])
    model, texts = probe.thawed(depth)
    prefix = 0.0
    for _ in range(2 if texts.below is not None else 0):
        begun = time.perf_counter()
        kept = replace(texts, kept=None).fill(np.empty((len(tokens.ids), task.encoder.hidden), np.float16))
        prefix, texts = time.perf_counter() - begun, replace(texts, kept=kept)
    forward: list[float] = []

    def validate(model: torch.nn.Module) -> tuple[float, float]:
        begun = time.perf_counter()
        logits_of(model, texts, every, len(task.names))
        forward.append(time.perf_counter() - begun)
        return 0.0, 0.0

    weights = torch.ones(len(task.names), device=task.encoder.placement.device)
    schedule = replace(task.schedule, epochs=2, patience=None, keep="last")
    history = fit(model, probe.batches(texts), validate, schedule, weights)
    epochs, step = task.schedule.epochs, history.epochs[1].seconds - forward[1]
    train, held, test = (lengths[part].sum() / len(tokens.ids) for part in task.parts)
    prefixes = prefix * ((1 if task.config.store else epochs) * (train + held) + test)
    return float(prefixes + epochs * (step * train + forward[1] * held) + forward[1] * (held + test))


def _room(task: FineTuning, depth: Depth) -> tuple[int, int]:
    """Bytes of memory (weights, gradients, moments, activations) and disk (hidden states, checkpoints), reckoned."""
    encoder, hidden = task.encoder, task.encoder.hidden
    weights = sum(one.numel() for one in encoder.weights.values())
    layers = encoder.layers if depth == "all" else depth
    trained = weights if depth == "all" else layers * 12 * hidden**2
    batch = (task.config.batch_size or BATCH) * int(task.tokens.lengths.max())
    states = 0 if depth == "all" or not task.config.store else 2 * hidden * len(task.tokens.ids)
    return 4 * (2 * weights + 7 * trained) + batch * layers * hidden * 60, states + 3 * 4 * 4 * trained


def deepest_within(costs: Sequence[Cost], seconds: float) -> Cost | None:
    """The deepest that fits the time and the free memory; None where none does."""
    free = psutil.virtual_memory().available
    return next((one for one in reversed(costs) if one.seconds <= seconds and one.memory <= free), None)
