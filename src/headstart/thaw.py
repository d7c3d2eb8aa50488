"""Fine-tuning: the layers above a frozen prefix, trained together with the head, as deep as the time allows.

The prefix runs once: its hidden states are kept on disk without padding, in half precision, and an epoch costs only the
layers above. This room knows tokens, hidden states and what each depth costs; the loop is the same as for heads.
"""

import copy
import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from filelock import FileLock
from numpy.typing import NDArray

from headstart.checkpoints import Checkpoints
from headstart.config import TrainConfig
from headstart.encoder import Encoder
from headstart.engine import side_by_side
from headstart.errors import count_of, disk_errors
from headstart.features import cache_folder, evict
from headstart.folders import reserve, whole_file
from headstart.model import Depth, ThawedModel
from headstart.progress import bar
from headstart.tokens import Tokens, like_length_batches
from headstart.train import History, Part, Schedule, class_weights, fit, loss_and_accuracy, shuffled

LR, BATCH, WEIGHT_DECAY, WARMUP = 1e-4, 32, 0.01, 0.1
EPOCHS, STEPS = (3, 6), 650  # between so many epochs, for so many steps: small tables need more (Mosbach et al. 2021)
WINDOW = 50  # batches of like length are cut from so many shuffled ones, as transformers' group_by_length does
PROBES, PREFIX_TEXTS = 4, 512  # batches that a step is measured on, and texts that the prefix is, spread over lengths
CPU = torch.device("cpu")
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

    def inputs(self, index: Indexes, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length) ids, or (batch, length, hidden) states, of the texts at `index`, and their 0/1 mask."""
        ids, mask = map(torch.from_numpy, self.tokens.padded(index, self.pad_id))
        if self.below is None:
            return ids.to(device), mask.to(device)
        if self.kept is None:
            engine, where = self.encoder.engine, self.encoder.placement.device
            assert engine is not None
            with torch.inference_mode():
                states = engine.states(ids.to(where), mask.to(where), self.below).clamp(-65504, 65504).half()
            return states.to(device).clone(), mask.to(device)
        states = torch.zeros(*ids.shape, self.kept.shape[1], dtype=torch.float16)
        bounds = zip(self.tokens.offsets[index], self.tokens.offsets[index + 1], strict=True)
        states[mask.bool()] = torch.from_numpy(np.concatenate([self.kept[begin:end] for begin, end in bounds]))
        return states.to(device), mask.to(device)

    def path(self) -> Path:
        """Where the hidden states of these texts are kept."""
        name = hashlib.sha256(self.tokens.ids.tobytes() + self.tokens.offsets.tobytes()).hexdigest()[:32]
        return cache_folder() / "features" / f"states-{self.encoder.fingerprint}-{self.below}" / f"{name}.npy"

    def keep(self) -> "Texts":
        """Run the prefix over all texts once and keep it on disk, or find that it has been; a `DiskError` if full."""
        path, shape = self.path(), (len(self.tokens.ids), self.encoder.hidden)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                for torn in path.parent.glob(f".{path.name}.*.tmp"):  # by a kill: a living writer holds the lock
                    torn.unlink()
                if not path.is_file() or path.stat().st_size < 128 + 2 * math.prod(shape):  # cut short: 128 are numpy's
                    with whole_file(path) as temporary:
                        kept = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                        with open(temporary, "rb+") as file:
                            reserve(file, temporary.stat().st_size)
                        self.fill(kept).flush()
                os.utime(path)
                kept = np.load(path, mmap_mode="r")  # stays readable, even if it is too large for the store's cap
            evict(path.parents[1])
        return replace(self, kept=kept)

    def fill(self, kept: Any) -> Any:
        """Run the prefix over all texts into a (tokens, hidden) array."""
        batches = like_length_batches(self.tokens.lengths)
        with bar("running the frozen layers", len(self.tokens), "texts") as advance:
            for index, (states, mask) in side_by_side(lambda index: (index, self.inputs(index)), batches):
                rows = np.concatenate([np.arange(*self.tokens.offsets[i : i + 2]) for i in index.tolist()])
                kept[rows] = states[mask.bool()].numpy()
                advance(len(index), "")
        return kept


@dataclass(frozen=True)
class TokenBatches:
    """Batches of like length of the texts at (n,) `index` with (n,) `labels`, each cut into parts, one a device."""

    texts: Texts
    index: Indexes
    labels: Indexes
    batch_size: int
    seed: int
    devices: Sequence[torch.device]  # a processor's cores are devices too: the same one, named several times

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        """Batches of an epoch from the `start`-th on; the shuffle depends on the seed and `number` alone."""
        order, size = shuffled(len(self), self.seed + 1, number), self.batch_size
        lengths, parts = self.texts.tokens.lengths[self.index], len(self.devices)
        windows = shuffled(len(self.labels), self.seed, number).split(WINDOW * size)
        ordered = np.concatenate([one[np.argsort(-lengths[one], kind="stable")] for one in map(np.asarray, windows)])

        def part(places: Indexes, device: torch.device) -> Part:
            return self.texts.inputs(self.index[places], device), torch.from_numpy(self.labels[places])

        for place in order.tolist()[start:]:
            batch = ordered[place * size : (place + 1) * size]
            yield [part(batch[i::parts], device) for i, device in enumerate(self.devices[: len(batch)])]


def logits_of(model: torch.nn.Module, texts: Texts, index: Indexes, labels: int) -> torch.Tensor:
    """(len(index), labels) fp32 logits of the texts at `index`, by a model in eval mode."""
    found, device = torch.empty(len(index), labels), texts.encoder.placement.device

    def score(places: Indexes) -> tuple[Indexes, torch.Tensor]:
        with torch.inference_mode():
            return places, model(*texts.inputs(index[places], device)).float().cpu()

    for places, logits in side_by_side(score, like_length_batches(texts.tokens.lengths[index])):
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
        enough = math.ceil(STEPS / math.ceil(len(self.train_labels) / (config.batch_size or BATCH)))
        epochs, lr = config.epochs or min(max(enough, EPOCHS[0]), EPOCHS[1]), config.lr or LR
        given = Schedule(epochs, lr, decay, config.clip_norm, config.patience, "most accurate", WARMUP)
        return replace(given, max_steps=config.max_steps)

    @functools.cached_property
    def used(self) -> Indexes:
        """(m,) sorted token ids that the texts have, and all up to the padding's, so that it keeps its own."""
        return np.union1d(self.tokens.ids, np.arange(self.encoder.tokenizer.pad_id + 1)).astype(np.int64)

    def thawed(self, depth: Depth, used: Indexes) -> tuple[ThawedModel, Texts]:
        """A copy of `start`, thawed to `depth`, and what it reads; nothing is computed or kept yet."""
        model = ThawedModel(self.encoder, copy.deepcopy(self.start), depth, used)
        tokens, below = (model.ids(self.tokens), None) if depth == "all" else (self.tokens, self.encoder.layers - depth)
        return model, Texts(self.encoder, tokens, self.encoder.tokenizer.pad_id, below)

    def batches(self, texts: Texts) -> TokenBatches:
        """The training texts' batches, of which each core or each GPU takes a part."""
        device, several = self.encoder.placement.device, 1
        if device.type == "cpu":
            several = torch.get_num_threads()
        elif device.type == "cuda" and self.encoder.engine is not None:  # which can follow its inputs to a device
            several = torch.cuda.device_count()
        devices = [torch.device("cuda", i) if device.type == "cuda" else device for i in range(several)]
        size = self.config.batch_size or BATCH
        return TokenBatches(texts, self.parts[0], self.train_labels, size, self.config.seed, devices)

    def fit(self, depth: Depth, checkpoints: Checkpoints | None = None, deadline: float = math.inf) -> Thawed:
        """Train the top `depth` layers and the head together.

        A `ModelError` if this family cannot be thawed so deep, a `DiskError` if something cannot be written, a
        `TerminatedError` after SIGTERM.
        """
        model, texts = self.thawed(depth, self.used)
        if texts.below is not None and self.config.store:
            texts = texts.keep()
        schedule, count = replace(self.schedule, deadline=deadline), len(self.names)
        weights = class_weights(self.train_labels, count, self.config.class_weight)
        truth = torch.from_numpy(self.validation_labels)

        def validate(model: torch.nn.Module) -> tuple[float, float]:
            return loss_and_accuracy(logits_of(model, texts, self.parts[1], count), truth, weights)

        batches, label = self.batches(texts), f"fine-tuning {layers_text(depth)}"
        history = fit(model, batches, validate, schedule, weights, checkpoints=checkpoints, label=label)
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


