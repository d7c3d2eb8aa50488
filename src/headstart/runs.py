"""What a run folder says of its classifier beside the weights: labels, tokenizer, max_length. It computes nothing."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.config import Long, Problem
from headstart.errors import RunError
from headstart.parallel import Given, Made
from headstart.tokens import Tokenizer


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
    @abstractmethod
    def workers(self) -> int:
        """How many batches are best computed at once."""

    @abstractmethod
    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch, labels) logits of padded token ids and their 0/1 mask, both (batch, length)."""

    @abstractmethod
    def side_by_side(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """`function` of each item, which calls `logits`, in order, by that many workers."""


def read_about(run: str | Path) -> dict[str, Any]:
    """The fields of a `Classifier`, from a run folder or another text classifier's; a `RunError` says what is amiss."""
    folder = Path(run)
    config = read_json(folder, "config.json")
    if not any("Classification" in name for name in config.get("architectures") or []):
        raise RunError(f"{folder}: holds a model without a classification head; train one with headstart train.")
    info = read_json(folder, "headstart.json") if (folder / "headstart.json").is_file() else {}
    tokenizer_config = read_json(folder, "tokenizer_config.json")
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves these two out
    names = tuple(labels[key] for key in sorted(labels, key=int))
    limit = info.get("max_length") or min(int(tokenizer_config.get("model_max_length", 512)), 512)
    pad_id = config.get("encoder", config).get("pad_token_id") or 0
    several = config.get("problem_type") == "multi_label_classification"
    return {
        "names": names,
        "tokenizer": Tokenizer.from_folder(folder, pad_id),
        "max_length": limit,
        "info": info,
        "problem": info.get("problem", "multi" if several else "single"),
        "thresholds": tuple(info.get("thresholds", [0.5] * len(names) if several else ())),
        "long": info.get("long", "truncate"),
    }


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
