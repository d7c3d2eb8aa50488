"""Texts to token ids: the tokenizer, lengths and the length advised, batches of like length. No torch, no model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from headstart.config import Long
from headstart.errors import ModelError
from headstart.progress import bar

CANDIDATE_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
MOST_CUT = 0.005  # the advised length cuts at most this share of the texts
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
CHUNK = 2_000  # texts tokenized at once
HEAD = 0.25  # of what is read of a long text by head-tail, the part at its beginning (Sun et al. 2019: 128 of 510)
STRIDE = 0.75  # of a window, after which the next one begins
Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Tokens:
    """The token ids of n texts, special ones included, ragged: text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int32]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> Ints:
        """(n,) tokens a text."""
        return np.diff(self.offsets)

    def take(self, index: Ints) -> "Tokens":
        """The texts at `index`, in that order."""
        return ragged([self[i] for i in index.tolist()])

    def padded(self, index: Ints, pad_id: int) -> tuple[Ints, Ints]:
        """The texts at `index` as (batch, longest) int64 ids, padded on the right, and their 0/1 mask."""
        lengths = self.offsets[index + 1] - self.offsets[index]
        mask = np.arange(int(lengths.max())) < lengths[:, None]
        ids = np.full(mask.shape, pad_id, dtype=np.int64)
        ids[mask] = np.concatenate([self[i] for i in index.tolist()])
        return ids, mask.astype(np.int64)


class Pieces(NamedTuple):
    """What is read of n texts: pieces of at most max_length tokens, each text's together, and (n,) how many it has."""

    tokens: Tokens
    counts: Ints

    def mean(self, values: Floats) -> Floats:
        """(n, k) means over each text's pieces of (pieces, k) values."""
        return mean_by_text(values, self.counts)


def mean_by_text(values: Floats, counts: Ints) -> Floats:
    """(n, k) means of (pieces, k) values over the pieces of each of n texts, which has so many."""
    if len(values) == len(counts):
        return values
    starts = np.cumsum([0, *counts[:-1]])
    return (np.add.reduceat(values, starts) / counts[:, None]).astype(values.dtype)


def ragged(pieces: Sequence[NDArray[np.int32]]) -> Tokens:
    """Texts of these token ids."""
    return Tokens(np.concatenate([np.empty(0, np.int32), *pieces]), np.cumsum([0, *map(len, pieces)], dtype=np.int64))


