"""Fine-tuning: the layers above a frozen prefix against training the whole model, and what each depth costs."""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from headstart import config
from headstart.checkpoints import Checkpoints
from headstart.encoder import Encoder, choose_placement
from headstart.engine import NATIVE_HEADS
from headstart.errors import DiskError, ModelError
from headstart.model import ThawedModel, native_model
from headstart.targets import Targets
from headstart.thaw import (
    Cost,
    FineTuning,
    Texts,
    TokenBatches,
    deepest_within,
    layers_text,
    logits_of,
    predicted_costs,
)
from headstart.tokens import Tokens
from headstart.train import Training
from tests.conftest import BAD, GOOD, NOUNS

CPU = choose_placement("cpu", "fp32")
TEXTS = [
    f"the {noun} was {'not ' * (i % 4)}{word}{' and very' * (i % 3)}"
    for i, noun in enumerate(NOUNS)
    for pair in zip(GOOD, BAD, strict=True)
    for word in pair
]
LABELS = np.array([i % 2 for i in range(len(TEXTS))], dtype=np.int64)
PARTS = (np.arange(0, 48), np.arange(48, 64), np.arange(64, 80))
EXACT = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def task(tiny_models: Callable[[str], Path]) -> Callable[..., FineTuning]:
    """A task of fine-tuning a family's tiny encoder, with a fresh head."""

    def make(family: str = "bert", **given: Any) -> FineTuning:
        encoder = Encoder(str(tiny_models(family)), CPU)
        settings = config.settings("sample", **{"epochs": 2, "batch_size": 16, "lr": 1e-3, "seed": 4, **given})
        start = native_model(encoder, ("bad", "good"), seed=1)
        targets: Any = tuple(Targets(LABELS[part]) for part in PARTS)
        tokens = encoder.tokenizer(TEXTS)
        return FineTuning(encoder, tokens, PARTS, targets, ("bad", "good"), settings, start)

    return make


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    """Whether two models are equal to the bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alike(one: Any, other: Any) -> bool:
    """Whether two models are equal but for rounding.

    A gradient close to 0 may have another sign, and AdamW steps as far either way: single weights may be off, and the
    biases of keys, which softmax takes out again, all of them.
    """
    a, b = tensors(one), tensors(other)
    names = [name for name in a if not name.endswith(("key.bias", "k_lin.bias"))]
    return a.keys() == b.keys() and all(float((a[name] - b[name]).abs().float().mean()) < 1e-4 for name in names)


# --- batches


def batches_of(n: int = 70, parts: int = 1, seed: int = 3, size: int = 8) -> TokenBatches:
    """Texts of 1 to 9 tokens, the i-th of which begins with the id i; every second one is trained on."""
    lengths = np.random.default_rng(0).integers(1, 10, size=2 * n)
    ids = np.concatenate([np.r_[i, np.zeros(length - 1)] for i, length in enumerate(lengths)]).astype(np.int32)
    tokens = Tokens(ids, np.concatenate([[0], lengths.cumsum()]))
    encoder: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=0))  # nothing else is needed for token ids
    index = np.arange(0, 2 * n, 2)
    wanted = torch.from_numpy(index * 10), torch.ones(n)
    return TokenBatches(Texts(encoder, tokens), index, wanted, size, seed, [torch.device("cpu")] * parts)


def seen(batches: TokenBatches, epoch: int) -> list[list[int]]:
    """The texts of each batch, in order; each with its label."""
    found = []
    for parts in batches.epoch(epoch):
        rows = []
        for (ids, mask), labels, _ in parts:
            assert ids.shape == mask.shape
            assert (ids[:, 0] * 10).tolist() == labels.tolist(), "each text has its label"
            lengths = batches.texts.tokens.lengths[ids[:, 0].numpy()]
            assert mask.sum(dim=1).tolist() == lengths.tolist()
            assert ids.shape[1] == lengths.max(), "no more padding than is needed"
            rows += ids[:, 0].tolist()
        found.append(rows)
    return found


def test_each_epoch_has_each_text_once_in_an_order_of_seed_and_epoch() -> None:
    orders = {}
    for seed in (0, 3, 2**32 - 1):
        for epoch in (0, 1, 5):
            batches = batches_of(seed=seed)
            found = seen(batches, epoch)
            assert len(found) == len(batches) == 9
            assert sorted(len(one) for one in found) == [6, *[8] * 8]
            assert sorted(text for one in found for text in one) == batches.index.tolist()
            orders[seed, epoch] = found
    assert len({str(order) for order in orders.values()}) == len(orders)
    torch.manual_seed(5)  # whatever else draws random numbers
    torch.rand(9)
    assert seen(batches_of(seed=3), 5) == orders[3, 5]


def test_batches_are_of_like_length() -> None:
    batches = batches_of(200)
    spread = [np.ptp(batches.texts.tokens.lengths[np.array(texts)]) for texts in seen(batches, 0)]
    assert max(spread) <= 1
    firsts = [batches.texts.tokens.lengths[texts[0]] for texts in seen(batches, 0)]
    assert firsts != sorted(firsts, reverse=True), "but they do not come by length"


@pytest.mark.parametrize("parts", [2, 3, 8, 20])
def test_parts_are_the_batch(parts: int) -> None:
    whole, cut = seen(batches_of(parts=1), 2), list(batches_of(parts=parts).epoch(2))
    assert [sorted(texts) for texts in whole] == [sorted(texts) for texts in seen(batches_of(parts=parts), 2)]
    for batch in cut:
        sizes = [len(labels) for _, labels, _ in batch]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == min(parts, sum(sizes))


# --- states


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_states_are_the_models_own_and_are_kept_without_padding(
    family: str, task: Callable[..., FineTuning], cache_dir: Path
) -> None:
    given = task(family)
    _, texts = given.thawed(2)
    kept = texts.keep()
    (file,) = cache_dir.rglob("*.npy")
    assert kept.kept.shape == (len(given.tokens.ids), 32)
    assert kept.kept.dtype == np.float16
    index = np.array([3, 70, 12])
    (fresh, mask), (stored, other) = texts.inputs(index), kept.inputs(index)
    assert torch.equal(mask, other)
    real = mask.bool()
    torch.testing.assert_close(
        fresh[real], stored[real], rtol=1e-3, atol=1e-3
    )  # of other batches: a last bit may differ
    ids = torch.from_numpy(given.tokens.padded(index, given.encoder.tokenizer.pad_id)[0])
    with torch.inference_mode():
        states = given.encoder.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(stored[real].float(), states[real], rtol=2e-3, atol=2e-3)  # half precision
    before, whole = file.stat(), np.array(kept.kept)
    assert np.array_equal(texts.keep().kept, whole)
    assert file.stat().st_ino == before.st_ino, "found, not computed again"
    assert file.stat().st_mtime_ns > before.st_mtime_ns, "but used, so not what is deleted first"
    os.truncate(file, before.st_size - 1)
    assert np.array_equal(texts.keep().kept, whole), "cut short, so computed again"
    given.thawed(1)[1].keep()
    replace(texts, tokens=given.tokens.take(np.arange(5))).keep()
    assert len(list(cache_dir.rglob("*.npy"))) == 3, "each depth and each set of texts has its own"


def test_states_of_a_killed_run_go_and_the_store_keeps_its_cap(
    task: Callable[..., FineTuning], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = task()
    given.thawed(2)[1].keep()
    (file,) = cache_dir.rglob("*.npy")
    torn = file.with_name(f".{file.name}.12345678.tmp")
    file.rename(torn)
    given.thawed(2)[1].keep()
    assert file.is_file()
    assert not torn.exists()
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", str(file.stat().st_size + 1000))
    assert given.thawed(1)[1].keep().kept is not None
    assert not file.exists(), "used longest ago"
    assert len(list(cache_dir.rglob("*.npy"))) == 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs POSIX")
def test_a_disk_without_room_for_the_states_is_one_sentence_and_leaves_nothing(
    task: Callable[..., FineTuning], cache_dir: Path
) -> None:
    import resource

    given = task()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DiskError, match="the disk is full"):
            given.fit(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.suffix for path in cache_dir.rglob("*") if path.is_file()] == [".lock"]


def test_states_that_cannot_be_kept_are_one_sentence(task: Callable[..., FineTuning], cache_dir: Path) -> None:
    (cache_dir / "features").write_text("in the way")
    with pytest.raises(DiskError, match="features"):
        task().fit(1)


# --- the arithmetic


def test_gradients_are_never_in_fp16_where_small_ones_would_be_0(task: Callable[..., FineTuning]) -> None:
    given = task()
    half = Encoder(given.encoder.source, replace(CPU, precision="fp16"))
    model, _ = replace(given, encoder=half).thawed("all")
    assert (half.placement.dtype, model.placement.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("family", NATIVE_HEADS)
@pytest.mark.parametrize("depth", [1, 2, 3, "all"])
def test_logits_and_gradients_are_transformers(family: str, depth: Any, task: Callable[..., FineTuning]) -> None:
    given = task(family)
    plain = copy.deepcopy(given.start).eval()
    model, texts = given.thawed(depth)
    if texts.below is not None:  # in full precision, so that only the arithmetic is compared
        encoder = given.encoder
        assert encoder.engine is not None
    index = np.array([0, 41, 9, 78, 33])
    ids, mask = map(torch.from_numpy, given.tokens.padded(index, given.encoder.tokenizer.pad_id))
    inputs = texts.inputs(index)
    if texts.below is not None:
        assert given.encoder.engine is not None
        with torch.inference_mode():
            states = given.encoder.engine.states(ids, mask, texts.below)
        inputs = states.clone(), mask
    for parameter in plain.parameters():
        parameter.requires_grad_(requires_grad=True)
    logits, expected = model.train()(*inputs), plain(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, **EXACT)
    weights = torch.tensor([0.7, 1.9])
    for one in (logits, expected):
        nn.functional.cross_entropy(one, torch.from_numpy(LABELS[index]), weight=weights).backward()
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters()}
    trained = {name: parameter for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    layers = {name.split(".layer.")[1][0] for name in trained if ".layer." in name}
    assert layers == {str(layer) for layer in ((0, 1, 2) if depth == "all" else range(3 - depth, 3))}
    assert any("embeddings" in name for name in trained) == (depth == "all")
    for name, parameter in trained.items():
        gradient = theirs[name]
        if gradient is None:  # a pooler that is not read
            assert parameter.grad is None
            continue
        if parameter.shape != gradient.shape:  # word embeddings are cut down to those used
            assert model.used is not None
            assert not gradient[np.setdiff1d(np.arange(len(gradient)), model.used)].any()
            gradient = gradient[torch.from_numpy(model.used)]
        assert parameter.grad is not None, name
        if "token_type" in name:  # only the row of type 0 is read
            torch.testing.assert_close(parameter.grad[0], gradient[0], **EXACT)
            continue
        torch.testing.assert_close(parameter.grad, gradient, **EXACT, msg=name)


def by_transformers(task: FineTuning, depth: Any) -> Any:
    """The same training in plain transformers: from token ids, with the lower layers frozen."""
    model = copy.deepcopy(task.start).eval()  # no dropout
    schedule = task.schedule
    for name, parameter in model.named_parameters():
        layer = int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else -1
        below = "embeddings" in name or (layer >= 0 and layer < task.encoder.layers - (depth if depth != "all" else 99))
        parameter.requires_grad_(depth == "all" or not below)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    groups = [
        {"params": [one for name, one in trained.items() if one.ndim > 1 and "embeddings" not in name]},
        {
            "params": [one for name, one in trained.items() if one.ndim == 1 or "embeddings" in name],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=schedule.weight_decay)
    texts = Texts(task.encoder, task.tokens)
    labels = LABELS[PARTS[0]]
    weights = torch.from_numpy(len(labels) / (2 * np.bincount(labels))).float()
    wanted = torch.from_numpy(labels), torch.ones(len(labels))
    batches = TokenBatches(texts, PARTS[0], wanted, 16, task.config.seed, [torch.device("cpu")])
    steps, step, states, scores = schedule.epochs * len(batches), 0, [], []
    for epoch in range(schedule.epochs):
        for (((ids, mask), labels, _),) in batches.epoch(epoch):
            rising = math.ceil(0.1 * steps)
            share = (step + 1) / rising if step < rising else (steps - step) / (steps - rising)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * min(1.0, share)
            optimizer.zero_grad()
            logits = model(input_ids=ids, attention_mask=mask).logits
            nn.functional.cross_entropy(logits, labels, weight=weights).backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            step += 1
        with torch.inference_mode():
            ids, mask = texts.inputs(PARTS[1])
            held, truth = model(input_ids=ids, attention_mask=mask).logits, torch.from_numpy(task.targets[1].labels)
            loss = nn.functional.cross_entropy(held, truth, weight=weights)
        scores.append((float((held.argmax(dim=1) == truth).float().mean()), -float(loss)))
        states.append(tensors(model))
    model.load_state_dict(states[scores.index(max(scores))])
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_weights_converted_once_a_step_train_as_those_converted_for_each_part(
    family: str, precision: Any, task: Callable[..., FineTuning]
) -> None:
    plain = task(family)
    encoder = Encoder(plain.encoder.source, choose_placement("cpu", precision))
    given = replace(plain, encoder=encoder)
    trained = []
    for converts in (True, False):
        model, texts = given.thawed("all")
        if not converts:
            model.one_step = None  # type: ignore[assignment]
        batches = TokenBatches(
            texts, PARTS[0], given.targets[0].by_piece(torch.ones(2)), 16, 4, [torch.device("cpu")] * 2
        )
        training = Training(model, given.schedule)
        for parts in batches.epoch(0):
            training.step(parts, 1e-3, print)
        trained.append(model.whole())
    assert not same(trained[0], given.start)
    assert alike(*trained)


@pytest.mark.parametrize("family", NATIVE_HEADS)
@pytest.mark.parametrize("depth", [1, 2, "all"])
def test_kept_computed_and_whole_model_training_agree(family: str, depth: Any, task: Callable[..., FineTuning]) -> None:
    kept, computed = task(family).fit(depth), task(family, store=False).fit(depth)
    assert alike(kept.model, computed.model)
    torch.testing.assert_close(kept.test_logits, computed.test_logits, rtol=0, atol=1e-2)
    for one, other in zip(kept.history.epochs, computed.history.epochs, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
        assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-3)
    given = task(family)
    plain, start = by_transformers(given, depth), tensors(given.start)
    got, expected = tensors(kept.model), tensors(plain)
    assert got.keys() == expected.keys()
    moved = {name for name in got if not torch.equal(got[name], start[name])}
    assert moved
    assert moved <= {name for name in expected if not torch.equal(expected[name], start[name])}
    assert alike(kept.model, plain)
    ids, mask = map(torch.from_numpy, given.tokens.padded(PARTS[2], given.encoder.tokenizer.pad_id))
    with torch.inference_mode():
        theirs = plain(input_ids=ids, attention_mask=mask).logits
        mine = kept.model(input_ids=ids, attention_mask=mask).logits
        before = given.start.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(mine, kept.test_logits, rtol=0, atol=2e-2 if depth != "all" else 1e-4)  # states in fp16
    assert float((mine - theirs).abs().mean()) < 0.05 * float((before - theirs).abs().mean())


def test_fine_tuning_learns_and_leaves_the_start_alone(task: Callable[..., FineTuning]) -> None:
    given = task(epochs=8, patience=8, lr=3e-3)
    before = tensors(given.start)
    done = given.fit("all")
    assert all(torch.equal(value, before[name]) for name, value in tensors(given.start).items())
    assert done.history.epochs[-1].train_loss < 0.6 * done.history.epochs[0].train_loss
    assert done.history.epochs[done.history.best].validation_accuracy > 0.8
    best = max(done.history.epochs, key=lambda one: (one.validation_accuracy, -one.validation_loss))
    assert done.history.epochs[done.history.best] == best
    assert not done.model.training
    right = (done.validation_logits.argmax(dim=1).numpy() == given.targets[1].labels).mean()
    assert right == pytest.approx(best.validation_accuracy)


@pytest.mark.parametrize("depth", [1, "all"])
def test_when_memory_runs_out_pieces_add_up_to_the_batch(
    depth: Any, task: Callable[..., FineTuning], tmp_path: Path
) -> None:
    given = task(store=False)
    whole = given.fit(depth)
    calls: list[int] = []
    original = ThawedModel.forward

    def greedy(self: ThawedModel, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        torch.empty(1 << 60 if self.training and len(x) > 5 else 1, dtype=torch.uint8)
        calls.append(len(x))
        return original(self, x, mask)

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThawedModel, "forward", greedy)
        pieces = given.fit(depth, checkpoints=Checkpoints(tmp_path, 1e9, said.append))
    assert [one.split(":")[0] for one in said] == ["Memory ran out", "Memory ran out"]
    assert {4} <= set(calls)
    assert alike(pieces.model, whole.model)


def test_the_settings_are_the_schedule(task: Callable[..., FineTuning]) -> None:
    schedule = task(epochs=None, lr=None).schedule
    assert (schedule.epochs, schedule.lr, schedule.weight_decay, schedule.warmup) == (6, 1e-4, 0.01, 0.1)
    for texts, batch_size, epochs in ((6920, 32, 3), (4634, 32, 5), (4634, 16, 3), (2641, 32, 6), (10**6, 32, 3)):
        given = task(epochs=None, batch_size=batch_size)
        table = replace(given, parts=(np.arange(texts), *given.parts[1:]))
        assert table.schedule.epochs == epochs
    schedule = task(epochs=7, lr=1e-5, weight_decay=0.0, clip_norm=0.5, patience=2).schedule
    assert (schedule.epochs, schedule.lr, schedule.weight_decay) == (7, 1e-5, 0.0)
    assert (schedule.clip_norm, schedule.patience, schedule.keep) == (0.5, 2, "most accurate")


def test_logits_come_in_the_order_asked_for(task: Callable[..., FineTuning]) -> None:
    given = task()
    model, texts = given.thawed(2)
    model.eval()
    index = np.random.default_rng(1).permutation(len(TEXTS))
    got, straight = (logits_of(model, texts, one, 2) for one in (index, np.arange(len(TEXTS))))
    torch.testing.assert_close(got, straight[torch.from_numpy(index)])
    assert len(torch.unique(got, dim=0)) > 40


# --- the embeddings


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_embeddings_that_no_text_uses_are_put_back_unchanged(family: str, task: Callable[..., FineTuning]) -> None:
    given = task(family, weight_decay=0.5)
    name = given.start.get_input_embeddings()
    words = name.weight.detach().clone()
    done = given.fit("all")
    after = done.model.get_input_embeddings().weight.detach()
    assert after.shape == words.shape
    used = np.unique(np.append(given.tokens.ids, given.encoder.tokenizer.pad_id))
    assert 10 < len(used) < len(words)
    others = np.setdiff1d(np.arange(len(words)), used)
    assert torch.equal(after[others], words[others])
    trained = np.unique(np.concatenate([given.tokens[i] for i in PARTS[0].tolist()]))
    assert all(not torch.equal(after[i], words[i]) for i in trained.tolist())


def test_whole_puts_the_embeddings_back_once(task: Callable[..., FineTuning]) -> None:
    given = task()
    model, _ = given.thawed("all")
    assert model.used is not None
    assert len(model.model.get_input_embeddings().weight) == len(model.used)
    assert same(model.whole(), given.start)
    assert same(model.whole(), given.start)


# --- families that transformers computes


def test_other_families_are_thawed_as_a_whole_or_not_at_all(task: Callable[..., FineTuning]) -> None:
    given = task("albert")
    for depth in (1, 3):
        with pytest.raises(ModelError, match=f"--thaw {depth}: only bert, .* thaw layer by layer; use --thaw 0 or all"):
            given.fit(depth)
    before = tensors(given.start)
    done = given.fit("all")
    after = tensors(done.model)
    assert after.keys() == before.keys()
    assert not torch.equal(
        after["albert.embeddings.word_embeddings.weight"], before["albert.embeddings.word_embeddings.weight"]
    )
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    ids, mask = map(torch.from_numpy, given.tokens.padded(PARTS[2], given.encoder.tokenizer.pad_id))
    with torch.inference_mode():
        torch.testing.assert_close(done.model(input_ids=ids, attention_mask=mask).logits, done.test_logits, **EXACT)
    assert [cost.depth for cost in predicted_costs(given, Path())] == ["all"]


def test_two_threads_train_them_to_the_same_bytes(task: Callable[..., FineTuning]) -> None:
    given = task("albert", epochs=4)
    given.encoder.placement = choose_placement("cpu", "bf16")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (given.fit("all").model for _ in range(4))
    finally:
        torch.set_num_threads(before)
    assert all(same(one, first) for one in others)


# --- what each depth costs


@pytest.mark.parametrize("store", [True, False])
def test_each_depth_has_its_cost_the_shallowest_first(
    store: bool, task: Callable[..., FineTuning], cache_dir: Path
) -> None:
    given = task(store=store)
    before = tensors(given.start)
    costs = predicted_costs(given, Path())
    assert [cost.depth for cost in costs] == [1, 2, 3, "all"]
    assert all(cost.seconds > 0 and math.isfinite(cost.seconds) for cost in costs)
    low, middle, high = (cost.seconds for cost in costs[:3])
    assert middle == pytest.approx((low + high) / 2)
    memory, disk = [cost.memory for cost in costs], [cost.disk for cost in costs]
    assert memory[:3] == sorted(memory[:3])
    states = 2 * 32 * len(given.tokens.ids)
    assert disk[0] - 3 * 4 * 4 * 12 * 32**2 == (states if store else 0)
    assert all(torch.equal(value, before[name]) for name, value in tensors(given.start).items())
    assert not list(cache_dir.rglob("*.npy")), "nothing is kept"


def test_the_deepest_that_fits_is_picked() -> None:
    costs = [Cost(1, 10.0, 100, 0), Cost(2, 30.0, 200, 0), Cost(3, 20.0, 400, 0), Cost("all", 50.0, 500, 0)]

    def pick(seconds: float) -> object:
        found = deepest_within(costs, seconds)
        return found and found.depth

    assert [pick(seconds) for seconds in (60, 50, 49, 25, 19, 9)] == ["all", "all", 3, 3, 1, None]
    assert deepest_within([], 1.0) is None


def test_only_depths_with_room_are_tried(
    task: Callable[..., FineTuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = task()
    costs = predicted_costs(given, tmp_path / "not" / "there")

    def depths(memory: int, disk: int) -> list[object]:
        free = type("Free", (), {"available": memory, "free": disk})
        with monkeypatch.context() as patch:
            patch.setattr("psutil.virtual_memory", lambda: free)
            patch.setattr("shutil.disk_usage", lambda place: free)
            return [cost.depth for cost in predicted_costs(given, tmp_path)]

    plenty = 10**12
    assert depths(plenty, plenty) == [1, 2, 3, "all"]
    assert depths(costs[1].memory, plenty) == [1, 2]
    assert depths(costs[0].memory - 1, plenty) == []
    assert depths(plenty, costs[0].disk) == [1]
    assert depths(plenty, 0) == []


@pytest.mark.parametrize(
    ("depth", "words"), [(1, "the top 1 layer"), (2, "the top 2 layers"), ("all", "all layers and the embeddings")]
)
def test_depths_in_words(depth: Any, words: str) -> None:
    assert layers_text(depth) == words
