"""Our own frozen pass against transformers' forward in fp32, what it does not compute, and the twins it must match."""

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from headstart import modeling_headstart
from headstart.encoder import Encoder, choose_placement, config_dict, encode, load_config
from headstart.engine import (
    NATIVE_HEADS,
    ROW_STEP,
    Engine,
    NativeScorer,
    PooledHead,
    PooledScorer,
    pooled_output,
    side_by_side,
    supports,
)

CPU = torch.device("cpu")
EVERYTHING = ("cls", "mean-0", "mean-1", "mean-2", "mean-3")
LENGTHS = (64, 3, 17, 2, 30, 1)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Tiny:
    """A tiny encoder three ways: as transformers runs it, its config.json and its tensors."""

    model: Any
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    def engine(self, **changes: torch.Tensor | None) -> Engine:
        """An engine on these tensors, some of them replaced, or left out (None)."""
        weights = {name: tensor for name, tensor in {**self.weights, **changes}.items() if tensor is not None}
        return Engine(self.config, weights, CPU, torch.float32)


@pytest.fixture(scope="module")
def tiny(tiny_models: Callable[[str], Path]) -> Callable[[str], Tiny]:
    def load(family: str) -> Tiny:
        from transformers import AutoModel

        folder = tiny_models(family)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        return Tiny(model, config_dict(load_config(folder)), load_file(folder / "model.safetensors"))

    return load


