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
from headstart.engine import PooledHead, PooledScorer, pooled_output, supports
from headstart.errors import ModelError, RunError, disk_errors
from headstart.features import Features, sync_folder
from headstart.tokens import Tokenizer

SHORTENED = ("bert", "roberta", "electra", "distilbert", "mpnet", "deberta-v2")
"""Families that stay themselves without their upper layers. ModernBERT ends in a norm; ALBERT's layers are one."""


@dataclass(frozen=True)
class HeadSpec:
    """The shape of a pooled head.

    Attributes:
        features: what it reads: `pooler`, `cls` or `mean-K`, in order.
        width: of its hidden layer; 0: none.
        dropout: in its hidden layer.
        standardize: whether inputs are shifted and scaled by the training texts' mean and deviation.
    """

    features: tuple[str, ...]
    width: int
    dropout: float
    standardize: bool = True


def head_inputs(encoder: Encoder, features: Features, names: Sequence[str]) -> torch.Tensor:
    """What a pooled head reads, from stored features: (n, len(names) * hidden) fp32.

    Raises:
        ModelError: a name that the store does not keep.
    """
    parts = []
    for name in names:
        stored = "cls" if name == "pooler" else name
        if stored not in features.layout:
            raise ModelError(f"There is no feature {name!r} here; there are: pooler, {', '.join(features.layout)}.")
        vectors = torch.from_numpy(features.values[:, features.layout.index(stored)].astype(np.float32))
        if name == "pooler" and encoder.has_pooler:
            vectors = pooled_output(encoder.weights, vectors)
        parts.append(vectors)
    return torch.cat(parts, dim=1)


def new_head(inputs: torch.Tensor, spec: HeadSpec, labels: int, seed: int) -> PooledHead:
    """A fresh pooled head for `inputs` (n, d), whose statistics it takes."""
    torch.manual_seed(seed)
    head = PooledHead(inputs.shape[1], spec.width, labels, spec.dropout)
    if spec.standardize:
        head.mean.copy_(inputs.mean(dim=0))
        head.scale.copy_(1 / inputs.std(dim=0).clamp_min(1e-6))
    return head


