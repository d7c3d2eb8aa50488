"""Which head is picked on validation data, what a person has set, and that the same seed picks the same."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart import config, trials
from headstart.encoder import Encoder, choose_placement, load_encoder
from headstart.features import Features, frozen_features
from headstart.train import History, fit
from headstart.trials import Task, TrainedHead, best_of, layer_sets, train_head

NOUNS = ("film", "hotel", "soup", "phone", "app", "waiter", "room", "story", "battery", "service")
PAIRS = (("superb", "awful"), ("lovely", "boring"), ("great", "broken"), ("charming", "rude"))
TEXTS = [f"the {noun} was {word}" for pair in PAIRS for noun in NOUNS for word in pair]
LABELS = np.array([i % 2 == 0 for i in range(len(TEXTS))], dtype=np.int64)
HELD = np.arange(len(TEXTS)) % 5 == 0  # validation


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return load_encoder(str(tiny_bert), choose_placement("cpu", "fp32"))


@pytest.fixture(scope="module")
def features(encoder: Encoder, _session_cache: None) -> Features:
    return frozen_features(encoder, encoder.tokenizer(TEXTS))


def task_of(encoder: Encoder, features: Features, **given: Any) -> Task:
    settings = config.settings("sample", **{"epochs": 8, "batch_size": 16, **given})
    parts = [dataclasses.replace(features, values=features.values[rows]) for rows in (~HELD, HELD)]
    return Task(encoder, parts[0], parts[1], LABELS[~HELD], LABELS[HELD], ("bad", "good"), settings)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[TrainedHead]:
    """Every head that is trained, in order, as the search sees it."""
    seen: list[TrainedHead] = []

    def best_and_note(tried: Sequence[TrainedHead]) -> TrainedHead:
        seen[:] = tried
        return best_of(tried)

    monkeypatch.setattr(trials, "best_of", best_and_note)
    return seen


def test_the_head_with_the_lowest_validation_loss_is_picked(
    encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    picked = train_head(task_of(encoder, features))
    assert picked.tried == len(attempts) >= 20
    assert picked.validation_loss == min(one.validation_loss for one in attempts)
    assert len({one.validation_loss for one in attempts}) > 10, "rivals should differ"
    assert len({one.features for one in attempts}) == len(layer_sets(features.layout))
    # The loss is of the weights that it comes with.
    task = task_of(encoder, features)
    loss = torch.nn.functional.cross_entropy(picked.logits(task.validation), torch.from_numpy(LABELS[HELD]))
    assert float(loss) == pytest.approx(picked.validation_loss, rel=1e-4)
    assert float(loss) < np.log(2), "better than knowing nothing"


def test_the_two_best_sets_of_layers_are_refined(
    encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    train_head(task_of(encoder, features))
    sets = len(layer_sets(features.layout))
    leaders = sorted(attempts[:sets], key=lambda one: one.validation_loss)[:2]
    assert {one.features for one in attempts[sets:]} == {one.features for one in leaders}
    for leader in leaders:
        shapes = [
            (one.spec, one.schedule.lr, one.schedule.weight_decay)
            for one in attempts
            if one.features == leader.features
        ]
        assert len(shapes) == len(set(shapes)) >= 6


def test_a_trial_that_is_far_behind_is_stopped(
    encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    train_head(task_of(encoder, features, patience=100))
    lengths = [len(one.history.epochs) for one in attempts]
    assert set(lengths) == {trials.PRUNE_AFTER, 8}
    for place, one in enumerate(attempts):
        if place == 0:
            assert lengths[0] == 8
            continue
        lead = min(attempts[:place], key=lambda rival: rival.validation_loss).history.epochs[: trials.PRUNE_AFTER]
        bound = trials.PRUNE_MARGIN * min(epoch.validation_loss for epoch in lead)
        stopped = lengths[place] == trials.PRUNE_AFTER
        assert stopped == (one.history.epochs[trials.PRUNE_AFTER - 1].validation_loss > bound)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 2e-3},
        {"head_width": 24},
        {"head_width": 0},
        {"weight_decay": 0.5},
        {"weight_decay": 0.0},
        {"head_features": ("mean-1", "cls")},
        {"lr": 5e-4, "head_width": 8, "head_features": ("mean-2",)},
    ],
)
def test_what_the_person_has_set_is_kept(
    given: dict[str, Any], encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    picked = train_head(task_of(encoder, features, **given))
    assert len(attempts) == picked.tried > 1
    for one in (picked, *attempts):
        assert one.spec is not None
        assert one.schedule.lr == given.get("lr", one.schedule.lr)
        assert one.spec.width == given.get("head_width", one.spec.width)
        assert one.schedule.weight_decay == given.get("weight_decay", one.schedule.weight_decay)
        assert one.features == one.spec.features == given.get("head_features", one.features)
    shapes = [(one.spec, one.schedule.lr, one.schedule.weight_decay) for one in attempts]
    assert len(set(shapes)) == len(shapes), "nothing is tried twice"


def test_with_everything_set_there_is_little_to_try(encoder: Encoder, features: Features) -> None:
    given = {"lr": 1e-3, "head_width": 0, "weight_decay": 0.1, "head_features": ("mean-3",)}
    assert train_head(task_of(encoder, features, **given)).tried <= 2


def test_the_same_seed_picks_the_same_head(encoder: Encoder, features: Features) -> None:
    picked: list[tuple[tuple[str, ...], float, bytes]] = []
    for seed in (4, 4, 5):
        torch.manual_seed(len(picked))  # what came before does not matter
        one = train_head(task_of(encoder, features, seed=seed))
        picked.append((one.features, one.validation_loss, one.logits(features).numpy().tobytes()))
    assert picked[0] == picked[1]
    assert picked[0][2] != picked[2][2]


def test_ctrl_c_keeps_the_best_so_far(encoder: Encoder, features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[History] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(fit(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(trials, "fit", interrupted)
    picked = train_head(task_of(encoder, features))
    assert picked.history.interrupted
    assert picked.tried == 4
    losses = [history.epochs[history.best].validation_loss for history in calls]
    assert picked.validation_loss == min(losses)


def test_ctrl_c_before_the_first_head_is_passed_on(
    encoder: Encoder, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_head(task_of(encoder, features))


def test_the_articles_head_is_not_searched(encoder: Encoder, features: Features) -> None:
    trained = train_head(task_of(encoder, features, recipe="article", epochs=10, batch_size=32))
    assert trained.tried == 1
    assert trained.features == ("pooler",)
    assert trained.spec is not None
    assert (trained.spec.width, trained.spec.dropout, trained.spec.standardize) == (512, 0.2, False)
    assert (trained.schedule.lr, trained.schedule.clip_norm, trained.schedule.patience) == (1e-5, 1.0, None)
    assert len(trained.history.epochs) == 10


def test_the_description_says_what_was_chosen(encoder: Encoder, features: Features) -> None:
    pooled = train_head(task_of(encoder, features, head_width=0, head_features=("mean-1", "mean-2"))).description()
    assert pooled["kind"] == "pooled"
    assert all(word in pooled["description"] for word in ("pooled, linear", "layer", "1", "2", "best of"))
    native = train_head(task_of(encoder, features, head="native")).description()
    assert native["kind"] == "native"
    for one in (pooled, native):
        assert json.loads(json.dumps(one))["lr"] > 0


def test_layer_sets_are_distinct_and_hold_the_top_and_everything() -> None:
    for layout in (
        ("cls", *(f"mean-{i}" for i in range(7))),
        ("cls", "mean-4", "mean-7", "mean-9", "mean-12"),
        ("cls", "mean-2"),
    ):
        sets = layer_sets(layout)
        assert len(set(sets)) == len(sets)
        assert (layout[-1],) in sets
        assert layout in sets
        assert layout[1:] in sets
        assert all(set(one) <= set(layout) for one in sets)
