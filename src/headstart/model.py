"""The whole classifier: building heads on an encoder, saving and loading a run folder.

This room knows transformers' model classes and the run folder's files. It knows nothing of how weights are learnt.
"""

import contextlib
import copy
import importlib.metadata
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.encoder import Encoder, Placement, config_dict, quiet_transformers
from headstart.engine import NativeScorer, PooledHead, PooledScorer, pooled_output, supports
from headstart.errors import ModelError, RunError, disk_errors
from headstart.features import Features, sync_folder
from headstart.tokens import Tokenizer

SHORTENED = ("bert", "roberta", "electra", "distilbert", "mpnet", "deberta-v2")
"""Families that stay themselves without their upper layers. ModernBERT ends in a norm; ALBERT's layers are one."""


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
    if unknown := [name for name, there in zip(names, stored, strict=True) if there not in features.layout]:
        raise ModelError(f"There is no feature {unknown[0]!r} here; there are: pooler, {', '.join(features.layout)}.")
    inputs = torch.from_numpy(features.columns(stored))
    if "pooler" in names and encoder.has_pooler:
        place = list(names).index("pooler")
        inputs[:, place] = pooled_output(encoder.weights, inputs[:, place])
    return inputs.flatten(1)


def new_head(inputs: int, spec: HeadSpec, labels: int, seed: int) -> PooledHead:
    """A fresh pooled head that reads `inputs` numbers, as they are until its `mean` and `scale` are set."""
    torch.manual_seed(seed)
    return PooledHead(inputs, spec.width, labels, spec.dropout)


@dataclass(frozen=True)
class PooledModel:
    """The config.json and model.safetensors of an encoder, without layers that its head does not read, and the head."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def pooled_model(encoder: Encoder, head: nn.Module, spec: HeadSpec, names: Sequence[str]) -> PooledModel:
    """Put an encoder and a trained pooled head together.

    They are put down as `HeadstartForSequenceClassification` would save them, without loading that class: it brings
    transformers' models, which take seconds.
    """
    features = ["cls" if name == "pooler" and not encoder.has_pooler else name for name in spec.features]
    shape = config_dict(encoder.config)
    highest = encoder.layers
    if encoder.config.model_type in SHORTENED and not {"cls", "pooler"} & set(features):
        highest = max(1, *(int(name.removeprefix("mean-")) for name in features))
        shape["n_layers" if "n_layers" in shape else "num_hidden_layers"] = highest

    def is_read(name: str) -> bool:
        if layer := re.match(r"(?:encoder|transformer)\.layer\.(\d+)\.", name):
            return int(layer[1]) < highest
        return "pooler" in features or not name.startswith("pooler.")

    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.weights.items() if is_read(name)}
    tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    config = {
        "model_type": "headstart",
        "architectures": ["HeadstartForSequenceClassification"],
        "auto_map": {
            "AutoConfig": "modeling_headstart.HeadstartConfig",
            "AutoModelForSequenceClassification": "modeling_headstart.HeadstartForSequenceClassification",
        },
        "dtype": "float32",
        "encoder": shape,
        "head_features": features,
        "head_width": spec.width,
        "head_dropout": spec.dropout,
        "transformers_version": importlib.metadata.version("transformers"),
        **label_settings(names),
    }
    return PooledModel(config, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


class StoredBody(nn.Module):
    """Stands in for the encoder of a `...ForSequenceClassification` model: is given stored output, has its pooler."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.pooler = getattr(body, "pooler", None)
        self.pooler_activation = getattr(body, "pooler_activation", None)

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        """(batch, hidden) stored vectors to a sequence of one token."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        from headstart.modeling_headstart import pooler_output

        pooled = None if self.pooler is None else pooler_output(self, input_ids)
        return BaseModelOutputWithPooling(last_hidden_state=input_ids.unsqueeze(1), pooler_output=pooled)


class NativeHead(nn.Module):
    """A `...ForSequenceClassification` model whose body is set aside until `whole` puts it back."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.prefix = model.base_model_prefix
        self.body = [getattr(model, self.prefix)]  # in a list, so that it is no submodule and is not trained
        setattr(model, self.prefix, StoredBody(self.body[0]))
        self.model = model

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) stored features to (batch, labels) logits."""
        return self.model(input_ids=features).logits

    def whole(self) -> Any:
        """The transformers model with its body back, in eval mode."""
        setattr(self.model, self.prefix, self.body[0])
        return self.model.eval()


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


def native_feature(encoder: Encoder) -> str:
    """Which stored feature the architecture's own head reads."""
    mean = getattr(encoder.config, "classifier_pooling", "cls") == "mean"
    return f"mean-{encoder.layers}" if mean else "cls"


