"""Which head is picked on validation data, what a person has set, and that the same seed picks the same."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart import config, trials
from headstart.encoder import Encoder, choose_placement
from headstart.errors import InputError
from headstart.features import Features, frozen_features
from headstart.targets import Targets
from headstart.train import History, fit
from headstart.trials import (
    Task,
    TrainedHead,
    best_of,
    in_folds,
    layer_sets,
    learning_curve,
    one_thread,
    refit,
    train_head,
)

NOUNS = ("film", "hotel", "soup", "phone", "app", "waiter", "room", "story", "battery", "service")
PAIRS = (("superb", "awful"), ("lovely", "boring"), ("great", "broken"), ("charming", "rude"))
TEXTS = [f"the {noun} was {word}" for pair in PAIRS for noun in NOUNS for word in pair]
LABELS = np.array([i % 2 == 0 for i in range(len(TEXTS))], dtype=np.int64)
HELD = np.arange(len(TEXTS)) % 5 == 0  # validation


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return Encoder(str(tiny_bert), choose_placement("cpu", "fp32"))


@pytest.fixture(scope="module")
def features(encoder: Encoder, _session_cache: None) -> Features:
    return frozen_features(encoder, encoder.tokenizer(TEXTS))


def task_of(encoder: Encoder, features: Features, **given: Any) -> Task:
    settings = config.settings("sample", **{"epochs": 8, "batch_size": 16, **given})
    parts = [features.take(np.flatnonzero(rows)) for rows in (~HELD, HELD)]
    return Task(encoder, parts[0], parts[1], Targets(LABELS[~HELD]), Targets(LABELS[HELD]), ("bad", "good"), settings)


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
    assert picked.history.kept.validation_loss == min(one.history.kept.validation_loss for one in attempts)
    assert len({one.history.kept.validation_loss for one in attempts}) > 10, "rivals should differ"
    assert len({one.features for one in attempts}) == len(layer_sets(features.layout))
    # The loss is of the weights that it comes with.
    task = task_of(encoder, features)
    loss = torch.nn.functional.cross_entropy(picked.logits(task.validation), torch.from_numpy(LABELS[HELD]))
    assert float(loss) == pytest.approx(picked.history.kept.validation_loss, rel=1e-4)
    assert float(loss) < np.log(2), "better than knowing nothing"


def test_the_two_best_sets_of_layers_are_refined(
    encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    train_head(task_of(encoder, features))
    sets = len(layer_sets(features.layout))
    leaders = sorted(attempts[:sets], key=lambda one: one.history.kept.validation_loss)[:2]
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
    assert lengths[0] == 8, "the first has no rival"
    assert {8} < set(lengths) <= {*trials.PRUNE, 8}
    for place, one in enumerate(attempts[1:], start=1):
        lead = min(attempts[:place], key=lambda rival: rival.history.kept.validation_loss).history.epochs
        expected = 8
        for after, margin in sorted(trials.PRUNE.items(), reverse=True):
            bound = margin * min(epoch.validation_loss for epoch in lead[:after])
            if len(one.history.epochs) >= after and one.history.epochs[after - 1].validation_loss > bound:
                expected = after
        assert lengths[place] == expected


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
        picked.append((one.features, one.history.kept.validation_loss, one.logits(features).numpy().tobytes()))
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
    losses = [history.kept.validation_loss for history in calls]
    assert picked.history.kept.validation_loss == min(losses)


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


# --- optuna, large tables, folds


def test_optuna_tries_as_many_heads_as_asked_and_stops_weak_ones(
    encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    picked = train_head(task_of(encoder, features, trials=30, patience=100))
    assert picked.tried == len(attempts) == 30
    assert picked.history.kept.validation_loss == min(one.history.kept.validation_loss for one in attempts)
    first = attempts[0]
    assert first.spec is not None
    assert (first.features, first.spec.width, first.schedule.lr) == (features.layout, 128, 1e-3)
    lengths = [len(one.history.epochs) for one in attempts]
    assert min(lengths) < 8 == max(lengths), "some are stopped, none of the best is"
    assert len({one.schedule.lr for one in attempts}) == 30
    assert len({one.features for one in attempts}) > 3


def test_optuna_follows_the_seed_and_keeps_what_is_set(
    encoder: Encoder, features: Features, attempts: list[TrainedHead]
) -> None:
    chosen = []
    for seed in (1, 1, 2):
        train_head(task_of(encoder, features, trials=6, seed=seed, lr=2e-3, head_features=("mean-1",)))
        assert {one.schedule.lr for one in attempts} == {2e-3}
        assert {one.features for one in attempts} == {("mean-1",)}
        chosen.append([(one.spec, one.schedule.weight_decay, one.history.kept.validation_loss) for one in attempts])
    assert chosen[0] == chosen[1] != chosen[2]


def test_without_optuna_the_message_says_how_to_get_it(
    encoder: Encoder, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'headstart\[tune\]'"):
        train_head(task_of(encoder, features, trials=3))


def test_a_search_over_many_texts_takes_some_and_the_winner_all(
    encoder: Encoder, features: Features, attempts: list[TrainedHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counting(model: Any, batches: Any, *rest: Any, **options: Any) -> History:
        sizes.append(len(batches.labels))
        return fit(model, batches, *rest, **options)

    monkeypatch.setattr(trials, "SEARCH_ROWS", 20)
    monkeypatch.setattr(trials, "fit", counting)
    task = task_of(encoder, features)
    picked = train_head(task)
    assert sizes == [20] * len(attempts) + [len(task.train)]
    assert picked.spec == best_of(attempts).spec
    assert picked.tried == len(attempts)


def test_each_fold_is_scored_by_a_head_that_has_not_seen_it(
    encoder: Encoder, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(encoder, features, folds=4)
    head = train_head(task)
    seen: list[tuple[set[int], set[int], int]] = []

    def noting(fold: Task, like: TrainedHead) -> TrainedHead:
        trained = refit(fold, like)
        seen.append((set(fold.train.rows.tolist()), set(fold.validation.rows.tolist()), len(trained.history.epochs)))
        return trained

    monkeypatch.setattr(trials, "refit", noting)
    groups = np.arange(len(task.train)) // 2  # two texts share each group
    logits, fold_of = in_folds(task, head, groups)
    assert len(seen) == 4
    everyone = set(task.train.rows.tolist())
    for trained_on, held, epochs in seen:
        assert trained_on | held == everyone
        assert not trained_on & held
        assert epochs == head.history.best + 1
    assert sorted(np.unique(fold_of)) == [0, 1, 2, 3]
    assert (fold_of[0::2] == fold_of[1::2]).all(), "copies share a fold"
    accuracy = float((logits.argmax(dim=1).numpy() == task.wanted.labels).mean())
    assert accuracy > 0.6
    shuffled = replace(task, wanted=Targets(np.random.default_rng(0).permutation(task.wanted.labels)))
    noise, _ = in_folds(shuffled, head, np.arange(len(task.train)))
    assert float((noise.argmax(dim=1).numpy() == shuffled.wanted.labels).mean()) < 0.75, "labels leak into their fold"


def test_more_folds_than_rows_of_a_label_are_refused(encoder: Encoder, features: Features) -> None:
    task = task_of(encoder, features, folds=40)
    with pytest.raises(InputError, match="--folds 40: the rarest label has only 32 rows"):
        in_folds(task, train_head(task_of(encoder, features)), np.arange(len(task.train)))


def test_a_refitted_head_has_its_last_epochs_weights(encoder: Encoder, features: Features) -> None:
    task = task_of(encoder, features)
    head = train_head(task)
    again = refit(task, head)
    assert again.history.best == len(again.history.epochs) - 1 == head.history.best
    np.testing.assert_array_equal(again.logits(features).numpy(), head.logits(features).numpy())


def test_heads_train_on_one_thread_and_leave_the_others(encoder: Encoder, features: Features) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_learning_curve_is_of_parts_of_the_texts_and_ends_in_the_head(encoder: Encoder, features: Features) -> None:
    whole = task_of(encoder, features, head="native")
    head = train_head(whole)
    curve = learning_curve(whole, head)
    n = len(whole.train)
    assert [point["texts"] for point in curve] == [round(n / 8), round(n / 2), n]
    assert curve[-1]["validation_accuracy"] == head.history.kept.validation_accuracy
    assert learning_curve(whole, head) == curve, "the same seed, the same curve"


def test_where_all_but_dropout_is_given_one_head_is_trained(encoder: Encoder, features: Features) -> None:
    given: dict[str, Any] = {"head_features": ("mean-2",), "head_width": 8, "lr": 1e-2, "weight_decay": 0.01}
    assert train_head(task_of(encoder, features, **given)).tried == 1
    assert train_head(task_of(encoder, features, **{**given, "lr": None})).tried > 1
