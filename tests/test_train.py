"""The one loop: against a plain transcription of it in torch, and what it keeps, stops at and repeats."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from headstart import config
from headstart.checkpoints import Checkpoints
from headstart.config import ClassWeight
from headstart.engine import PooledHead
from headstart.errors import InputError, TerminatedError
from headstart.targets import Targets, class_weights, loss_and_accuracy
from headstart.train import AdamW, Epoch, FeatureBatches, History, Part, Schedule, Validate, copy_tensors, fit

SCHEDULE = Schedule(epochs=5, lr=1e-2, weight_decay=0.01)


def separable(n: int = 120, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes, 1 in 3 of the second, that a linear layer can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 3 == 0).long()
    values = torch.randn(n, 8, generator=generator) + 1.5 * labels[:, None]
    return values, labels


def new_model(seed: int = 0, width: int = 16, dropout: float = 0.2) -> Any:
    torch.manual_seed(seed)
    return PooledHead(8, width, 2, dropout)


def state_bytes(model: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def scorer(values: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> Validate:
    """The weighted loss and the accuracy on some rows."""

    def validate(model: nn.Module) -> tuple[float, float]:
        logits = model(values)
        loss = nn.functional.cross_entropy(logits, labels, weight=weights)
        return float(loss), float((logits.argmax(dim=1) == labels).float().mean())

    return validate


def train(
    model: nn.Module,
    schedule: Schedule = SCHEDULE,
    seed: int = 1,
    on_epoch: Callable[[int, Epoch], bool] = lambda number, epoch: False,
) -> History:
    values, labels = separable()
    weights = class_weights(labels.numpy(), 2, "balanced")
    batches = FeatureBatches(values, labels, weights[labels], 16, seed)
    return fit(model, batches, scorer(*separable(60, seed=9), weights), schedule, on_epoch)


# --- what texts should be given


def test_a_weight_of_two_is_a_text_twice_and_of_zero_none() -> None:
    values, labels = separable(60)
    twice = torch.arange(60) % 4 == 0
    weights = torch.where(twice, 2.0, 1.0) * (torch.arange(60) % 5 > 0)
    repeated = torch.repeat_interleave(torch.arange(60), weights.long())
    ends = []
    for rows, counts in ((torch.arange(60), weights), (repeated, torch.ones(len(repeated)))):
        model = new_model(dropout=0.0)
        batches = FeatureBatches(values[rows], labels[rows], counts, 1000, 0)
        fit(model, batches, scorer(values, labels, torch.ones(2)), Schedule(20, 1e-2, 0.01))
        ends.append(model(values))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_of_several_labels_each_is_learnt_by_itself() -> None:
    values, first = separable()
    labels = torch.stack([first, 1 - first, torch.ones_like(first), (values[:, 0] > 0).long()], dim=1)
    wanted = Targets(labels.numpy())
    assert class_weights(labels.numpy(), 4, "auto").tolist() == [1, 1, 1, 1]
    balanced = class_weights(labels.numpy(), 4, "balanced")
    assert balanced[:3].tolist() == [2, 0.5, 0]
    targets, weights = wanted.by_piece(balanced)
    assert weights[0].tolist() == pytest.approx([2, 1, 0, float(balanced[3]) if labels[0, 3] else 1])
    torch.manual_seed(0)
    model = PooledHead(8, 16, 4, 0.0)
    targets, weights = wanted.by_piece(torch.ones(4))

    def validate(model: nn.Module) -> tuple[float, float]:
        return loss_and_accuracy(model(values), targets, weights)

    history = fit(model, FeatureBatches(values, targets, weights, 16, 0), validate, Schedule(30, 1e-2, 0.0))
    logits = model(values).detach()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert history.kept.validation_loss == pytest.approx(float(expected), rel=1e-4)
    assert history.kept.validation_accuracy > 0.8
    assert history.kept.validation_accuracy == float(((logits > 0) == (labels == 1)).all(dim=1).float().mean())


# --- the order of batches


def test_each_epoch_sees_each_row_once_in_an_order_of_seed_and_epoch() -> None:
    values, labels = torch.arange(50).float()[:, None], torch.arange(50)

    def order(seed: int, epoch: int) -> list[int]:
        batches = FeatureBatches(values, labels, torch.ones(len(labels)), 8, seed)
        parts = [part for (part,) in batches.epoch(epoch)]
        assert len(parts) == len(batches) == 7
        assert [len(part[1]) for part in parts] == [8] * 6 + [2]
        for (x,), y, _ in parts:
            assert x[:, 0].tolist() == y.tolist()
        return [int(label) for part in parts for label in part[1]]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1, 2021, 2**32 - 1) for epoch in (0, 1, 7)}
    assert all(sorted(one) == list(range(50)) for one in orders.values())
    assert len({tuple(one) for one in orders.values()}) == len(orders)
    torch.manual_seed(123)  # whatever else draws random numbers
    torch.rand(10)
    assert order(2021, 7) == orders[2021, 7]


# --- the arithmetic


def article_head(hidden: int, width: int, dropout: float) -> Any:
    """The article's own head, LogSoftmax and all."""
    layers = (nn.Linear(hidden, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2), nn.LogSoftmax(dim=1))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_it_is_the_plain_transcription_step_by_step(dropout: float) -> None:
    values, labels = separable()
    held_values, held_labels = separable(60, seed=9)
    weights = torch.tensor(
        compute_class_weight("balanced", classes=np.unique(labels), y=labels.numpy()), dtype=torch.float32
    )
    ours, plain = new_model(dropout=dropout), article_head(8, 16, dropout)
    plain[0].load_state_dict(ours.layers[0].state_dict())
    plain[3].load_state_dict(ours.layers[3].state_dict())
    schedule = Schedule(epochs=4, lr=1e-2, weight_decay=0.01, clip_norm=0.3)

    torch.manual_seed(42)
    history = train(ours, schedule)

    torch.manual_seed(42)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    cross_entropy = nn.NLLLoss(weight=weights)
    losses, held, best, kept = [], [], float("inf"), {}
    for epoch in range(4):
        plain.train()
        total = 0.0
        batches = [
            (x, y) for (((x,), y, _),) in FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1).epoch(epoch)
        ]
        for x, y in batches:
            plain.zero_grad()
            loss = cross_entropy(plain(x), y)
            total += loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
            optimizer.step()
        losses.append(total / len(batches))
        plain.eval()
        with torch.no_grad():
            held.append(cross_entropy(plain(held_values), held_labels).item())
        if held[-1] < best:
            best = held[-1]
            kept = {name: value.clone() for name, value in plain.state_dict().items()}

    np.testing.assert_allclose([epoch.train_loss for epoch in history.epochs], losses, rtol=1e-4)
    np.testing.assert_allclose([epoch.validation_loss for epoch in history.epochs], held, rtol=1e-4)
    torch.testing.assert_close(ours.layers[0].weight.detach(), kept["0.weight"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.layers[3].weight.detach(), kept["3.weight"], rtol=1e-3, atol=1e-4)


def test_it_learns() -> None:
    model = new_model()
    history = train(model, Schedule(epochs=20, lr=1e-2, weight_decay=0.01))
    losses = [epoch.train_loss for epoch in history.epochs]
    assert losses[-1] < 0.3 * losses[0]
    assert history.epochs[history.best].validation_accuracy > 0.9
    assert not model.training
    assert all(epoch.seconds > 0 for epoch in history.epochs)


def test_gradients_are_clipped() -> None:
    # AdamW's steps hardly depend on a gradient's size, so this looks at what it is given: a huge loss, a tiny bound.
    norms = []
    model = new_model(dropout=0.0)
    values, labels = separable()
    huge = FeatureBatches(values * 1e4, labels, torch.ones(len(labels)), 16, 1)
    original = AdamW.step

    def step(self: AdamW, lr: float) -> None:
        gradients = [parameter.grad for parameter in self.named.values()]
        norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients if g is not None]))))
        original(self, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        for clip_norm in (0.25, 1.0, 1e9):
            norms.clear()
            schedule = Schedule(epochs=1, lr=1e-3, weight_decay=0.01, clip_norm=clip_norm)
            fit(model, huge, scorer(values, labels, torch.ones(2)), schedule)
            assert len(norms) == 8
            if clip_norm < 1e9:
                assert max(norms) == pytest.approx(clip_norm, rel=1e-3)
            else:
                assert max(norms) > 100


def test_frozen_parameters_stay_as_they_are() -> None:
    model = new_model()
    model.layers[0].requires_grad_(requires_grad=False)
    before = model.layers[0].weight.clone(), model.layers[3].weight.clone()
    train(model)
    assert torch.equal(model.layers[0].weight, before[0])
    assert not torch.equal(model.layers[3].weight, before[1])


def test_class_weights_count_in_the_loss() -> None:
    values = torch.zeros(30, 8)  # nothing to go by: only the weights can move the answer
    labels = (torch.arange(30) < 10).long()
    shares = {}
    for kind in get_args(ClassWeight):
        model = new_model(width=0)
        weights = class_weights(labels.numpy(), 2, kind)
        schedule = Schedule(epochs=300, lr=2e-2, weight_decay=0.0)
        fit(model, FeatureBatches(values, labels, weights[labels], 30, 0), scorer(values, labels, weights), schedule)
        shares[kind] = torch.softmax(model(values[:1]), dim=1)[0, 1].item()
    assert shares["balanced"] == shares["auto"] == pytest.approx(1 / 2, abs=0.01)
    assert shares["none"] == pytest.approx(1 / 3, abs=0.01)


# --- what is kept, and when it stops


def told(losses: list[float], seen: list[bytes]) -> Callable[[nn.Module], tuple[float, float]]:
    """A validation that gives these losses, and notes the weights it was asked about."""
    answers = iter(losses)

    def validate(model: nn.Module) -> tuple[float, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(state_bytes(model))
        return next(answers), 0.5

    return validate


@pytest.mark.parametrize(
    ("losses", "best"), [([3, 2, 1, 4, 5], 2), ([1, 2, 3, 4, 5], 0), ([5, 4, 3, 2, 1], 4), ([2, 1, 1, 1, 2], 1)]
)
def test_the_epoch_of_the_lowest_validation_loss_is_kept(losses: list[float], best: int) -> None:
    seen: list[bytes] = []
    model = new_model()
    history = fit(model, FeatureBatches(*separable(), torch.ones(120), 16, 1), told(losses, seen), SCHEDULE)
    assert history.best == best
    assert len(history.epochs) == len(set(seen)) == 5
    assert state_bytes(model) == seen[best]


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (3, 8), (None, 8)])
def test_patience(patience: int | None, epochs: int) -> None:
    seen: list[bytes] = []
    losses = [5.0, 4.0, 4.5, 4.0, 3.9, 4.1, 4.2, 4.3]
    schedule = Schedule(epochs=8, lr=1e-3, weight_decay=0.0, patience=patience)
    history = fit(new_model(), FeatureBatches(*separable(), torch.ones(120), 16, 1), told(losses, seen), schedule)
    assert len(history.epochs) == epochs