def predicted_costs(task: FineTuning, out: Path) -> list[Cost]:
    """The cost of each depth for which there is room, the shallowest first, with checkpoints in `out`.

    A few steps are measured of the shallowest, of the deepest, and of all; those between are reckoned.
    """
    memory, disk = psutil.virtual_memory().available, min(map(free_bytes, (out, cache_folder())))
    layers = task.encoder.layers if task.encoder.engine is not None else 0
    rooms: dict[Depth, tuple[int, int]] = {depth: _room(task, depth) for depth in (*range(1, layers + 1), "all")}
    fitting = [depth for depth, room in rooms.items() if room[0] <= memory and room[1] <= disk]
    numbers = [depth for depth in fitting if depth != "all"]
    measured = {depth: _seconds(task, depth) for depth in fitting if depth in (*numbers[:1], *numbers[-1:], "all")}
    ends = [depth for depth in numbers if depth in measured]
    between = np.interp(numbers, ends, [measured[depth] for depth in ends]).tolist() if ends else []
    seconds: dict[Depth, float] = {**dict(zip(numbers, between, strict=True)), **measured}
    return [Cost(depth, seconds[depth], *rooms[depth]) for depth in fitting]


def free_bytes(place: Path) -> int:
    """What is free on the disk of a folder that may not be there yet."""
    there = next(one for one in (place.absolute(), *place.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def _seconds(task: FineTuning, depth: Depth) -> float:
    """Predicted wall seconds of `task.fit`, from steps on a few batches, each taken once before it is timed."""
    size, lengths = task.config.batch_size or BATCH, task.tokens.lengths
    by_length = np.argsort(lengths[task.parts[0]], kind="stable")
    middles = ((np.arange(PROBES) + 0.5) / PROBES * len(by_length)).astype(int)
    some = np.unique(np.concatenate([by_length[max(0, at - size // 2) : at + size // 2] for at in middles]))
    tokens, every = task.tokens.take(task.parts[0][some]), np.arange(len(some))
    probe = replace(task, tokens=tokens, parts=(every, every, every), train_labels=task.train_labels[some])
    model, texts = probe.thawed(depth, task.used)
    prefix = 0.0  # seconds of running it over all texts
    if texts.below is not None:
        texts = replace(texts, kept=texts.fill(np.empty((len(tokens.ids), task.encoder.hidden), np.float16)))
        if not (task.config.store and replace(texts, tokens=task.tokens).path().is_file()):
            spread = task.tokens.take(np.argsort(lengths)[:: -(-len(lengths) // PREFIX_TEXTS)])
            sample, room = replace(texts, tokens=spread, kept=None), np.empty((len(spread.ids), task.encoder.hidden))
            for _ in range(2):  # the first compiles kernels
                begun = time.perf_counter()
                sample.fill(room)
                prefix = (time.perf_counter() - begun) * len(task.tokens.ids) / len(spread.ids)
    forward: list[float] = []

    def validate(model: torch.nn.Module) -> tuple[float, float]:
        begun = time.perf_counter()
        logits_of(model, texts, every, len(task.names))
        forward.append(time.perf_counter() - begun)
        return 0.0, 0.0

    weights = torch.ones(len(task.names))
    schedule = replace(task.schedule, epochs=3, patience=None, keep="last")
    history = fit(model, probe.batches(texts), validate, schedule, weights)
    if history.interrupted:
        raise KeyboardInterrupt
    epochs, seconds = task.schedule.epochs, sum(one.seconds for one in history.epochs[1:]) / 2
    forward_seconds = sum(forward[1:]) / 2
    train, held, test = (lengths[part].sum() / len(tokens.ids) for part in task.parts)
    fitting = epochs * (train * (seconds - forward_seconds) + held * forward_seconds)
    return float(prefix * (1 if task.config.store else epochs) + fitting + (held + test) * forward_seconds)


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
    """The deepest that fits the time; None where none does."""
    return next((one for one in reversed(costs) if one.seconds <= seconds), None)
