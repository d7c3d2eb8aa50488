"""What a run folder says of its classifier beside the weights: labels, tokenizer, max_length. It computes nothing."""

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.config import Long, Problem
from headstart.errors import RunError
from headstart.parallel import Given, Made
from headstart.tokens import Tokenizer

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]  # of a model, on the Hub
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"  # what `minilm` is there
HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions start at padding_idx + 1


@dataclass(frozen=True)
class Classifier(ABC):
    """A trained classifier, as a run folder holds it, whatever computes it.

    `info` is headstart.json, empty if headstart did not train it.
    """

    names: tuple[str, ...]  # in label order
    tokenizer: Tokenizer
    max_length: int  # the most tokens read at once
    info: dict[str, Any]
    problem: Problem
    thresholds: tuple[float, ...]  # of `multi`: the least probability at which a text has each label
    long: Long  # what is read of a longer text

    @property
    def namings(self) -> tuple[Sequence[str], ...]:
        """The ways in which a table may name the labels, each in label order; the last is how they are shown.

        They are those trained on; of a classifier made elsewhere also numbers from 0, and the names in another case.
        """
        if "labels" in self.info:
            return self.info["labels"], self.names
        numbers, cases = tuple(map(str, range(len(self.names)))), (str.lower, str.upper, str.capitalize)
        ways = [numbers] if set(numbers).isdisjoint(self.names) else []
        ways += [way for case in cases if len(set(way := tuple(map(case, self.names)))) == len(way)]
        return self.names, *ways, self.names

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many batches are best computed at once."""

    @abstractmethod
    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch, labels) logits of padded token ids and their 0/1 mask, both (batch, length)."""

    @abstractmethod
    def side_by_side(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """`function` of each item, which calls `logits`, in order, by that many workers."""


def read_about(run: str | Path, tokenizer: Callable[[Path, int], Tokenizer] = Tokenizer.from_folder) -> dict[str, Any]:
    """The fields of a `Classifier`, from a run folder or another text classifier's; a `RunError` says what is amiss.

    `tokenizer` makes one of the folder and the id that pads.
    """
    folder = Path(run)
    config = read_json(folder, "config.json")
    if not any("SequenceClassification" in name for name in config.get("architectures") or []):
        raise RunError(f"{folder}: holds a model without a classification head; train one with headstart train.")
    names = label_names(folder, config)
    info = read_json(folder, "headstart.json") if (folder / "headstart.json").is_file() else {}
    said = "tokenizer_config.json"
    about_tokens = read_json(folder, said) if info or (folder / said).is_file() else {}
    body = config.get("encoder", config)
    most = position_limit(body)
    limit = info.get("max_length") or int(min(about_tokens.get("model_max_length") or most, most))
    several = config.get("problem_type") == "multi_label_classification"
    return {
        "names": names,
        "tokenizer": tokenizer(folder, body.get("pad_token_id") or 0),
        "max_length": limit,
        "info": info,
        "problem": info.get("problem", "multi" if several else "single"),
        "thresholds": tuple(info.get("thresholds", [0.5] * len(names) if several else ())),
        "long": info.get("long", "truncate"),
    }


def label_names(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a transformers configuration, in their order; a `RunError` if it has no two of different names."""
    usual = {number: f"LABEL_{number}" for number in range(config.get("num_labels") or 2)}
    labels = config.get("id2label") or usual  # transformers leaves these out
    try:
        names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    except (ValueError, TypeError) as error:
        raise RunError(f"{folder / 'config.json'}: its id2label does not number the labels ({error}).") from error
    if len(names) < 2 or config.get("problem_type") == "regression":
        raise RunError(f"{folder}: predicts a number, not a label (regression); headstart needs two labels or more.")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise RunError(f"{folder / 'config.json'}: two labels are named {repeated[0]!r}; rename one in id2label.")
    return names


def position_limit(config: Mapping[str, Any]) -> int:
    """The most tokens a model takes: its position embeddings, less RoBERTa's offset."""
    positions = int(config.get("max_position_embeddings") or 512)
    return positions - (int(config.get("pad_token_id", 1) or 0) + 1 if config.get("model_type") in OFFSET else 0)


def hub_id(model: str) -> str | None:
    """The Hub id of what a person called an encoder; None if that is a folder."""
    if model == "minilm":
        return MINILM_ID
    return model if HUB_ID.fullmatch(model) and not Path(model).is_dir() else None


def find_run(name: str) -> str:
    """A run folder's path; or where the local Hub cache has a model, by its Hub id: nothing is fetched."""
    if "/" in name and HUB_ID.fullmatch(name) and not Path(name).exists():
        from huggingface_hub import snapshot_download

        with contextlib.suppress(OSError, ValueError):  # it is not there, or no id
            return str(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    return name


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of a run folder's JSON files; a `RunError` if it is not there or not JSON."""
    path = folder / name
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder. headstart train makes one.")
    if not path.exists():
        raise RunError(f"{folder}: is not a run folder (it has no {name}). headstart train makes one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error}).") from error
    if isinstance(content, dict):
        return content
    raise RunError(f"{path}: is not a JSON object.")