def test_a_caller_may_stop_it() -> None:
    calls: list[tuple[int, Epoch]] = []

    def enough(number: int, epoch: Epoch) -> bool:
        calls.append((number, epoch))
        return number == 2

    history = train(new_model(), on_epoch=enough)
    assert [number for number, _ in calls] == [0, 1, 2]
    assert [epoch for _, epoch in calls] == history.epochs
    assert not history.interrupted


@dataclass(frozen=True)
class InterruptedBatches(FeatureBatches):
    """Ctrl-C when a batch is asked for: in the middle of the fourth epoch."""

    at: tuple[int, int] = (3, 4)

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        for place, batch in enumerate(super().epoch(number, start), start):
            if (number, place) == self.at:
                raise KeyboardInterrupt
            yield batch


def test_ctrl_c_while_training_keeps_the_best_so_far() -> None:
    seen: list[bytes] = []
    model = new_model()
    batches = InterruptedBatches(*separable(), torch.ones(120), 16, 1)
    history = fit(model, batches, told([3, 1, 2, 0, 0], seen), SCHEDULE)
    assert (history.interrupted, history.best, len(history.epochs)) == (True, 3, 4), "the epoch cut short counts"
    assert history.steps == 3 * 8 + 4
    assert state_bytes(model) == seen[3]
    assert not model.training