def label_settings(names: Sequence[str]) -> dict[str, Any]:
    """What a transformers configuration says of the labels."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


# --- the run folder


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, as a run folder holds it: `names` are in label order, a text is cut to `max_length` tokens.

    `info` is headstart.json, empty for a model that headstart did not train.
    """

    model: Any
    tokenizer: Tokenizer
    names: tuple[str, ...]
    max_length: int
    info: dict[str, Any]

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> torch.Tensor:
        """(batch, labels) fp32 logits of padded token ids."""
        where = self.model.device
        with torch.inference_mode():
            found = self.model(torch.from_numpy(ids).to(where), torch.from_numpy(mask).to(where))
        return (found if isinstance(found, torch.Tensor) else found.logits).float().cpu()


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot or must not be written, before any work is done."""
    with disk_errors(out):
        if out.is_file():
            raise RunError(f"{out}: is a file; --out takes a folder.")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise RunError(f"{out}: is not empty. Choose another --out, or replace it with --overwrite.")
            if not (out / "headstart.json").is_file():
                raise RunError(f"{out}: is not a run folder (no headstart.json), so --overwrite does not replace it.")
        place = out.absolute().parent
        while not place.exists():  # its missing folders are made when there is something to put into them
            place = place.parent
        probe = _beside(place / out.name, "tmp")
        probe.mkdir()
        probe.rmdir()


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill beside `out`; at the end it is synced and renamed to `out`, or removed if anything failed.

    Without `overwrite` nothing makes way: if something has come to be at `out`, a `RunError` says which name the folder
    has got instead.
    """
    with disk_errors(out):
        place = out.resolve()  # a link stays one
        temporary = _beside(place, "tmp")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _settle(temporary)
            replaced = _beside(place, "old")
            if overwrite and place.is_dir():
                place.rename(replaced)
            kept = _rename(temporary, place)
            sync_folder(place.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if kept != place:
        raise RunError(
            f"{out}: something has come to be there since this run began, so it was left alone. "
            f"This run's result is kept in {kept}."
        )


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}"


def _settle(folder: Path) -> None:
    """Give files the usual mode (safetensors writes for the owner alone), and wait until the disk has everything."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(0o666 & ~mask)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _rename(folder: Path, place: Path) -> Path:
    """Rename to `place` if that is free or an empty folder, else to `place`-2, `place`-3, …; returns the new name."""
    target, number = place, 1
    while True:
        try:
            if os.name == "nt" and target.is_dir():
                target.rmdir()  # POSIX replaces an empty folder
            return folder.rename(target)
        except OSError:
            if not os.path.lexists(target):
                raise
            number += 1
            target = place.with_name(f"{place.name}-{number}")


def save_model(folder: Path, model: Any, encoder: Encoder, max_length: int) -> None:
    """Write a `PooledModel` or a transformers model, and the encoder's tokenizer, as a Hugging Face model folder."""
    tokenizer = copy.deepcopy(encoder.hf_tokenizer)
    tokenizer.model_max_length = max_length  # where transformers reads it
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        if not isinstance(model, PooledModel):
            model.save_pretrained(folder)
            return
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    save_file(model.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(__file__).with_name("modeling_headstart.py"), folder / "modeling_headstart.py")


def load_run(run: str | Path, placement: Placement) -> Classifier:
    """Load a run folder (or another folder with a text classifier); no code in it is run. A pooled head stays fp32.

    Raises:
        RunError: it is not one, or a file in it is missing or damaged.
    """
    folder = Path(run)
    config = read_json(folder, "config.json")
    if not any("Classification" in name for name in config.get("architectures") or []):
        raise RunError(f"{folder}: holds a model without a classification head; train one with headstart train.")
    info = read_json(folder, "headstart.json") if (folder / "headstart.json").is_file() else {}
    tokenizer_config = read_json(folder, "tokenizer_config.json")
    pooled = config.get("model_type") == "headstart"
    try:
        model: Any = _load_plain(folder, config, placement)
        if model is None:
            model = _load_transformers(folder, placement, "encoder" if pooled else None)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise RunError(f"{folder}: its model cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves these two out
    names = tuple(labels[key] for key in sorted(labels, key=int))
    limit = info.get("max_length") or min(int(tokenizer_config.get("model_max_length", 512)), 512)
    pad_id = config.get("encoder", config).get("pad_token_id") or 0
    return Classifier(model, Tokenizer.from_folder(folder, pad_id), names, limit, info)


def _load_plain(folder: Path, config: dict[str, Any], placement: Placement) -> PooledScorer | NativeScorer | None:
    """The classifier in plain torch; None where the engine does not know it, or its weights go by other names."""
    pooled = config.get("model_type") == "headstart"
    if not supports(config["encoder"] if pooled else config):
        return None
    weights = load_file(folder / "model.safetensors")
    with contextlib.suppress(KeyError, ValueError):
        return (PooledScorer if pooled else NativeScorer)(config, weights, placement.device, placement.dtype)
    return None


def _load_transformers(folder: Path, placement: Placement, body: str | None) -> Any:
    """A transformers model, ours if it has a `body` that computes in another precision than the head."""
    from transformers import AutoModelForSequenceClassification

    from headstart.modeling_headstart import HeadstartForSequenceClassification

    model_class = HeadstartForSequenceClassification if body else AutoModelForSequenceClassification
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    if missing := [name for name in report["missing_keys"] if "position_ids" not in name]:
        raise ValueError(f"model.safetensors lacks {len(missing)} weights, such as {missing[0]}")
    model.to(placement.device)
    (getattr(model, body) if body else model).to(placement.dtype)
    return model.eval()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of a run folder's JSON files; a `RunError` if it is not there or not JSON."""
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = f"{path}: is not a JSON object."
    except (ValueError, OSError) as error:
        problem = f"{path}: cannot be read ({error})."
    if not folder.is_dir():
        problem = f"{folder}: no such run folder. headstart train makes one."
    elif not path.exists():
        problem = f"{folder}: is not a run folder (it has no {name}). headstart train makes one."
    raise RunError(problem)
