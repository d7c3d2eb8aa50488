"""The whole classifier: building heads on an encoder, saving and loading a run folder.

This room knows transformers' model classes and the run folder's files. It knows nothing of how weights are learnt.
"""

import contextlib
import copy
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.config import Problem
from headstart.encoder import Encoder, Placement, load_tokenizer, quiet_transformers
from headstart.engine import NATIVE_HEADS, NativeScorer, PooledScorer, pooled_output, side_by_side, supports
from headstart.errors import ModelError, RunError, count_of
from headstart.features import Features
from headstart.parallel import Given, Made
from headstart.runs import Classifier, read_about, read_json
from headstart.tokens import Tokenizer, Tokens

SHORTENED = ("bert", "roberta", "electra", "distilbert", "mpnet", "deberta-v2")
"""Families that stay themselves without their upper layers. ModernBERT ends in a norm; ALBERT's layers are one."""
WHOLE = ("word_embeddings", "query", "q_lin")  # few of the former are read; the others are scaled, then converted
VOCABULARIES = ("vocab.txt", "vocab.json", "spm.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class HeadSpec:
    """The shape of a pooled head: what it reads (`pooler`, `cls` or `mean-K`, in order) and its hidden layer (0: none).

    With `standardize`, inputs are shifted and scaled by the training texts' mean and deviation.
    """

    features: tuple[str, ...]
    width: int
    dropout: float
    standardize: bool = True


def head_inputs(encoder: Encoder, features: Features, names: Sequence[str]) -> torch.Tensor:
    """What a pooled head reads, from stored features: (n, len(names) * hidden) fp32."""
    stored = ["cls" if name == "pooler" else name for name in names]
    if unknown := [name for name in stored if name not in features.layout]:
        raise ModelError(f"There is no feature {unknown[0]!r} here; there are: pooler, {', '.join(features.layout)}.")
    inputs = torch.from_numpy(features.columns(stored))
    if "pooler" in names and encoder.has_pooler:
        place = list(names).index("pooler")
        inputs[:, place] = pooled_output(encoder.weights, inputs[:, place])
    return inputs.flatten(1)


class PooledModel:
    """The config.json and model.safetensors of an encoder and a trained pooled head, without layers it does not read.

    They are as `HeadstartForSequenceClassification` would save them. That class is not loaded, since it brings
    transformers' models, which take seconds.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, spec: HeadSpec, names: Sequence[str]) -> None:
        features = ["cls" if name == "pooler" and not encoder.has_pooler else name for name in spec.features]
        shape, highest = dict(encoder.shape), encoder.layers
        if encoder.config.model_type in SHORTENED and not {"cls", "pooler"} & set(features):
            highest = max(1, *(int(name.removeprefix("mean-")) for name in features))
            shape["n_layers" if "n_layers" in shape else "num_hidden_layers"] = highest

        def is_read(name: str) -> bool:
            if layer := re.match(r"(?:encoder|transformer)\.layer\.(\d+)\.", name):
                return int(layer[1]) < highest
            return "pooler" in features or not name.startswith("pooler.")

        tensors = {f"encoder.{name}": tensor for name, tensor in encoder.weights.items() if is_read(name)}
        tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
        self.tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        architecture = "HeadstartForSequenceClassification"
        classes = {"AutoConfig": "HeadstartConfig", "AutoModelForSequenceClassification": architecture}
        self.config = {
            "model_type": "headstart",
            "architectures": [architecture],
            "auto_map": {auto: f"modeling_headstart.{name}" for auto, name in classes.items()},
            "dtype": "float32",
            "encoder": shape,
            "head_features": features,
            "head_width": spec.width,
            "head_dropout": spec.dropout,
            "transformers_version": importlib.metadata.version("transformers"),
            **label_settings(names),
        }


class NativeHead(nn.Module):
    """A `...ForSequenceClassification` model that is given what its body would have said."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) stored features to (batch, labels) logits."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        body = self.model.base_model
        has_pooler = getattr(body, "pooler", None) is not None
        pooled = pooled_output(dict(body.named_parameters()), features) if has_pooler else None
        said = BaseModelOutputWithPooling(last_hidden_state=features.unsqueeze(1), pooler_output=pooled)
        body.forward = lambda *_, **__: said
        try:
            return self.model(input_ids=features).logits
        finally:
            del body.forward


def native_model(encoder: Encoder, names: Sequence[str], seed: int) -> Any:
    """The architecture's own classifier on this encoder, with a fresh head; a `ModelError` if transformers has none."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(encoder.config)
    config.update(label_settings(names))
    torch.manual_seed(seed)
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(f"{encoder.source}: {config.model_type} has no head of its own; use --head pooled.") from error
    empty = getattr(model, model.base_model_prefix)
    missing, _ = empty.load_state_dict(encoder.weights, strict=False)
    if strange := [name for name in missing if "pooler" not in name]:
        raise ModelError(f"{encoder.source}: its weights do not fit {type(model).__name__} ({strange[0]} is missing).")
    for name, parameter in empty.named_parameters():
        parameter.requires_grad_("pooler" in name)  # it stands after the encoder's output: part of the head
    return model


Depth = int | Literal["all"]  # how many of the top layers are trained; `all`: every layer, and the embeddings too


def check_depth(encoder: Encoder, depth: Depth) -> None:
    """Refuse, by a `ModelError`, a depth to which an encoder cannot be thawed."""
    if depth != "all" and encoder.engine is None:
        families = ", ".join(NATIVE_HEADS)
        raise ModelError(f"--thaw {depth}: only {families} thaw layer by layer; use --thaw 0 or all here.")
    if depth != "all" and depth > encoder.layers:
        raise ModelError(f"--thaw {depth}: {encoder.source} has {count_of(encoder.layers, 'layer')}.")


class ThawedModel(nn.Module):
    """A `...ForSequenceClassification` model whose top `depth` layers and head are trained, in place.

    The engine computes it anew each step from the weights as they are, in the encoder's precision; families it does not
    know are computed by transformers, and can be thawed only as a whole. With `all`, word embeddings are cut down
    to the rows that `tokens` use: the others get no gradient and no decay, so AdamW would leave them as they are.
    `whole` puts them back.
    """

    def __init__(self, encoder: Encoder, model: Any, depth: Depth, tokens: Tokens) -> None:
        super().__init__()
        self.config, self.placement, self.model = encoder.shape, encoder.placement, model
        if self.placement.precision == "fp16":  # in which small gradients become 0
            self.placement = replace(self.placement, precision="fp32")
        self.start = 0 if depth == "all" else encoder.layers - depth
        self.uses_engine = encoder.engine is not None
        check_depth(encoder, depth)
        layer = re.compile(r"\.layer\.(\d+)\.")
        for name, parameter in model.named_parameters():
            found = layer.search(name)
            above = int(found[1]) >= self.start if found else "embeddings" not in name
            parameter.requires_grad_(depth == "all" or above)
        self.used: NDArray[np.int64] | None = None  # token ids, sorted
        if depth == "all" and self.uses_engine:
            up_to_padding = np.arange(encoder.tokenizer.pad_id + 1)  # so that it keeps its own
            self.used = np.union1d(tokens.ids, up_to_padding).astype(np.int64)
            words = model.get_input_embeddings()
            self.all_words = [words.weight.data]  # in a list, so that it does not move or train
            words.weight = nn.Parameter(words.weight.data[torch.from_numpy(self.used)])
        model.to(self.placement.device)
        self.trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.kept, self.halves, self.in_step = dict[str, torch.Tensor](), dict[str, torch.Tensor](), False

    @contextlib.contextmanager
    def one_step(self) -> Iterator[list[torch.Tensor]]:
        """Compute, within the block, with weights converted once, for all parts of a batch, in memory that is kept.

        It gives what to differentiate by, for each parameter that is trained: copies, but for the head and `WHOLE`.
        """
        half = self.placement.dtype
        if self.uses_engine and half != torch.float32:
            for name, one in self.trained.items():
                if (".layer." in name or "embeddings" in name) and not any(part in name for part in WHOLE):
                    if name not in self.kept:
                        self.kept[name] = torch.empty_like(one, dtype=half)
                    self.kept[name].detach().copy_(one.detach())
                    self.halves[name] = self.kept[name].requires_grad_()
        self.in_step = True
        try:
            yield [self.halves.get(name, one) for name, one in self.trained.items()]
        finally:
            self.halves, self.in_step = {}, False

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, labels) logits of token ids, or of the hidden states below the thawed layers, and their mask.

        They are computed where the inputs are: gradients find their way back to the weights.
        """
        if not self.uses_engine:
            self.model.eval()  # no dropout, as in the engine: a run that is resumed needs no generator's state
            half = self.placement.precision != "fp32"
            # Threads would share its cache, and when it is cleared decides how gradients of ALBERT's one layer add up.
            with torch.autocast(x.device.type, self.placement.dtype, enabled=half, cache_enabled=False):
                return self.model(input_ids=x, attention_mask=mask).logits.float()
        live = {**self.trained, **self.halves}
        scorer = NativeScorer(self.config, live, x.device, self.placement.dtype, self.start)
        scorer.sparse = self.in_step and x.device.type == "cpu"
        if x.is_floating_point():
            return scorer.onward(x.to(self.placement.dtype), mask)
        return scorer(x, mask)

    def ids(self, tokens: Tokens) -> Tokens:
        """Token ids as this model counts them."""
        known = tokens.ids if self.used is None else np.searchsorted(self.used, tokens.ids)
        return replace(tokens, ids=known.astype(np.int32))

    def whole(self) -> Any:
        """The transformers model, on the CPU and in eval mode, with all its embeddings."""
        if self.used is not None:
            words = self.model.get_input_embeddings()
            everything = self.all_words[0].clone()
            everything[torch.from_numpy(self.used)] = words.weight.data.cpu()
            words.weight = nn.Parameter(everything)
            self.used = None
        return self.model.cpu().eval()


def rescale(model: nn.Module, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> None:
    """Multiply the logits of a head, or of a model with one, and add to them, (labels,) each, in its last layer."""
    last = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == len(scale)][-1]
    with torch.no_grad():
        last.weight *= torch.from_numpy(scale).float()[:, None]
        if last.bias is not None:
            last.bias *= torch.from_numpy(scale).float()
            last.bias += torch.from_numpy(shift).float()


def native_feature(encoder: Encoder) -> str:
    """Which stored feature the architecture's own head reads."""
    mean = getattr(encoder.config, "classifier_pooling", "cls") == "mean"
    return f"mean-{encoder.layers}" if mean else "cls"


def label_settings(names: Sequence[str]) -> dict[str, Any]:
    """What a transformers configuration says of the labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@dataclass(frozen=True)
class TorchClassifier(Classifier):
    """A classifier that torch computes."""

    model: "PooledScorer | NativeScorer | LibraryScorer"

    @property
    def workers(self) -> int:
        """As many as torch has threads."""
        return torch.get_num_threads()

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch, labels) logits of padded token ids."""
        where = self.model.device
        with torch.inference_mode():
            return self.model(torch.from_numpy(ids).to(where), torch.from_numpy(mask).to(where)).float().cpu().numpy()

    def side_by_side(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """As `engine.side_by_side`."""
        return side_by_side(function, items)


class LibraryScorer(nn.Module):
    """A transformers classifier with the faces of the engine's scorers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, labels) logits of token ids."""
        return self.model(input_ids=ids, attention_mask=mask).logits

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """The word embeddings of token ids, (batch, length, width)."""
        return self.model.get_input_embeddings()(ids)

    def onward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, labels) logits of word embeddings."""
        return self.model(inputs_embeds=states, attention_mask=mask).logits


def save_model(folder: Path, model: Any, encoder: Encoder, max_length: int, problem: Problem) -> None:
    """Write a `PooledModel` or a transformers model, and the encoder's tokenizer, as a Hugging Face model folder."""
    problem_type = f"{'multi' if problem == 'multi' else 'single'}_label_classification"  # which decides its loss
    tokenizer = copy.deepcopy(encoder.hf_tokenizer)
    tokenizer.model_max_length = max_length  # where transformers reads it
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        if not isinstance(model, PooledModel):
            model.config.problem_type = problem_type
            model.save_pretrained(folder)
            return
    config = json.dumps({**model.config, "problem_type": problem_type}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    save_file(model.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(__file__).with_name("modeling_headstart.py"), folder / "modeling_headstart.py")


def load_run(run: str | Path, placement: Placement) -> TorchClassifier:
    """Load a run folder (or another text classifier's), running no code in it; a `RunError` says what is amiss."""
    folder = Path(run)
    about, config = read_about(folder, read_tokenizer), read_json(folder, "config.json")
    if not any(folder.glob("*.safetensors")) and (pickled := next(folder.glob("pytorch_model*.bin"), None)):
        how = "AutoModelForSequenceClassification.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        what = f"{pickled}: is a pickle, which headstart never loads"
        raise RunError(f"{what}. If you trust it, have transformers write safetensors: {how}.")
    try:
        model = _load_plain(folder, config, placement) or LibraryScorer(load_library(folder, placement))
        if isinstance(model, NativeScorer) and len(model.out[1]) != len(about["names"]):
            raise ValueError(f"it has {len(model.out[1])} outputs, and config.json names {len(about['names'])} labels")
    except Exception as error:  # transformers and safetensors raise many kinds
        raise RunError(f"{folder}: its model cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    return TorchClassifier(**about, model=model)


def read_tokenizer(folder: Path, pad_id: int) -> Tokenizer:
    """The tokenizer of a saved model; where there is but a vocabulary, as transformers converts it."""
    if not (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in VOCABULARIES):
        return load_tokenizer(folder)[1]
    return Tokenizer.from_folder(folder, pad_id)


def _load_plain(folder: Path, config: dict[str, Any], placement: Placement) -> PooledScorer | NativeScorer | None:
    """The classifier in plain torch; None where the engine does not know it, or its weights go by other names."""
    if supports(config.get("encoder", config)) and (folder / "model.safetensors").is_file():  # and not in pieces
        weights = load_file(folder / "model.safetensors")
        scorer = PooledScorer if config.get("model_type") == "headstart" else NativeScorer
        with contextlib.suppress(KeyError, ValueError):
            return scorer(config, weights, placement.device, placement.dtype)
    return None


def load_library(folder: Path, placement: Placement) -> Any:
    """The transformers model of a run folder, in eval mode; of ours the head stays fp32. It raises what they raise."""
    from transformers import AutoModelForSequenceClassification

    from headstart.modeling_headstart import HeadstartForSequenceClassification

    pooled = read_json(folder, "config.json").get("model_type") == "headstart"
    model_class = HeadstartForSequenceClassification if pooled else AutoModelForSequenceClassification
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    if missing := [name for name in report["missing_keys"] if "position_ids" not in name]:
        raise ValueError(f"model.safetensors lacks {len(missing)} weights, such as {missing[0]}")
    model.to(placement.device)
    (model.encoder if pooled else model).to(placement.dtype)
    return model.eval()