def test_ctrl_c_in_the_first_epoch_keeps_what_it_has_learnt() -> None:
    model, seen = new_model(), list[bytes]()
    batches = InterruptedBatches(*separable(), torch.ones(120), 16, 1, at=(0, 2))
    history = fit(model, batches, told([3], seen), SCHEDULE)
    assert (history.interrupted, history.best, len(history.epochs), history.steps) == (True, 0, 1, 2)
    assert state_bytes(model) == seen[0] != state_bytes(new_model())


def test_ctrl_c_before_the_first_step_is_passed_on() -> None:
    batches = InterruptedBatches(*separable(), torch.ones(120), 16, 1, at=(0, 0))
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), batches, told([], []), SCHEDULE)


def test_ctrl_c_while_a_checkpoint_is_written_keeps_the_best_so_far(tmp_path: Path) -> None:
    class Interrupted(Checkpoints):
        def save(self, step: int, *content: Any) -> None:
            if step == 16:
                raise KeyboardInterrupt
            super().save(step, *content)

    seen: list[bytes] = []
    model = new_model()
    batches, checkpoints = FeatureBatches(*separable(), torch.ones(120), 16, 1), Interrupted(tmp_path, 1e9)
    history = fit(model, batches, told([3, 1], seen), SCHEDULE, checkpoints=checkpoints)
    assert (history.interrupted, history.best, len(history.epochs)) == (True, 1, 2)
    assert state_bytes(model) == seen[1]


