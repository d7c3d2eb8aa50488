"""Fine-tuning: the layers above a frozen prefix, trained together with the head, as deep as the time allows.

The prefix runs once: its hidden states are kept on disk without padding, in half precision, and an epoch costs only the
layers above. This room knows tokens, hidden states and what each depth costs; the loop is the same as for heads.
"""

import copy
import hashlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
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
from headstart.peers import add_up, seat
from headstart.progress import bar
from headstart.targets import Targets, class_weights, loss_and_accuracy
from headstart.tokens import Tokens, like_length_batches
from headstart.train import Epoch, History, Part, Schedule, fit, shuffled

LR, BATCH, WEIGHT_DECAY, WARMUP = 1e-4, 32, 0.01, 0.1
EPOCHS, STEPS = (3, 6), 650  # between so many epochs, for so many steps: small tables need more (Mosbach et al. 2021)
WINDOW = 50  # batches of like length are cut from so many shuffled ones, as transformers' group_by_length does
PROBES, PREFIX_TEXTS = 4, 512  # batches that a step is measured on, and texts that the prefix is, spread over lengths
CPU = torch.device("cpu")
Indexes = NDArray[np.int64]
OnEpoch = Callable[[int, Epoch], bool]


@dataclass(frozen=True)
class Texts:
    """n texts as a thawed model takes them: token ids, or hidden states after `below` frozen layers where that is set.

    `kept` are those states, (tokens, hidden) in half precision; without them they are computed each time.
    """

    encoder: Encoder
    tokens: Tokens
    below: int | None = None
    kept: Any = None

    def inputs(self, index: Indexes, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length) ids, or (batch, length, hidden) states, of the texts at `index`, and their 0/1 mask."""
        ids, mask = map(torch.from_numpy, self.tokens.padded(index, self.encoder.tokenizer.pad_id))
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
    """Batches of like length of the texts at (n,) `index`, each cut into parts, one a device of each process.

    Texts of a batch lie by length and go to the parts in turns, so that parts are alike in tokens, not only in texts.
    `wanted` are their labels and what each counts in the loss: see `Targets.by_piece`.
    """

    texts: Texts
    index: Indexes
    wanted: tuple[torch.Tensor, torch.Tensor]
    batch_size: int
    seed: int
    devices: Sequence[torch.device]  # a processor's cores are devices too: the same one, named several times

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        """Batches of an epoch from the `start`-th on; the shuffle depends on the seed and `number` alone."""
        order, size = shuffled(len(self), self.seed + 1, number), self.batch_size
        lengths, here, local = self.texts.tokens.lengths[self.index], seat(), len(self.devices)
        windows = shuffled(len(self.index), self.seed, number).split(WINDOW * size)
        ordered = np.concatenate([one[np.argsort(-lengths[one], kind="stable")] for one in map(np.asarray, windows)])

        def part(places: Indexes, device: torch.device) -> Part:
            labels, weights = (one[torch.from_numpy(places)] for one in self.wanted)
            return self.texts.inputs(self.index[places], device), labels, weights

        for place in order.tolist()[start:]:
            batch = ordered[place * size : (place + 1) * size]
            mine = enumerate(self.devices, here.rank * local)
            yield [part(batch[i :: local * here.size], device) for i, device in mine if i < len(batch)]


def logits_of(model: torch.nn.Module, texts: Texts, index: Indexes, labels: int) -> torch.Tensor:
    """(len(index), labels) fp32 logits of the texts at `index`, by a model in eval mode; processes share the work."""
    found, device, here = torch.zeros(len(index), labels), texts.encoder.placement.device, seat()

    def score(places: Indexes) -> tuple[Indexes, torch.Tensor]:
        with torch.inference_mode():
            return places, model(*texts.inputs(index[places], device)).float().cpu()

    batches = itertools.islice(like_length_batches(texts.tokens.lengths[index]), here.rank, None, here.size)
    for places, logits in (side_by_side if device.type == "cpu" else map)(score, batches):
        found[torch.from_numpy(places)] = logits
    add_up(found)
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
    """What is fine-tuned: the token ids of all pieces of texts, which of them train, validate and test, and as what.

    `start` is a `...ForSequenceClassification` model to start from.
    """

    encoder: Encoder
    tokens: Tokens
    parts: tuple[Indexes, Indexes, Indexes]
    targets: tuple[Targets, Targets, Targets]
    names: tuple[str, ...]
    config: TrainConfig
    start: Any

    @property
    def batch_size(self) -> int:
        """Texts a step."""
        return self.config.batch_size or BATCH

    @property
    def schedule(self) -> Schedule:
        """The settings' schedule, or the defaults of fine-tuning."""
        config = self.config
        decay = WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
        enough = math.ceil(STEPS / math.ceil(len(self.parts[0]) / self.batch_size))
        epochs, lr = config.epochs or min(max(enough, EPOCHS[0]), EPOCHS[1]), config.lr or LR
        given = Schedule(epochs, lr, decay, config.clip_norm, config.patience, "most accurate", WARMUP)
        return replace(given, max_steps=config.max_steps)

    def thawed(self, depth: Depth) -> tuple[ThawedModel, Texts]:
        """A copy of `start`, thawed to `depth`, and what it reads; nothing is computed or kept yet."""
        model = ThawedModel(self.encoder, copy.deepcopy(self.start), depth, self.tokens)
        below = None if depth == "all" else self.encoder.layers - depth
        return model, Texts(self.encoder, model.ids(self.tokens), below)

    def batches(self, texts: Texts, index: Indexes, wanted: tuple[torch.Tensor, torch.Tensor]) -> TokenBatches:
        """Batches of the pieces at `index`, of which each core or each GPU takes a part."""
        device = self.encoder.placement.device
        devices = [device] * (torch.get_num_threads() if device.type == "cpu" else 1)
        # The engine can follow its inputs to a device; one of several processes has a single device of its own.
        if device.type == "cuda" and self.encoder.engine is not None and seat().size == 1:
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        return TokenBatches(texts, index, wanted, self.batch_size, self.config.seed, devices)

    def fit(
        self,
        depth: Depth,
        checkpoints: Checkpoints | None = None,
        deadline: float = math.inf,
        on_epoch: OnEpoch = lambda *_: False,
    ) -> Thawed:
        """`train`, and what its model says of the texts that it was not trained on."""
        model, texts, history = self.train(depth, checkpoints, deadline, on_epoch)
        held, test = (self.logits(model, texts, part) for part in (1, 2))
        return Thawed(depth, model.whole(), history, held, test, self.schedule)

    def train(
        self,
        depth: Depth,
        checkpoints: Checkpoints | None,
        deadline: float = math.inf,
        on_epoch: OnEpoch = lambda *_: False,
    ) -> tuple[ThawedModel, Texts, History]:
        """Train the top `depth` layers and the head together; the model, what it read, and how it went.

        `on_epoch` is called as by `train.fit`. A `ModelError` if this family cannot be thawed so deep, a `DiskError` if
        something cannot be written, a `TerminatedError` after SIGTERM.
        """
        model, texts = self.thawed(depth)
        if texts.below is not None and self.config.store:
            texts = texts.keep()
        schedule, wanted, held = replace(self.schedule, deadline=deadline), *self.targets[:2]
        classes = class_weights(wanted.labels, len(self.names), self.config.class_weight)
        truth = held.tensors(classes)

        def validate(model: torch.nn.Module) -> tuple[float, float]:
            return loss_and_accuracy(self.logits(model, texts, 1), *truth)

        batches, label = self.batches(texts, self.parts[0], wanted.by_piece(classes)), layers_text(depth)
        return model, texts, fit(model, batches, validate, schedule, on_epoch, checkpoints, f"fine-tuning {label}")

    def logits(self, model: torch.nn.Module, texts: Texts, part: int) -> torch.Tensor:
        """(n, labels) logits of the texts of one of the three parts."""
        return self.targets[part].mean(logits_of(model, texts, self.parts[part], len(self.names)))


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

    A few steps are measured of the shallowest and of the deepest; those between are reckoned.
    """
    memory, disk = psutil.virtual_memory().available, min(map(free_bytes, (out, cache_folder())))
    numbers = range(1, task.encoder.layers + 1) if task.encoder.engine is not None else ()
    rooms: dict[Depth, tuple[int, int]] = {depth: _room(task, depth) for depth in (*numbers, "all")}
    fitting = [depth for depth, (needed, stored) in rooms.items() if needed <= memory and stored <= disk]
    layers = {depth: task.encoder.layers if depth == "all" else depth for depth in fitting}
    measured = {layers[depth]: _seconds(task, depth) for depth in fitting[:1] + fitting[1:][-1:]}
    between = np.interp(list(layers.values()), list(measured), list(measured.values())) if measured else ()
    return [Cost(depth, float(seconds), *rooms[depth]) for depth, seconds in zip(fitting, between, strict=True)]


def free_bytes(place: Path) -> int:
    """What is free on the disk of a folder that may not be there yet."""
    there = next(one for one in (place.absolute(), *place.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def _seconds(task: FineTuning, depth: Depth) -> float:
    """Predicted wall seconds of `task.fit`, by the tokens of its texts, from passes over a few, spread over lengths."""
    model, texts = task.thawed(depth)
    size, lengths, prefix = task.batch_size, texts.tokens.lengths, 0.0
    spread = np.argsort(lengths, kind="stable")[:: -(-len(lengths) // max(PREFIX_TEXTS, 4 * PROBES * size))]
    few = replace(texts, tokens=texts.tokens.take(spread))
    if few.below is not None and task.config.store:
        kept = np.empty((len(few.tokens.ids), task.encoder.hidden), np.float16)
        seconds = timed(lambda: few.fill(kept))
        prefix = 0.0 if texts.path().is_file() else seconds * len(texts.tokens.ids) / len(kept)
        few = replace(few, kept=kept)
    quarters = np.array_split(np.arange(len(spread)), PROBES)
    some = np.concatenate([part[max(0, len(part) - size) // 2 :][:size] for part in quarters])  # batches of like length
    schedule = replace(task.schedule, epochs=3, patience=None, max_steps=None, keep="last")
    wanted = torch.zeros(len(some), dtype=torch.int64), torch.ones(len(some))
    history = fit(model, task.batches(few, some, wanted), lambda model: (0.0, 0.0), schedule)
    if history.interrupted:
        raise KeyboardInterrupt
    step = sum(epoch.seconds for epoch in history.epochs[1:]) / 2  # the first compiles kernels
    forward = timed(lambda: logits_of(model, few, some, len(task.names)))
    train, held, test = (lengths[part].sum() / few.tokens.lengths[some].sum() for part in task.parts)
    return float(prefix + task.schedule.epochs * (train * step + held * forward) + (held + test) * forward)


def timed(action: Callable[[], object]) -> float:
    """Wall seconds of doing something the second time: the first compiles kernels."""
    for _ in range(2):
        begun = time.perf_counter()
        action()
    return time.perf_counter() - begun


def _room(task: FineTuning, depth: Depth) -> tuple[int, int]:
    """Bytes of memory (weights, gradients, moments, activations) and disk (hidden states, checkpoints), reckoned."""
    encoder, hidden = task.encoder, task.encoder.hidden
    weights = sum(one.numel() for one in encoder.weights.values())
    layers = encoder.layers if depth == "all" else depth
    trained = weights if depth == "all" else layers * 12 * hidden**2
    batch = task.batch_size * int(task.tokens.lengths.max())
    states = 0 if depth == "all" or not task.config.store else 2 * hidden * len(task.tokens.ids)
    parts = torch.get_num_threads() if encoder.placement.device.type == "cpu" else 1  # each has gradients of its own
    return 4 * (2 * weights + (6 + parts) * trained) + batch * layers * hidden * 60, states + 3 * 4 * 4 * trained


def deepest_within(costs: Sequence[Cost], seconds: float) -> Cost | None:
    """The deepest that fits the time; None where none does."""
    return next((one for one in reversed(costs) if one.seconds <= seconds), None)