class Tokenizer:
    """A model's fast tokenizer; `pad_id` fills short texts. To know full lengths first, truncation is kept apart."""

    def __init__(self, fast: FastTokenizer, pad_id: int) -> None:
        fast.no_padding()
        fast.no_truncation()
        self.fast, self.pad_id = fast, pad_id
        probe = fast.encode("a")
        content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        masks = (fast.token_to_id(name) for name in ("[MASK]", "<mask>"))
        self.mask_id: int = next((one for one in masks if one is not None), pad_id)  # stands for any word
        self.before = content[0] if content else len(probe.ids) - 1  # special tokens before a text, and after it
        self.after = len(probe.ids) - 1 - (content[-1] if content else len(probe.ids) - 2)

    @classmethod
    def from_folder(cls, folder: Path, pad_id: int) -> "Tokenizer":
        """The tokenizer of a saved model; a `ModelError` if the folder has no readable tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder}: has no tokenizer.json.")
        try:
            return cls(FastTokenizer.from_file(str(path)), pad_id)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: is not a readable tokenizer ({error}).") from error

    def __call__(self, texts: Sequence[str], *, progress: str | None = None) -> Tokens:
        """All tokens of each text, special ones included, however long; `progress` labels a bar."""
        pieces: list[NDArray[np.int32]] = []
        with bar(progress, len(texts), "texts") as advance:
            for start in range(0, len(texts), CHUNK):
                encoded = self.fast.encode_batch_fast(list(texts[start : start + CHUNK]))
                pieces.extend(np.array(one.ids, dtype=np.int32) for one in encoded)
                advance(len(encoded), "")
        return ragged(pieces)

    def truncate(self, tokens: Tokens, max_length: int) -> Tokens:
        """Each text cut to `max_length` tokens, closing special tokens kept, as `tokenizers` truncates."""
        return self.pieces(tokens, max_length, "truncate").tokens

    def pieces(self, tokens: Tokens, max_length: int, long: Long) -> Pieces:
        """What is read of each text: all of it, or where it has more than `max_length` tokens, as `long` says."""
        counts = np.ones(len(tokens), dtype=np.int64)
        if not (tokens.lengths > max_length).any():
            return Pieces(tokens, counts)
        found: list[NDArray[np.int32]] = []
        for i in range(len(tokens)):
            places = self.places(len(ids := tokens[i]), max_length, long)
            found.extend(ids[one] for one in places)
            counts[i] = len(places)
        return Pieces(ragged(found), counts)

    def places(self, length: int, max_length: int, long: Long) -> list[Ints]:
        """Which tokens are read of a text of `length`: an array of their places for each piece, special ones too."""
        if length <= max_length:
            return [np.arange(length)]
        room, inner = max_length - self.before - self.after, length - self.before - self.after
        spans = [np.arange(room)]
        if long == "head-tail":
            head = round(HEAD * room)
            spans = [np.append(np.arange(head), np.arange(inner - room + head, inner))]
        elif long == "windows":
            step = max(1, int(STRIDE * room))
            spans = [np.arange(start, min(start + room, inner)) for start in range(0, inner - room + step, step)]
        ends = np.arange(self.before), np.arange(length - self.after, length)
        return [np.concatenate([ends[0], self.before + span, ends[1]]) for span in spans]


class Candidate(NamedTuple):
    """What one max_length does: shares of texts it cuts and of tokens lost, encoder FLOPs beside cutting nothing."""

    max_length: int
    cut: float
    lost: float
    cost: float


class LengthAdvice(NamedTuple):
    """Token lengths of n texts, special ones included, and the max_length they suggest, among others; and why."""

    lengths: Ints
    quantiles: dict[float, int]
    candidates: tuple[Candidate, ...]
    advised: int
    reason: str


def encoder_cost(lengths: Ints, hidden: int) -> float:
    """FLOPs of encoding texts: 24·d²·s in products, 4·d·s² in attention (Kaplan et al. 2020, table 1), over 24·d²."""
    return float((lengths + lengths.astype(np.float64) ** 2 / (6 * hidden)).sum())


def advise_length(lengths: Ints, *, limit: int, hidden: int = 768) -> LengthAdvice:
    """The shortest usual length that cuts at most 0.5% of texts of (n,) `lengths`, or `limit`, the model's own."""
    longest, whole = int(lengths.max()), encoder_cost(lengths, hidden)
    usual = [*(length for length in CANDIDATE_LENGTHS if length < limit), limit]
    candidates = tuple(
        Candidate(
            length,
            float((lengths > length).mean()),
            float((lengths - length).clip(0).sum() / lengths.sum()),
            encoder_cost(np.minimum(lengths, length), hidden) / whole,
        )
        for length in usual[: np.searchsorted(usual, longest) + 1]  # up to the first that cuts nothing
    )
    best = next((one for one in candidates if one.cut <= MOST_CUT), candidates[-1])
    if best.cut > MOST_CUT:
        reason = (
            f"the most this model takes; {best.cut:.1%} of the texts are longer, the longest has {longest:,} tokens"
        )
    elif best.cut > 0:
        reason = f"the shortest usual length that cuts at most {MOST_CUT:.1%} of the texts ({best.cut:.2%} are longer)"
    else:
        reason = f"no text is cut, the longest has {longest:,} tokens"
    quantiles = {level: int(np.quantile(lengths, level, method="higher")) for level in QUANTILES}
    return LengthAdvice(lengths, quantiles, candidates, best.max_length, reason)


def like_length_batches(lengths: Ints, *, most_tokens: int = 2048) -> Iterator[Ints]:
    """Indexes of texts of (n,) `lengths` in batches of like length, longest first, of `most_tokens` once padded."""
    left = np.argsort(-lengths, kind="stable").astype(np.int64)
    while len(left):
        size = max(1, most_tokens // max(1, int(lengths[left[0]])))
        if len(left) < size and len(lengths) > 256:  # sizes that come again, as kernels are compiled for each
            size = 1 << (len(left).bit_length() - 1)
        yield left[:size]
        left = left[size:]