def test_it_ends_after_so_many_steps_at_the_rates_of_the_whole() -> None:
    schedule = Schedule(epochs=5, lr=1e-2, weight_decay=0.0, warmup=0.1)
    steps = given_to_adamw(replace(schedule, max_steps=19), model := new_model(dropout=0.0))
    assert [step["lr"] for step in steps] == [schedule.lr_at(step, 40) for step in range(19)]
    history = train(new_model(dropout=0.0), replace(schedule, max_steps=19))
    assert (history.steps, len(history.epochs), history.interrupted) == (19, 3, False)
    whole = new_model(dropout=0.0)
    train(whole, replace(schedule, max_steps=40))
    unlimited = new_model(dropout=0.0)
    train(unlimited, schedule)
    assert state_bytes(whole) == state_bytes(unlimited) != state_bytes(model)


def test_ctrl_c_while_validating_keeps_the_best_so_far() -> None:
    seen: list[bytes] = []
    known = told([3, 1, 2], seen)

    def validate(model: nn.Module) -> tuple[float, float]:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return known(model)

    model = new_model()
    history = fit(model, FeatureBatches(*separable(), torch.ones(120), 16, 1), validate, SCHEDULE)
    assert (history.interrupted, history.best, len(history.epochs)) == (True, 1, 3)
    assert history.steps == 3 * 8, "those of epochs that count"
    assert state_bytes(model) == seen[1]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_a_step_comes_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, original, before = list[float](), AdamW.step, signal.getsignal(signal.SIGINT)

    def step(self: AdamW, lr: float) -> None:
        rates.append(lr)
        if len(rates) == 11:
            signal.raise_signal(signal.SIGINT)
        original(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        cut = train(model := new_model(dropout=0.0), replace(SCHEDULE, keep="last"))
    assert (cut.interrupted, cut.steps, len(rates)) == (True, 11, 11)
    train(same := new_model(dropout=0.0), replace(SCHEDULE, keep="last", max_steps=11))
    assert state_bytes(model) == state_bytes(same)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_best_weights_are_noted_comes_when_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, times, loop = list[bytes](), list[int](), sys.modules[fit.__module__]

    def interrupted(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
        times.append(len(seen))
        if times.count(2) == 1:
            signal.raise_signal(signal.SIGINT)
        copy_tensors(source, target)

    monkeypatch.setattr(loop, "copy_tensors", interrupted)
    batches = FeatureBatches(*separable(), torch.ones(120), 16, 1)
    history = fit(model := new_model(), batches, told([3, 2, 1], seen), SCHEDULE)
    assert (history.interrupted, history.best, len(history.epochs), history.steps) == (True, 1, 2, 16)
    assert state_bytes(model) == seen[1]


def test_ctrl_c_before_there_is_anything_to_keep_is_passed_on() -> None:
    def validate(model: nn.Module) -> tuple[float, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), FeatureBatches(*separable(), torch.ones(120), 16, 1), validate, SCHEDULE)


# --- the same again


def test_the_same_seed_gives_the_same_bytes() -> None:
    states = []
    for seed in (1, 1, 2):
        model = new_model(seed)
        train(model, seed=seed)
        states.append(state_bytes(model))
    assert states[0] == states[1] != states[2]


def test_it_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train(new_model())
    assert capfd.readouterr() == ("", "")


# --- fine-tuning's schedule


def test_without_warmup_the_learning_rate_is_constant() -> None:
    assert {SCHEDULE.lr_at(step, 50) for step in range(50)} == {SCHEDULE.lr}


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 40), (0.1, 9), (0.5, 7), (0.0, 5), (0.1, 1)])
def test_the_learning_rate_rises_then_falls_to_nothing(warmup: float, steps: int) -> None:
    schedule = Schedule(epochs=1, lr=2.0, weight_decay=0.0, warmup=warmup)
    rates = [schedule.lr_at(step, steps) for step in range(steps)]
    rising = int(np.ceil(warmup * steps))
    for step, rate in enumerate(rates):
        if step < rising:
            assert rate == pytest.approx(2.0 * (step + 1) / rising)
        else:
            assert rate == pytest.approx(2.0 * (steps - step) / (steps - rising))
    assert max(rates) == 2.0
    assert min(rates) > 0, "no step is wasted"
    assert schedule.lr_at(steps, steps) == 0


