"""All that precedes training: from settings to splits, the encoder, token ids and features. Nothing is learnt here."""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from headstart import data, tables
from headstart.config import TrainConfig
from headstart.data import Dataset, Indexes, Splits
from headstart.encoder import Encode, Encoder, choose_placement, encode, load_config, load_tokenizer, locate
from headstart.errors import DataError, InputError
from headstart.features import Features, frozen_features
from headstart.model import check_depth
from headstart.runs import position_limit
from headstart.targets import Targets
from headstart.tokens import LengthAdvice, Tokens, advise_length

PARTS = ("train", "validation", "test")  # as `Splits` has them
MUCH_LOST = 0.01  # of all tokens


@dataclass(frozen=True)
class Prepared:
    """The parts, their labels as the table has them, the encoder, token ids and features of all that is read of texts.

    That is a piece of each text, or several where it is long. `index` is where the pieces of each part are among all,
    `featured` their features, `targets` what its texts should be given; `seconds` is what it took.
    """

    splits: Splits
    raw_labels: tuple[str, ...]
    encoder: Encoder
    tokens: Tokens
    features: Features
    index: tuple[Indexes, Indexes, Indexes]
    featured: tuple[Features, Features, Features]
    targets: tuple[Targets, Targets, Targets]
    advice: LengthAdvice
    max_length: int
    max_length_reason: str
    seconds: dict[str, float]


def prepare(config: TrainConfig, compute: Encode = encode) -> Prepared:
    """Read, split, tokenise and encode by `compute`; an `InputError` if data, model or a setting cannot be used."""
    seconds = {"read": 0.0}
    with measured(seconds, "read"):
        splits, raw_labels = read(config)
    found = ready(splits, raw_labels, config, featurize=functools.partial(frozen_features, compute=compute))
    return replace(found, seconds=seconds | found.seconds)


def ready(
    splits: Splits,
    raw_labels: tuple[str, ...],
    config: TrainConfig,
    encoder: Encoder | None = None,
    featurize: Callable[[Encoder, Tokens], Features] = frozen_features,
) -> Prepared:
    """All of `prepare` that comes after reading, by an encoder that may be there; the test part may be empty."""
    seconds = dict.fromkeys(("tokenize", "encode"), 0.0)
    if splits.train.problem == "multi" and config.recipe == "article":
        raise InputError("--recipe article is for one label a text; leave it out.")
    with measured(seconds, "encode"):
        encoder = encoder or Encoder(config.model, choose_placement(config.device, config.precision))
    if config.thaw.isdecimal() and config.thaw != "0":
        check_depth(encoder, int(config.thaw))
    parts = splits[:3]
    with measured(seconds, "tokenize"):
        whole = encoder.tokenizer([text for part in parts for text in part.texts], progress="tokenizing")
        advice = advise_length(whole.lengths[: len(splits.train)], limit=encoder.max_length, hidden=encoder.hidden)
        max_length, why = choose_length(config, advice, encoder)
        read = encoder.tokenizer.pieces(whole, max_length, config.long)
    with measured(seconds, "encode"):
        features = featurize(encoder, read.tokens)
    counts = np.split(read.counts, np.cumsum([len(part) for part in parts])[:-1])
    index = np.split(np.arange(len(read.tokens)), np.cumsum([some.sum() for some in counts])[:-1])
    several = len(read.tokens) > len(read.counts)
    targets = (
        Targets(part.labels, part.weights, some if several else None) for part, some in zip(parts, counts, strict=True)
    )
    featured, parted = tuple(features.take(some) for some in index), (tuple(index), tuple(targets))
    found: Any = (encoder, read.tokens, features, parted[0], featured, parted[1], advice, max_length, why, seconds)
    return Prepared(splits, raw_labels, *found)


@contextlib.contextmanager
def measured(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's wall seconds to those of `part`."""
    begun = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - begun


def read(config: TrainConfig) -> tuple[Splits, tuple[str, ...]]:
    """The three parts, with the names to show, and the labels as the table has them; all problems are told at once."""
    problems: list[str] = []
    whole = data.load(config.data, config.text, config.label, problem=config.problem)
    shown = config.label_names or whole.names
    given: dict[str, Dataset | None] = {"validation": None, "test": None}
    for name in given:
        if source := getattr(config, name):
            try:
                same: dict[str, Any] = {"problem": whole.problem, "known": [whole.names], "least_rows": 1}
                table = data.load(source, config.text, config.label, **same)
                given[name] = replace(table, names=shown)
            except DataError as error:
                problems.extend(error.problems)
    if len(shown) != len(whole.names):
        labels = f"{len(whole.names)} labels: {', '.join(whole.names[:12])}"
        problems.append(f"--label-names gives {len(shown)} names, and there are {labels}.")
    elif len(set(shown)) != len(shown):
        problems.append("--label-names gives the same name twice.")
    if problems:
        raise DataError(problems)
    duplicates: data.Duplicates = "as they fall" if config.recipe == "article" else "together"
    splits = data.split(replace(whole, names=shown), *given.values(), seed=config.seed, duplicates=duplicates)
    return splits, whole.names


def choose_length(config: TrainConfig, advice: LengthAdvice, encoder: Encoder) -> tuple[int, str]:
    """The max_length to use and why; an `InputError` if the one asked for is over what the model takes."""
    length, why = config.max_length or advice.advised, advice.reason
    if length > encoder.max_length:
        most = f"{config.model} takes at most {encoder.max_length} tokens"
        raise InputError(f"--max-length {length}: {most}. The texts suggest {advice.advised}.")
    longer, lost = (advice.lengths > length).mean(), (advice.lengths - length).clip(0).sum() / advice.lengths.sum()
    if config.max_length is not None:
        source = "the article's" if config.recipe == "article" else "as asked"
        why = f"{source}; {longer:.1%} of the training texts are longer (advised: {advice.advised})"
    if not longer:
        return length, why
    read = {
        "truncate": f"{lost:.2%} of all tokens are cut off" + (", see --long" if lost >= MUCH_LOST else ""),
        "head-tail": f"of those the beginning and the end are read, and {lost:.2%} of all tokens are not",
        "windows": "those are read in windows",
    }
    return length, f"{why}; {read[config.long]}"


def data_fingerprint(splits: Splits) -> dict[str, str]:
    """A sha256 of each part's texts and labels, in order."""
    parts = {name: [part.texts, part.labels.tolist()] for name, part in zip(PARTS, splits[:3], strict=True)}
    contents = {name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}
    return {name: hashlib.sha256(one.encode("utf-8", "surrogatepass")).hexdigest() for name, one in contents.items()}


def lengths(source: str, model: str, text: str | None = None) -> LengthAdvice:
    """Token lengths of a table's texts and the max_length they suggest; a `DataError` or `ModelError` if not found."""
    texts = data.load_texts(source, text)
    folder = locate(model)
    shape = load_config(folder)
    tokens = load_tokenizer(folder)[1](texts, progress="tokenizing")
    return advise_length(tokens.lengths, limit=position_limit(shape.to_dict()), hidden=int(shape.hidden_size))


def default_name(source: str) -> str:
    """A run's name from the name of its data: `reviews.csv.gz` gives `reviews`."""
    return tables.ENDING.sub("", Path(source).name) or "run"
