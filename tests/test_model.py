"""Heads on stored features against the whole models they become; the run folder, whole or absent."""

import io
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headstart import config, predict, trials
from headstart.config import Precision
from headstart.encoder import Encoder, choose_placement
from headstart.engine import PooledHead
from headstart.errors import ModelError, RunError
from headstart.features import Features, frozen_features
from headstart.folders import new_folder
from headstart.model import HeadSpec, PooledModel, head_inputs, native_feature, native_model, save_model
from headstart.predict import Predictor
from headstart.targets import Targets
from tests.conftest import FAMILIES

CPU = choose_placement("cpu", "fp32")
NAMES = ("bad", "good", "so-so")
TEXTS = [
    "a",
    "the film was superb and lovely, not boring.",
    "zebra! quiz?",
    "the waiter was rude at the end of this story " * 3,
    *(f"the {noun} was {word}" for noun in ("film", "soup", "room", "app") for word in ("great", "rude", "lovely")),
]
CLOSE = {"rtol": 2e-3, "atol": 1e-2}
"""Features are kept in half precision, 11 bits: over a head's 32 to 64 inputs that is a few thousandths of a logit."""


def stored(encoder: Encoder) -> Features:
    return frozen_features(encoder, encoder.tokenizer(TEXTS))


def load(run: Path, precision: Precision = "fp32") -> Predictor:
    return predict.load(run, device="cpu", precision=precision)


def logits_of(predictor: Predictor) -> torch.Tensor:
    """Logits of TEXTS through the whole model, all in one padded batch."""
    tokens = predictor.classifier.tokenizer(TEXTS)
    pad_id = predictor.classifier.tokenizer.pad_id
    return torch.from_numpy(predictor.classifier.logits(*tokens.padded(np.arange(len(TEXTS)), pad_id)))


def saved(model: Any, encoder: Encoder, folder: Path) -> Predictor:
    """Written and read again."""
    with new_folder(folder) as temporary:
        save_model(temporary, model, encoder, encoder.max_length, "single")
    return load(folder)


def standardising_head(inputs: torch.Tensor, spec: HeadSpec, labels: int, seed: int) -> PooledHead:
    """A fresh head with the statistics of what it reads."""
    torch.manual_seed(seed)
    head = PooledHead(inputs.shape[1], spec.width, labels, spec.dropout)
    head.mean.copy_(inputs.mean(dim=0))
    head.scale.copy_(1 / inputs.std(dim=0))
    return head


# --- pooled heads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("names", "width"), [(("mean-1",), 0), (("mean-0", "mean-2"), 8), (("cls", "mean-3"), 0), (("pooler",), 8)]
)
def test_a_pooled_model_is_its_head_on_stored_features(
    family: str, names: tuple[str, ...], width: int, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    spec = HeadSpec(names, width, dropout=0.5)
    inputs = head_inputs(encoder, stored(encoder), names)
    assert inputs.shape == (len(TEXTS), 32 * len(names))
    head = standardising_head(inputs, spec, len(NAMES), seed=1).eval()
    with torch.no_grad():
        expected = head(inputs)
    predictor = saved(PooledModel(encoder, head, spec, NAMES), encoder, tmp_path / "run")
    torch.testing.assert_close(logits_of(predictor), expected, **CLOSE)
    assert expected.std(dim=0).min() > 0.05, "texts should get answers of their own"
    assert predictor.names == NAMES
    assert predictor.classifier.max_length == 64


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
@pytest.mark.parametrize("highest", [0, 1, 2])
def test_layers_that_the_head_does_not_read_are_not_saved(
    family: str, highest: int, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    names = (f"mean-{highest}", "mean-0")
    spec = HeadSpec(names, 0, 0.0)
    head = standardising_head(head_inputs(encoder, stored(encoder), names), spec, 2, seed=1)
    saved(PooledModel(encoder, head, spec, NAMES[:2]), encoder, tmp_path / "run")
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as weights:
        keys = list(weights.keys())
    found = {int(place) for key in keys for place in re.findall(r"layers?\.(\d+)\.", key)}
    layers = 3 if family == "modernbert" else max(1, highest)  # it ends in a norm, so all its layers are needed
    assert found == set(range(layers))
    assert not any("pooler" in key for key in keys)


def test_a_pooler_that_the_checkpoint_lacks_is_the_first_token(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = Encoder(str(tiny_models("distilbert")), CPU)
    features = stored(encoder)
    assert torch.equal(head_inputs(encoder, features, ("pooler",)), head_inputs(encoder, features, ("cls",)))
    spec = HeadSpec(("pooler",), 0, 0.0)
    head = standardising_head(head_inputs(encoder, features, ("pooler",)), spec, 2, 0)
    saved(PooledModel(encoder, head, spec, NAMES[:2]), encoder, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["head_features"] == ["cls"]


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "mpnet"])
def test_the_pooler_feature_is_transformers_pooler_output(family: str, tiny_models: Callable[[str], Path]) -> None:
    from transformers import AutoModel

    folder = tiny_models(family)
    encoder = Encoder(str(folder), CPU)
    got = head_inputs(encoder, stored(encoder), ("pooler",))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = encoder.tokenizer(TEXTS)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor(tokens[i][None].astype(np.int64))) for i in range(len(TEXTS))]
    torch.testing.assert_close(got, torch.cat([one.pooler_output for one in expected]), rtol=0, atol=5e-3)


def test_an_unknown_feature_is_named(tiny_bert: Path) -> None:
    encoder = Encoder(str(tiny_bert), CPU)
    with pytest.raises(ModelError, match=r"no feature 'mean-9' here; there are: pooler, cls, mean-0, .*mean-3"):
        head_inputs(encoder, stored(encoder), ("mean-9",))


