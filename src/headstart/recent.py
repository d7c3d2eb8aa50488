"""Encoders that stay loaded in a process, and what they made of texts seen lately, so that estimators share it.

This room knows encoders, features and heads, and how much memory they may take. It knows nothing of scikit-learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headstart.encoder import Encoder, Placement, stored_layout
from headstart.engine import PooledScorer
from headstart.features import Features, Keys, frozen_features, text_keys
from headstart.model import head_inputs, load_run
from headstart.predict import text_logits
from headstart.tokens import Tokenizer, Tokens, ragged

MOST_ENCODERS = 2  # that stay loaded
RECENT_BYTES = 256 * 1024**2  # of features of texts seen lately, kept in memory for each of them
RECENT_TEXTS = 100_000  # whose token ids are
Logits = NDArray[np.float64]


class RecentTokenizer(Tokenizer):
    """A tokenizer that remembers the texts it saw lately."""

    def __init__(self, plain: Tokenizer) -> None:
        self.__dict__ |= plain.__dict__
        self.recent: dict[str, NDArray[np.int32]] = {}

    def __call__(self, texts: Sequence[str], *, progress: str | None = None) -> Tokens:
        """As `Tokenizer` does."""
        known = self.recent
        if fresh := [text for text in dict.fromkeys(texts) if text not in known]:
            found = super().__call__(fresh, progress=progress)
            known = known | {text: found[i] for i, text in enumerate(fresh)}
        self.recent = known if len(known) <= RECENT_TEXTS else {}
        return ragged([known[text] for text in texts])


@dataclass
class Kept:
    """An encoder that stays loaded, and what it made of texts seen lately: distinct keys, and their features."""

    encoder: Encoder
    recent: tuple[Keys, NDArray[np.float16]] | None = None

    def features(self, encoder: Encoder, tokens: Tokens) -> Features:
        """As `frozen_features`, without looking at the disk where all of the texts were seen lately."""
        keys, where = np.unique(text_keys(tokens), return_inverse=True)
        known = np.zeros(len(keys), dtype=bool)
        if self.recent is not None:
            stored, values = self.recent
            _, here, places = np.intersect1d(keys, stored, assume_unique=True, return_indices=True)
            known[here] = True
            if known.all():
                return Features(values[places], where.ravel(), stored_layout(encoder), 0, len(keys))
        found = frozen_features(encoder, tokens)
        fresh = keys[~known], found.distinct[~known]
        if self.recent is not None and self.recent[1].nbytes + fresh[1].nbytes <= RECENT_BYTES:
            self.recent = np.concatenate([self.recent[0], fresh[0]]), np.concatenate([self.recent[1], fresh[1]])
        elif found.distinct.nbytes <= RECENT_BYTES:
            self.recent = keys, found.distinct
        return found


_KEPT: dict[tuple[Any, ...], Kept] = {}  # the one used last stands last


def kept_encoder(model: str, placement: Placement) -> Kept:
    """An encoder loaded once in this process, unless its files have changed since."""
    folder = Path(model)
    files = sorted((one.name, one.stat().st_mtime_ns) for one in folder.iterdir()) if folder.is_dir() else []
    key = (model, placement, *files)
    if (kept := _KEPT.pop(key, None)) is None:
        kept = Kept(Encoder(model, placement))
        kept.encoder.tokenizer = RecentTokenizer(kept.encoder.tokenizer)
    _KEPT[key] = kept
    while len(_KEPT) > MOST_ENCODERS:
        del _KEPT[next(iter(_KEPT))]
    return kept


@dataclass(frozen=True)
class FrozenScorer:
    """A head on stored features: what was encoded in training is not encoded again."""

    kept: Kept
    head: torch.nn.Module  # in double precision, so that a text's logits do not depend on those beside it
    features: tuple[str, ...]
    max_length: int
    long: Any

    def __call__(self, texts: Sequence[str]) -> Logits:
        """(n, labels) logits."""
        encoder = self.kept.encoder
        read = encoder.tokenizer.pieces(encoder.tokenizer(texts), self.max_length, self.long)
        inputs = head_inputs(encoder, self.kept.features(encoder, read.tokens), self.features)
        with torch.inference_mode():
            logits = self.head(inputs.to(next(self.head.parameters()).dtype))
        return np.asarray(read.mean(logits.double().numpy()), np.float64)


def scorer_of(folder: Path, info: dict[str, Any], placement: Placement) -> Callable[[Sequence[str]], Logits]:
    """What scores by a run folder; through stored features if it is a head on an encoder that is loaded here."""
    classifier = load_run(folder, placement)
    fingerprint, model = info.get("encoder_fingerprint"), classifier.model
    kept = next((one for one in _KEPT.values() if one.encoder.fingerprint == fingerprint), None)
    if kept is None or not isinstance(model, PooledScorer):
        return lambda texts: np.asarray(text_logits(classifier, texts, classifier.side_by_side)[0], np.float64)
    return FrozenScorer(kept, model.head.double(), tuple(model.features), classifier.max_length, classifier.long)