@pytest.fixture(scope="module")
def bert(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("bert")


def batch(pad_id: int, lengths: Sequence[int] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids, none of them special, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(10, 70, mask.shape, generator=generator)
    return torch.where(mask.bool(), ids, pad_id), mask


def by_transformers(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """EVERYTHING of each text, by transformers' own forward on the same batch."""
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    rows = []
    for text, length in enumerate(mask.sum(dim=1).tolist()):
        means = [layer[text, :length].double().mean(dim=0) for layer in output.hidden_states]
        rows.append(torch.stack([output.last_hidden_state[text, 0].double(), *means]))
    return torch.stack(rows).float()


def run(engine: Engine, layout: Sequence[str], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return engine.vectors(engine.embedded(ids), mask, layout)


def work(engine: Engine, *layout: str) -> int:
    """The floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        run(engine, layout, *batch(0))
    return int(counter.get_total_flops())


# --- the arithmetic


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_every_vector_is_transformers(family: str, tiny: Callable[[str], Tiny]) -> None:
    one = tiny(family)
    ids, mask = batch(one.config["pad_token_id"])
    got = run(one.engine(), EVERYTHING, ids, mask)
    assert got.shape == (len(LENGTHS), len(EVERYTHING), 32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_transformers(one.model, ids, mask), **CLOSE)
    assert len(torch.unique(got[0], dim=0)) == len(EVERYTHING), "a wrong layer would be seen"


def test_padding_inside_a_roberta_text_has_no_position(tiny: Callable[[str], Tiny]) -> None:
    one = tiny("roberta")  # a text may spell out <pad>
    ids, mask = batch(one.config["pad_token_id"], (9, 6))
    ids[0, 4] = one.config["pad_token_id"]
    torch.testing.assert_close(run(one.engine(), EVERYTHING, ids, mask), by_transformers(one.model, ids, mask), **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_attention_is_exact_also_where_exponentials_overflow(scale: float, bert: Tiny) -> None:
    name = "encoder.layer.1.attention.self.query.weight"
    sharp = bert.engine(**{name: bert.weights[name] * scale})
    plain = bert.engine(**{name: bert.weights[name] * scale})
    plain.onednn = False  # torch's softmax throughout
    ids, mask = batch(0)
    with torch.inference_mode():
        scores = run(sharp, ("mean-1",), ids, mask)[:, 0] @ (bert.weights[name] * scale).T
    assert (float(scores.abs().max()) > 88) == (scale > 1), "exp overflows there in fp32"
    torch.testing.assert_close(run(sharp, EVERYTHING, ids, mask), run(plain, EVERYTHING, ids, mask), **CLOSE)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_without_gradients_bias_and_residual_are_added_inside_the_products(bert: Tiny) -> None:
    ids, mask = batch(0)
    engine = bert.engine()  # made where gradients are on, as everywhere in headstart
    counts = []
    for grad in (torch.inference_mode(), torch.enable_grad()):
        with grad, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.vectors(engine.embedded(ids), mask, EVERYTHING)
        found = {event.key: event.count for event in profile.key_averages()}
        counts.append([found.get(name, 0) for name in ("mkldnn::_linear_pointwise", "aten::linear")])
    assert counts == [[4 * len(engine.layers), 0], [0, 4 * len(engine.layers)]]


def test_rows_added_for_the_products_change_nothing(bert: Tiny) -> None:
    ids, mask = batch(0, (30,) * 11)
    assert ids.numel() > ROW_STEP
    assert ids.numel() % ROW_STEP
    torch.testing.assert_close(
        run(bert.engine(), EVERYTHING, ids, mask), by_transformers(bert.model, ids, mask), **CLOSE
    )


@pytest.mark.parametrize("family", NATIVE_HEADS)
@pytest.mark.parametrize("labels", [2, 5])
def test_a_native_classifier_scores_as_transformers_does(family: str, labels: int, tiny: Callable[[str], Tiny]) -> None:
    from transformers import AutoModelForSequenceClassification

    one = tiny(family)
    torch.manual_seed(0)
    config = copy.deepcopy(one.model.config)
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids, mask = batch(one.config["pad_token_id"])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
        got = NativeScorer(model.config.to_dict(), model.state_dict(), CPU, torch.float32)(ids, mask)
    assert got.shape == (len(LENGTHS), labels)
    torch.testing.assert_close(got, expected, **CLOSE)
    weights = model.state_dict()
    del weights[next(name for name in weights if name.startswith(("classifier", "pre_classifier")))]
    with pytest.raises(KeyError):
        NativeScorer(model.config.to_dict(), weights, CPU, torch.float32)


# --- side by side


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "left as it was found"
    torch.set_num_threads(before)


def test_results_come_in_order_from_single_threads(threads: int) -> None:
    workers, inner = set(), set()

    def slow_first(item: int) -> int:
        workers.add(threading.get_ident())
        inner.add(torch.get_num_threads())
        time.sleep(0.02 if item % threads == 0 else 0.001)
        return item * item

    assert list(side_by_side(slow_first, range(20))) == [item * item for item in range(20)]
    assert len(workers) == threads
    assert inner == {1}


def test_items_are_taken_only_a_few_ahead(threads: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    for number, _ in enumerate(side_by_side(abs, items())):
        assert len(taken) <= number + 1 + 2 * threads
    assert len(taken) == 1000


def test_a_failure_is_raised_where_it_belongs_and_ends_the_rest(threads: int) -> None:
    done: list[int] = []

    def fail_at_five(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        done.append(item)
        return item

    results = side_by_side(fail_at_five, range(1000))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert len(done) < 100


def test_encoding_on_several_threads_gives_the_same(tiny_bert: Path) -> None:
    encoder = Encoder(str(tiny_bert), choose_placement("cpu", "fp32"))
    tokens = encoder.tokenizer([f"the film {'was superb ' * (i % 9)}" for i in range(600)])
    before, answers = torch.get_num_threads(), []
    for count in (1, 4):
        torch.set_num_threads(count)
        values = np.empty((600, 2, 32), dtype=np.float16)
        for index, part in encode(encoder, tokens, ("cls", "mean-2")):
            values[index] = part
        answers.append(values)
    torch.set_num_threads(before)
    np.testing.assert_array_equal(answers[0], answers[1])


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_without_padding_too(family: str, tiny: Callable[[str], Tiny]) -> None:
    # Attention then gets no mask at all.
    one = tiny(family)
    ids, mask = batch(one.config["pad_token_id"], (9, 9, 9))
    torch.testing.assert_close(run(one.engine(), EVERYTHING, ids, mask), by_transformers(one.model, ids, mask), **CLOSE)


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_what_fills_a_text_is_never_read(family: str, tiny: Callable[[str], Tiny]) -> None:
    engine = tiny(family).engine()
    ids, mask = batch(0)
    other = torch.where(mask.bool(), ids, 42)
    assert not torch.equal(ids, other)
    torch.testing.assert_close(run(engine, EVERYTHING, other, mask), run(engine, EVERYTHING, ids, mask), **CLOSE)


def test_vectors_come_in_the_order_asked_for(bert: Tiny) -> None:
    ids, mask = batch(0)
    whole = run(bert.engine(), EVERYTHING, ids, mask)
    assert torch.equal(run(bert.engine(), EVERYTHING[::-1], ids, mask), whole.flip(1))
    torch.testing.assert_close(run(bert.engine(), ("mean-2", "mean-0"), ids, mask), whole[:, [3, 1]], **CLOSE)


def test_it_follows_the_configurations_epsilon(bert: Tiny) -> None:
    ids, mask = batch(0)
    coarse = Engine({**bert.config, "layer_norm_eps": 0.5}, bert.weights, CPU, torch.float32)
    bert_again = type(bert.model)(type(bert.model.config)(**{**bert.model.config.to_dict(), "layer_norm_eps": 0.5}))
    bert_again.load_state_dict(bert.model.state_dict())
    got = run(coarse, EVERYTHING, ids, mask)
    torch.testing.assert_close(got, by_transformers(bert_again.eval(), ids, mask), **CLOSE)
    assert not torch.allclose(got, run(bert.engine(), EVERYTHING, ids, mask), atol=1e-2)


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_the_weights_stay_as_they_were(family: str, tiny: Callable[[str], Tiny]) -> None:
    # It adds in place, and in fp32 on the CPU its tensors are the caller's own, which are saved with the run.
    one = tiny(family)
    before = {name: tensor.clone() for name, tensor in one.weights.items()}
    engine = one.engine()
    first = run(engine, EVERYTHING, *batch(0))
    assert torch.equal(run(engine, EVERYTHING, *batch(0)), first)
    assert all(torch.equal(one.weights[name], tensor) for name, tensor in before.items())


# --- what is not computed


@pytest.mark.parametrize("highest", [0, 1, 2])
def test_layers_above_the_highest_read_are_not_run(bert: Tiny, highest: int) -> None:
    """What no answer needs can be poisoned, and costs what an encoder without those layers costs."""
    layout = [f"mean-{layer}" for layer in range(highest + 1)]
    above = [name for name in bert.weights if any(f"layer.{i}." in name for i in range(highest, 3))]
    poisoned = bert.engine(**{name: torch.full_like(bert.weights[name], torch.nan) for name in above})
    ids, mask = batch(0)
    assert torch.equal(run(poisoned, layout, ids, mask), run(bert.engine(), layout, ids, mask))
    assert run(poisoned, (*layout, f"mean-{highest + 1}"), ids, mask)[:, -1].isnan().all(), "the poison works"
    shorter = Engine({**bert.config, "num_hidden_layers": highest}, bert.weights, CPU, torch.float32)
    assert work(bert.engine(), *layout) == work(shorter, *layout)
    assert work(bert.engine(), *layout) < work(bert.engine(), f"mean-{highest + 1}")


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_the_last_layer_for_the_first_token_alone_is_the_same(family: str, tiny: Callable[[str], Tiny]) -> None:
    engine = tiny(family).engine()
    ids, mask = batch(0)
    for layout in (("cls",), ("cls", "mean-1", "mean-2")):
        alone = run(engine, layout, ids, mask)
        beside = run(engine, (*layout, "mean-3"), ids, mask)
        torch.testing.assert_close(alone, beside[:, :-1], rtol=1e-6, atol=1e-6)
        a_mean = work(engine, "mean-1", "mean-0") - work(engine, "mean-1")
        more = work(engine, *layout, "mean-3") - work(engine, *layout)
        assert more > 2 * a_mean > 0, "taking a mean is not all that is saved"


# --- which architectures it takes


@pytest.mark.parametrize("family", NATIVE_HEADS)
def test_the_families_it_knows_are_run_by_it(family: str, tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models(family)
    assert supports(config_dict(load_config(folder)))
    assert Encoder(str(folder), choose_placement("cpu", "fp32")).engine is not None


@pytest.mark.parametrize("family", ["albert", "mpnet", "deberta-v2", "modernbert"])
def test_other_families_are_not(family: str, tiny_models: Callable[[str], Path]) -> None:
    assert not supports(config_dict(load_config(tiny_models(family))))
    assert Encoder(str(tiny_models(family)), choose_placement("cpu", "fp32")).engine is None


REFUSED: dict[str, dict[str, Any]] = {
    "another activation": {"hidden_act": "gelu_new"},
    "another activation in DistilBERT's words": {"model_type": "distilbert", "activation": "relu"},
    "relative positions": {"position_embedding_type": "relative_key"},
    "a decoder": {"model_type": "roberta", "is_decoder": True},
    "a relative of RoBERTa": {"model_type": "camembert"},
    "no model type": {"model_type": None},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_would_get_wrong_is_refused(what: str) -> None:
    plain = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    if "activation" in REFUSED[what]:
        plain["activation"] = plain.pop("hidden_act")
    for family in NATIVE_HEADS:
        assert supports({"model_type": family, **plain})
    assert not supports({"model_type": "bert", **plain, **REFUSED[what]})


def test_an_architecture_refused_is_still_answered_right(bert: Tiny, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    changed = BertModel(type(bert.model.config)(**{**bert.model.config.to_dict(), "hidden_act": "relu"}))
    changed.load_state_dict(bert.model.state_dict())
    changed.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path), choose_placement("cpu", "fp32"))
    assert encoder.engine is None
    tokens = encoder.tokenizer(["the film was superb"])
    ((_, got),) = encode(encoder, tokens, EVERYTHING)
    ids = torch.from_numpy(tokens[0][None].astype(np.int64))
    expected = by_transformers(changed.eval(), ids, torch.ones_like(ids))
    np.testing.assert_allclose(got[0], expected[0].numpy(), rtol=2**-11, atol=1e-5)
    mine = run(bert.engine(), EVERYTHING, ids, torch.ones_like(ids))
    assert not torch.allclose(mine, expected, atol=1e-2), "with the other activation the answer is another"


# --- weights that do not fit


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.bias",
        "encoder.layer.2.attention.self.key.weight",
        "encoder.layer.0.output.LayerNorm.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, bert: Tiny) -> None:
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        bert.engine(**{name: None})


def test_a_layer_too_many_is_missed(bert: Tiny) -> None:
    with pytest.raises(KeyError, match=r"encoder\.layer\.3\."):
        Engine({**bert.config, "num_hidden_layers": 4}, bert.weights, CPU, torch.float32)


@pytest.mark.parametrize("hidden", [16, 64])
def test_weights_of_another_width_are_refused(hidden: int, bert: Tiny) -> None:
    with pytest.raises(ValueError, match="another width than the configuration"):
        Engine({**bert.config, "hidden_size": hidden}, bert.weights, CPU, torch.float32)


# --- the pooled output and the head


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_the_pooled_output_is_transformers(family: str, tiny: Callable[[str], Tiny]) -> None:
    one = tiny(family)
    ids, mask = batch(one.config["pad_token_id"])
    with torch.inference_mode():
        output = one.model(input_ids=ids, attention_mask=mask)
        got = pooled_output(one.weights, output.last_hidden_state[:, 0])
    torch.testing.assert_close(got, output.pooler_output, rtol=1e-5, atol=1e-6)
    assert got.std(dim=0).min() > 0


def test_without_a_pooler_there_is_no_pooled_output(tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(KeyError, match="pooler"):
        pooled_output(tiny("distilbert").weights, torch.zeros(1, 32))


@pytest.mark.parametrize("width", [0, 5])
def test_a_pooled_head_is_standardise_then_linear(width: int) -> None:
    torch.manual_seed(0)
    head = PooledHead(4, width, 3, dropout=0.5).eval()
    head.mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    head.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    x = torch.randn(6, 4)
    z = ((x - head.mean) * head.scale).numpy()
    if width:
        z = np.maximum(z @ head.layers[0].weight.detach().numpy().T + head.layers[0].bias.detach().numpy(), 0)
    expected = z @ head.layers[-1].weight.detach().numpy().T + head.layers[-1].bias.detach().numpy()
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_for_a_hidden_layer_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    linear, hidden = PooledHead(4, 0, 2, dropout=0.9).train(), PooledHead(4, 64, 2, dropout=0.9).train()
    assert torch.equal(linear(x), linear(x))
    assert not torch.equal(hidden(x), hidden(x))


@pytest.mark.parametrize("width", [0, 6])
def test_the_model_code_in_a_run_folder_has_the_same_head(width: int, bert: Tiny) -> None:
    """The same weights under the same names, and the same logits, also with dropout on."""
    settings: dict[str, Any] = {"head_features": ("mean-1", "cls"), "head_width": width, "head_dropout": 0.5}
    config = modeling_headstart.HeadstartConfig(encoder=bert.config, num_labels=3, **settings)
    model = modeling_headstart.HeadstartForSequenceClassification(config).eval()
    model.head.mean.normal_()
    model.head.scale.uniform_(0.5, 2)
    head, state = PooledHead(2 * 32, width, 3, 0.5), model.head.state_dict()
    assert list(state) == list(head.state_dict())
    assert ("layers.3.weight" in state) == (width > 0)
    head.load_state_dict(state)
    ids, mask = batch(0)
    logits = []
    with torch.inference_mode():
        states = model.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        inputs = modeling_headstart.pool(states, mask, settings["head_features"]).flatten(1)
        for training in (True, False):
            torch.manual_seed(1)
            logits.append(head.train(training)(inputs))
            model.head.train(training)
            torch.manual_seed(1)
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits[-1])
    assert torch.equal(*logits) == (width == 0), "dropout is for a hidden layer only"


@pytest.mark.parametrize("family", NATIVE_HEADS)
@pytest.mark.parametrize(("features", "width"), [(("mean-0", "cls"), 0), (("mean-3", "mean-1"), 6)])
def test_a_saved_classifier_scores_as_its_transformers_class_does(
    family: str, features: tuple[str, ...], width: int, tiny: Callable[[str], Tiny]
) -> None:
    _scores_alike(tiny(family), features, width)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_saved_classifier_with_the_pooled_output_does_too(family: str, tiny: Callable[[str], Tiny]) -> None:
    _scores_alike(tiny(family), ("mean-2", "pooler"), 6)


def _scores_alike(one: Tiny, features: tuple[str, ...], width: int) -> None:
    settings: dict[str, Any] = {"head_features": features, "head_width": width, "head_dropout": 0.4, "num_labels": 3}
    config = modeling_headstart.HeadstartConfig(encoder=one.config, **settings)
    torch.manual_seed(5)
    model = modeling_headstart.HeadstartForSequenceClassification(config).eval()
    model.encoder.load_state_dict(one.weights, strict=False)
    model.head.mean.normal_()
    model.head.scale.uniform_(0.5, 2)
    ids, mask = batch(one.config["pad_token_id"])
    plain = json.loads(json.dumps({"encoder": one.config, **settings}, default=str))  # as config.json holds it
    with torch.inference_mode():
        got = PooledScorer(plain, model.state_dict(), CPU, torch.float32)(ids, mask)
        expected = model(input_ids=ids, attention_mask=mask).logits
    # Features are rounded to half precision on the way; one on the edge may be rounded the other way.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert expected.std(dim=0).max() > 0.1, "texts should get answers of their own"