def test_a_bf16_encoder_saves_full_precision_weights(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = Encoder(str(tiny_bert), choose_placement("cpu", "bf16"))
    spec = HeadSpec(("mean-2",), 0, 0.0)
    head = standardising_head(head_inputs(encoder, stored(encoder), spec.features), spec, 2, seed=1)
    saved(PooledModel(encoder, head, spec, NAMES[:2]), encoder, tmp_path / "run")
    original, kept = load_file(tiny_bert / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(kept[f"encoder.{name}"], original[name])


# --- the architecture's own heads


def train_native(encoder: Encoder) -> trials.TrainedHead:
    """A native head after 30 epochs on TEXTS."""
    features, labels = stored(encoder), np.arange(len(TEXTS)) % 3
    given = config.settings("sample", head="native", epochs=30, patience=30, lr=1e-2, batch_size=8, seed=3)
    return trials.train_head(trials.Task(encoder, features, features, Targets(labels), Targets(labels), NAMES, given))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_native_head_learns_on_stored_features_and_is_the_whole_models(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    trained = train_native(encoder)
    losses = [epoch.train_loss for epoch in trained.history.epochs]
    assert losses[-1] < 0.7 * losses[0]
    expected = trained.logits(stored(encoder))
    model: Any = trained.whole(NAMES)
    assert type(model).__name__.endswith("ForSequenceClassification")
    for name, value in getattr(model, model.base_model_prefix).state_dict().items():
        if "pooler" not in name:  # the pooler stands after the encoder's output: part of the head
            assert torch.equal(value, before[name]), name
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(logits_of(saved(model, encoder, tmp_path / "run")), expected, **CLOSE)
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    assert content["problem_type"] == "single_label_classification"
    assert "auto_map" not in content


def test_modernbert_pools_as_its_configuration_says(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models("modernbert"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classifier_pooling": "mean"}))
    encoder = Encoder(str(tmp_path / "m"), CPU)
    assert native_feature(encoder) == "mean-3"
    trained = train_native(encoder)
    expected = trained.logits(stored(encoder))
    torch.testing.assert_close(logits_of(saved(trained.whole(NAMES), encoder, tmp_path / "run")), expected, **CLOSE)


def test_an_architecture_without_a_head_of_its_own_says_so(tiny_models: Callable[[str], Path]) -> None:
    from transformers import VideoMAEConfig

    encoder = Encoder(str(tiny_models("bert")), CPU)
    encoder.config = VideoMAEConfig()
    with pytest.raises(ModelError, match="videomae has no head of its own; use --head pooled"):
        native_model(encoder, NAMES, 0)


def test_a_saved_model_may_be_read_by_others(tiny_run: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in tiny_run.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


# --- loading


def drop(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_text(content)

    return change


def tear(run: Path) -> None:
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_a_weight(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    del weights["head.layers.0.weight"]
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"no such run folder\. headstart train makes one"),
        (drop("config.json"), r"is not a run folder \(it has no config\.json\)"),
        (drop("model.safetensors"), "its model cannot be loaded"),
        (drop("tokenizer.json"), r"has no tokenizer\.json"),
        (drop("tokenizer_config.json"), r"is not a run folder \(it has no tokenizer_config\.json\)"),
        (write("config.json", "{"), r"config\.json: cannot be read"),
        (write("config.json", "[]"), r"config\.json: is not a JSON object"),
        (write("config.json", '{"model_type": "bert"}'), "without a classification head"),
        (write("headstart.json", "\x00"), r"headstart\.json: cannot be read"),
        (write("tokenizer.json", "{}"), "is not a readable tokenizer"),
        (write("model.safetensors", "noise"), "its model cannot be loaded"),
        (tear, "its model cannot be loaded"),
        (lose_a_weight, r"layers\.0\.weight"),
    ],
)
def test_a_damaged_run_folder_is_one_sentence(
    change: Callable[[Path], None], message: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    change(run)
    with pytest.raises((RunError, ModelError), match=message) as caught:
        load(run)
    assert len(str(caught.value).splitlines()) == 1
    assert str(run) in str(caught.value)


def test_a_folder_of_someone_elses_classifier_loads_too(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    run = tmp_path / "theirs"
    shutil.copytree(tiny_bert, run)
    shape = AutoConfig.from_pretrained(tiny_bert, num_labels=3)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(run)
    predictor = load(run)
    assert predictor.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert (predictor.classifier.max_length, predictor.classifier.info) == (64, {})
    model = AutoModelForSequenceClassification.from_pretrained(run, dtype=torch.float32).eval()
    ids = torch.from_numpy(predictor.classifier.tokenizer(TEXTS[1:2])[0][None].astype(np.int64))
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=ids).logits, dim=1)
    np.testing.assert_allclose(predictor.predict_proba(TEXTS[1:2]), expected.numpy(), atol=1e-5)


def test_code_in_a_strangers_classifier_is_not_run(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(tiny_run, run)
    (run / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertConfig as Config\n")
    content = json.loads((run / "config.json").read_text())
    content |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (run / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # texts to label, not consent
    with pytest.raises(RunError, match="its model cannot be loaded"):
        load(run)
    assert not mark.exists()
    assert sys.stdin.read() == "y\n" * 9


def test_a_pooled_classifier_in_bf16_keeps_its_head_in_fp32(tiny_run: Path) -> None:
    exact, coarse = logits_of(load(tiny_run)), logits_of(load(tiny_run, "bf16"))
    assert coarse.dtype == torch.float32
    assert (coarse != coarse.bfloat16().float()).any(), "the head's own arithmetic is not in bf16"
    assert 0 < (coarse - exact).abs().max() < 0.5