def given_to_adamw(schedule: Schedule, model: nn.Module) -> list[dict[str, Any]]:
    """Each step's rate, and the decay of each parameter by its name."""
    seen: list[dict[str, Any]] = []
    original = AdamW.step

    def step(self: AdamW, lr: float) -> None:
        seen.append({"lr": lr, "decay": {name: decay for decay, names in self.groups.items() for name in names}})
        original(self, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        train(model, schedule)
    return seen


def test_with_warmup_every_step_has_its_rate_and_only_matrices_decay() -> None:
    schedule = Schedule(epochs=3, lr=1e-2, weight_decay=0.3, warmup=0.25)
    steps = given_to_adamw(schedule, new_model())
    assert [step["lr"] for step in steps] == [schedule.lr_at(step, 24) for step in range(24)]
    assert steps[0]["decay"] == {
        **{"layers.0.weight": 0.3, "layers.0.bias": 0.0, "layers.3.weight": 0.3, "layers.3.bias": 0.0}
    }
    steps = given_to_adamw(replace(schedule, warmup=None), new_model())
    assert set(steps[0]["decay"].values()) == {0.3}
    assert {step["lr"] for step in steps} == {1e-2}


@pytest.mark.parametrize(("keep", "best"), [("lowest loss", 2), ("most accurate", 3), ("last", 4)])
def test_which_epoch_is_kept(keep: Any, best: int) -> None:
    answers = iter([(3.0, 0.6), (2.5, 0.9), (1.0, 0.5), (2.0, 0.9), (4.0, 0.1)])
    seen: list[bytes] = []

    def validate(model: nn.Module) -> tuple[float, float]:
        seen.append(state_bytes(model))
        return next(answers)

    model = new_model()
    history = fit(model, FeatureBatches(*separable(), torch.ones(120), 16, 1), validate, replace(SCHEDULE, keep=keep))
    assert history.best == best
    assert state_bytes(model) == seen[best]


def test_it_stops_at_the_deadline_with_an_epoch_cut_short() -> None:
    seen: list[int] = []

    class Counted(FeatureBatches):
        def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
            for batch in super().epoch(number, start):
                seen.append(number)
                yield batch

    history = fit(
        new_model(), Counted(*separable(), torch.ones(120), 16, 1), told([1.0], []), replace(SCHEDULE, deadline=0.0)
    )
    assert seen == [0]
    assert len(history.epochs) == 1, "it was validated, so there is something to keep"


# --- parts of a batch


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Parts are computed side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class InParts(FeatureBatches):
    """Each batch cut into parts, not all as large."""

    parts: int = 1

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        for (((values,), labels, weights),) in super().epoch(number, start):
            pieces = [slice(part, None, self.parts) for part in range(self.parts)]
            yield [((values[piece],), labels[piece], weights[piece]) for piece in pieces if len(labels[piece])]


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_parts_have_the_gradient_of_the_whole_batch(
    parts: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, labels = separable(118)  # the last batch is smaller, and is cut too
    weights = class_weights(labels.numpy(), 2, "balanced")
    found: dict[int, list[torch.Tensor]] = {1: [], parts: []}
    original = nn.utils.get_total_norm

    for number, gradients in found.items():

        def note(given: Sequence[torch.Tensor], into: Any = gradients, **more: Any) -> object:
            into.append(torch.cat([one.flatten() for one in given]).clone())
            return original(given, **more)

        monkeypatch.setattr(nn.utils, "get_total_norm", note)
        batches = InParts(values, labels, weights[labels], 16, 1, number)
        schedule = Schedule(epochs=1, lr=1e-3, weight_decay=0.0)
        history = fit(new_model(dropout=0.0), batches, scorer(values, labels, weights), schedule)
        found[number].append(torch.tensor([history.epochs[0].train_loss]))
    assert len(found[1]) == len(found[parts]) == 9
    torch.testing.assert_close(found[parts][0], found[1][0], rtol=0, atol=1e-6)
    for one, other in zip(found[parts], found[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_order_in_which_parts_are_ready_does_not_matter(two_threads: None) -> None:
    states = []
    for _ in range(3):
        model = new_model(dropout=0.0)
        values, labels = separable()
        fit(
            model,
            InParts(values, labels, torch.ones(len(labels)), 16, 1, 4),
            scorer(values, labels, torch.ones(2)),
            SCHEDULE,
        )
        states.append(state_bytes(model))
    assert len(set(states)) == 1


# --- memory


class Greedy(nn.Module):  # type: ignore[misc]  # mypy does not read torch
    """A model that asks for more memory than any machine has for over `most` texts at once."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch.empty(1 << 60 if self.training and len(inputs) > self.most else 1, dtype=torch.uint8)
        return self.model(inputs)


def test_when_memory_runs_out_batches_are_halved_and_gradients_accumulated(two_threads: None, tmp_path: Path) -> None:
    values, labels = separable(118)
    weights = class_weights(labels.numpy(), 2, "balanced")
    validate = scorer(values, labels, weights)
    said: list[str] = []
    ends = []
    for most in (16, 3):
        for parts in (1, 2):
            model = new_model(dropout=0.0)
            batches = InParts(values, labels, weights[labels], 16, 1, parts)
            checkpoints = Checkpoints(tmp_path / f"{most}-{parts}", 1e9, said.append)
            history = fit(Greedy(model, most), batches, validate, SCHEDULE, checkpoints=checkpoints)
            ends.append((history.epochs[-1].train_loss, history.epochs[-1].validation_loss))
    assert said == [
        *(f"Memory ran out: each batch is now computed in {times} times as many pieces." for times in (2, 4, 8)),
        *(f"Memory ran out: each batch is now computed in {times} times as many pieces." for times in (2, 4)),
    ]
    np.testing.assert_allclose(ends, np.tile(ends[0], (4, 1)), rtol=1e-4)


def test_a_resumed_run_has_pieces_of_the_same_size(tmp_path: Path) -> None:
    values, labels = separable()
    validate = scorer(values, labels, torch.ones(2))

    def end(batches: FeatureBatches, checkpoints: Checkpoints | None = None) -> bytes:
        model = new_model(dropout=0.0)
        fit(Greedy(model, 5), batches, validate, TUNED, checkpoints=checkpoints)
        return state_bytes(model)

    expected = end(FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1))
    with pytest.raises(TerminatedError):
        end(Stopping(values, labels, torch.ones(len(labels)), 16, 1, (1, 2)), Checkpoints(tmp_path, 1e9))
    found = Checkpoints(tmp_path, 1e9).newest()
    assert found is not None
    assert found[1]["halvings"] == 2
    assert end(FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1), Checkpoints(tmp_path, 1e9)) == expected


def test_where_one_text_is_too_much_the_sentence_says_what_to_do() -> None:
    values, labels = separable()
    with pytest.raises(InputError, match=r"even with one text at a time\. Thaw fewer layers"):
        fit(
            Greedy(new_model(), 0),
            FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1),
            scorer(values, labels, torch.ones(2)),
            SCHEDULE,
        )


def test_any_other_error_is_passed_on() -> None:
    values, labels = separable()
    with pytest.raises(RuntimeError, match="must match the size"):
        fit(
            new_model(),
            FeatureBatches(values[:, :5], labels, torch.ones(len(labels)), 16, 1),
            scorer(values, labels, torch.ones(2)),
            SCHEDULE,
        )


# --- stopped and resumed

TUNED = Schedule(epochs=4, lr=1e-2, weight_decay=0.1, patience=3, keep="most accurate", warmup=0.1)


class StoppedError(Exception):
    """Stands for the death of the process."""


@dataclass(frozen=True)
class Stopping(FeatureBatches):
    """Dies, or is sent SIGTERM, when a batch is asked for."""

    at: tuple[int, int] = (0, 0)
    by: str = "SIGTERM"

    def epoch(self, number: int, start: int = 0) -> Iterator[Sequence[Part]]:
        for place, batch in enumerate(super().epoch(number, start), start):
            if (number, place) == self.at:
                if self.by != "SIGTERM":
                    raise StoppedError
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def tune(batches: FeatureBatches, checkpoints: Checkpoints | None = None, schedule: Schedule = TUNED) -> Any:
    """The bytes and the history of a model with a frozen layer, that has no dropout, as fine-tuned ones have none."""
    model = new_model(dropout=0.0, width=8)
    model.layers[0].bias.requires_grad_(requires_grad=False)
    validate = scorer(*separable(60, seed=9), torch.ones(2))
    history = fit(model, batches, validate, schedule, checkpoints=checkpoints)
    numbers = [(epoch.train_loss, epoch.validation_loss, epoch.validation_accuracy) for epoch in history.epochs]
    return state_bytes(model), numbers, history.best


@pytest.mark.parametrize(
    ("by", "at"),
    [
        *(("SIGTERM", at) for at in ((0, 0), (0, 3), (1, 0), (2, 5), (3, 7))),
        *(("death", at) for at in ((0, 0), (2, 5))),
    ],
)
def test_resumed_training_ends_in_the_same_bytes(at: tuple[int, int], by: str, tmp_path: Path) -> None:
    values, labels = separable()
    expected = tune(FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1))
    minutes = 1e9 if by == "SIGTERM" else 1e-9
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((TerminatedError, StoppedError)) as ended:
        tune(Stopping(values, labels, torch.ones(len(labels)), 16, 1, at, by), Checkpoints(tmp_path, minutes))
    assert signal.getsignal(signal.SIGTERM) == before
    done = 8 * at[0] + at[1] + (by == "SIGTERM")  # the step that was asked for is taken first
    written = sorted(
        (int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*")), reverse=True
    )
    assert written[:1] == ([done] if done else [])
    if isinstance(ended.value, TerminatedError):
        assert ended.value.exit_code == 143
        assert "--resume goes on from it" in str(ended.value)
    said: list[str] = []
    assert (
        tune(
            FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1), Checkpoints(tmp_path, minutes, said.append)
        )
        == expected
    )
    assert [one.split(" from ")[0] for one in said] == ["Resumed"] * (done > 0)


def test_a_run_stopped_over_and_over_ends_in_the_same_bytes(tmp_path: Path) -> None:
    values, labels = separable()
    expected = tune(FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1))
    for at in ((0, 2), (0, 6), (1, 1), (1, 7), (3, 0)):
        with pytest.raises(TerminatedError):
            tune(Stopping(values, labels, torch.ones(len(labels)), 16, 1, at), Checkpoints(tmp_path, 1e9))
    assert tune(FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1), Checkpoints(tmp_path, 1e9)) == expected


@pytest.mark.parametrize("at", [(0, 2), (2, 2), (1, 7)])
def test_a_run_stopped_at_the_last_step_allowed_ends_in_the_same_bytes(at: tuple[int, int], tmp_path: Path) -> None:
    data = (*separable(), torch.ones(120), 16, 1)
    schedule = replace(TUNED, max_steps=8 * at[0] + at[1] + 1)
    expected = tune(FeatureBatches(*data), schedule=schedule)
    with pytest.raises(TerminatedError):
        tune(Stopping(*data, at), Checkpoints(tmp_path, 1e9), schedule)
    assert tune(FeatureBatches(*data), Checkpoints(tmp_path, 1e9), schedule) == expected


def test_patience_that_had_run_out_has_still_run_out_when_resumed(tmp_path: Path) -> None:
    values, labels = separable()
    schedule = replace(TUNED, epochs=9, patience=1, lr=1e-12)  # nothing gets better
    expected = tune(
        FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1), Checkpoints(tmp_path, 1e9), schedule
    )
    assert len(expected[1]) < 9
    assert (
        tune(FeatureBatches(values, labels, torch.ones(len(labels)), 16, 1), Checkpoints(tmp_path, 1e9), schedule)
        == expected
    )


def test_sigterm_without_checkpoints_says_that_nothing_was_kept() -> None:
    with pytest.raises(TerminatedError, match="nothing was kept"):
        tune(Stopping(*separable(), torch.ones(120), 16, 1, (1, 2)))


@pytest.mark.parametrize("schedule", [SCHEDULE, replace(SCHEDULE, max_steps=8), replace(SCHEDULE, epochs=1)])
def test_sigterm_while_validating_is_heeded_after_the_epoch(schedule: Schedule, tmp_path: Path) -> None:
    def validate(model: nn.Module) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0, 0.5

    batches = FeatureBatches(*separable(), torch.ones(120), 16, 1)
    with pytest.raises(TerminatedError):
        fit(new_model(), batches, validate, schedule, checkpoints=Checkpoints(tmp_path, 1e9))
    found = Checkpoints(tmp_path, 1.0).newest()
    assert found is not None
    assert (len(found[1]["epochs"]), found[1]["done"]) == (1, 0)


def test_training_does_not_start_torchs_compiler() -> None:
    # torch.optim's classes import it when one is made, which takes a second of every run.
    code = """
import sys, torch
from headstart.train import FeatureBatches, Schedule, fit
model = torch.nn.Linear(3, 2)
batches = FeatureBatches(torch.ones(8, 3), torch.arange(8) % 2, torch.ones(8), 4, 1)
before = model.weight.detach().clone()
fit(model, batches, lambda _: (0.0, 0.0), Schedule(2, 0.1, 0.0, keep="last"))
assert not torch.equal(model.weight, before)
assert model.weight.grad is None  # that is memory for nothing
assert "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