@dataclass(frozen=True)
class PooledModel:
    """An encoder, without the layers that its head does not read, and the head: what a run folder holds of them.

    Attributes:
        config: the content of config.json.
        tensors: the content of model.safetensors.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def pooled_model(encoder: Encoder, head: nn.Module, spec: HeadSpec, names: Sequence[str]) -> PooledModel:
    """Put an encoder and a trained pooled head together.

    They are put down as `HeadstartForSequenceClassification` would save them, without loading that class: it brings
    transformers' models, which take seconds.
    """
    features = ["cls" if name == "pooler" and not encoder.has_pooler else name for name in spec.features]
    shape = config_dict(encoder.config)
    tensors = {name: tensor for name, tensor in encoder.weights.items() if not name.startswith("pooler.")}
    if "pooler" in features:
        tensors = dict(encoder.weights)
    elif "cls" not in features and encoder.config.model_type in SHORTENED:
        highest = max(1, *(int(name.removeprefix("mean-")) for name in features))
        shape["n_layers" if "n_layers" in shape else "num_hidden_layers"] = highest
        above = re.compile(r"(?:encoder|transformer)\.layer\.(\d+)\.")
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not (at := above.match(name)) or int(at.group(1)) < highest
        }
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
    whole = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    whole |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return PooledModel(config, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()})


class StoredBody(nn.Module):
    """Stands in for the encoder of a `...ForSequenceClassification` model: takes its stored output as input.

    Args:
        body: the encoder whose pooler, if it has one, is used (and trained).
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.pooler = getattr(body, "pooler", None)
        self.pooler_activation = getattr(body, "pooler_activation", None)

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        """(batch, hidden) stored vectors, passed on as a sequence of one token."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        from headstart.modeling_headstart import pooler_output

        pooled = None if self.pooler is None else pooler_output(self, input_ids)
        return BaseModelOutputWithPooling(last_hidden_state=input_ids.unsqueeze(1), pooler_output=pooled)


class NativeHead(nn.Module):
    """A `...ForSequenceClassification` model as a function of stored features: (batch, hidden) to logits.

    Args:
        model: the transformers model; its body is set aside until `whole` puts it back.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.prefix = model.base_model_prefix
        self.body = [getattr(model, self.prefix)]  # in a list, so that it is no submodule and is not trained
        setattr(model, self.prefix, StoredBody(self.body[0]))
        self.model = model

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, labels)."""
        return self.model(input_ids=features).logits

    def whole(self) -> Any:
        """The transformers model with its body back, in eval mode."""
        setattr(self.model, self.prefix, self.body[0])
        return self.model.eval()


def native_model(encoder: Encoder, names: Sequence[str], seed: int) -> Any:
    """The architecture's own classifier on this encoder, with a fresh head.

    Raises:
        ModelError: transformers has none for this architecture.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(encoder.config)
    for name, value in label_settings(names).items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(f"{encoder.source}: {config.model_type} has no head of its own; use --head pooled.") from error
    empty = getattr(model, model.base_model_prefix)
    missing, _ = empty.load_state_dict(encoder.weights, strict=False)
    strange = [name for name in missing if "pooler" not in name]
    if strange:
        raise ModelError(f"{encoder.source}: its weights do not fit {type(model).__name__} ({strange[0]} is missing).")
    for parameter in empty.parameters():
        parameter.requires_grad_(requires_grad=False)
    if getattr(empty, "pooler", None) is not None:
        empty.pooler.requires_grad_(requires_grad=True)  # it stands after the encoder's output: part of the head
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
    """A trained classifier, as a run folder holds it.

    Attributes:
        model: the transformers model, in eval mode.
        tokenizer: ours.
        names: the labels in label order.
        max_length: tokens kept of a text.
        info: headstart.json; empty for a model that headstart did not train.
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


def check_out(out: Path, overwrite: str) -> None:
    """Refuse an output folder that cannot or must not be written, before any work is done.

    Args:
        out: the run folder to be.
        overwrite: `replace` allows a folder that is there; `refuse` does not.

    Raises:
        RunError: it is not empty, or is a file.
        DiskError: it cannot be written.
    """
    with disk_errors(out):
        if out.is_file():
            raise RunError(f"{out}: is a file; --out takes a folder.")
        if overwrite == "refuse" and out.is_dir() and any(out.iterdir()):
            raise RunError(f"{out}: is not empty. Choose another --out, or replace it with --overwrite.")
        if overwrite == "replace" and out.is_dir() and any(out.iterdir()) and not (out / "headstart.json").is_file():
            raise RunError(f"{out}: is not a run folder (no headstart.json), so --overwrite does not replace it.")
        place = out.absolute().parent
        while not place.exists():  # its missing folders are made when there is something to put into them
            place = place.parent
        probe = place / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
        probe.mkdir()
        probe.rmdir()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`; at the end it is synced and renamed to `out`, or removed if anything failed.

    Raises:
        DiskError: full, read-only or forbidden.
    """
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    with disk_errors(out):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone; a server may be another
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
                sync_folder(folder)
            replaced = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.old"
            if out.exists():
                out.rename(replaced)
            temporary.rename(out)
            sync_folder(out.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def save_model(folder: Path, model: Any, encoder: Encoder, max_length: int) -> None:
    """Write a model and its tokenizer as a Hugging Face model folder.

    Args:
        folder: is there, and is empty.
        model: a `PooledModel`, or a transformers model.
        encoder: whose tokenizer it uses.
        max_length: tokens kept of a text; transformers reads it from the tokenizer.
    """
    tokenizer = copy.deepcopy(encoder.hf_tokenizer)
    tokenizer.model_max_length = max_length
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        if not isinstance(model, PooledModel):
            model.save_pretrained(folder)
            return
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    save_file(model.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(__file__).with_name("modeling_headstart.py"), folder / "modeling_headstart.py")


def load_run(run: str | Path, placement: Placement) -> Classifier:
    """Load a run folder (or another folder with a text classifier); no code in it is run.

    Args:
        run: the folder.
        placement: where and in which format to compute; a pooled head computes in fp32.

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
        if pooled and supports(config["encoder"]):
            weights = load_file(folder / "model.safetensors")
            model: Any = PooledScorer(config, weights, placement.device, placement.dtype)
        else:
            model = _load_transformers(folder, placement)
    except RunError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds
        raise RunError(f"{folder}: its model cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    labels = config["id2label"] if pooled else model.config.id2label
    names = tuple(name for _, name in sorted(labels.items(), key=lambda item: int(item[0])))
    body = config.get("encoder", config)
    limit = info.get("max_length") or min(int(tokenizer_config.get("model_max_length", 512)), 512)
    return Classifier(model, Tokenizer.from_folder(folder, body.get("pad_token_id") or 0), names, limit, info)


def _load_transformers(folder: Path, placement: Placement) -> Any:
    from transformers import AutoModelForSequenceClassification

    from headstart.modeling_headstart import HeadstartForSequenceClassification

    ours = read_json(folder, "config.json").get("model_type") == "headstart"
    model_class = HeadstartForSequenceClassification if ours else AutoModelForSequenceClassification
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    if missing := [name for name in report["missing_keys"] if "position_ids" not in name]:
        raise RunError(f"{folder}: model.safetensors lacks {len(missing)} weights (such as {missing[0]}).")
    model.to(placement.device)
    (model.encoder if ours else model).to(placement.dtype)
    return model.eval()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of a run folder's JSON files.

    Raises:
        RunError: no folder, no such file in it, or not JSON.
    """
    path = folder / name
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder. headstart train makes one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{folder}: is not a run folder (it has no {name}). headstart train makes one.") from error
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: is not a JSON object.")
    return content
