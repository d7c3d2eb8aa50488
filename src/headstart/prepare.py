"""All that precedes training: from settings to splits, the encoder, token ids and features. Nothing is learnt here."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headstart import data, tables
from headstart.config import TrainConfig
from headstart.data import Dataset, Indexes, Splits
from headstart.encoder import Encoder, choose_placement, length_limit, load_config, load_encoder, load_tokenizer, locate
from headstart.errors import DataError, InputError
from headstart.features import Features, frozen_features
from headstart.model import check_depth
from headstart.tokens import LengthAdvice, Tokens, advise_length

PARTS = ("train", "validation", "test")  # as `Splits` has them


@dataclass(frozen=True)
class Prepared:
    """The parts, their labels as the table has them, the encoder, all texts' token ids and features, and max_length.

    `index` is where the texts of each part are among all, `featured` their features, `seconds` what it took.
    """

    splits: Splits
    raw_labels: tuple[str, ...]
    encoder: Encoder
    tokens: Tokens
    features: Features
    index: tuple[Indexes, Indexes, Indexes]
    featured: tuple[Features, Features, Features]
    advice: LengthAdvice
    max_length: int
    max_length_reason: str
    seconds: dict[str, float]


def prepare(config: TrainConfig) -> Prepared:
    """Read, split, tokenise and encode; an `InputError` if the data, the model or a setting cannot be used."""
    seconds = dict.fromkeys(("read", "tokenize", "encode"), 0.0)
    with measured(seconds, "read"):
        splits, raw_labels = read(config)
    placement = choose_placement(config.device, config.precision)
    with measured(seconds, "encode"):
        encoder = load_encoder(config.model, placement)
    if config.thaw.isdecimal() and config.thaw != "0":
        check_depth(encoder, int(config.thaw))
    parts = splits[:3]
    with measured(seconds, "tokenize"):
        tokens = encoder.tokenizer([text for part in parts for text in part.texts], progress="tokenizing")
        advice = advise_length(tokens.lengths[: len(splits.train)], limit=encoder.max_length, hidden=encoder.hidden)
        max_length, why = choose_length(config, advice, encoder)
        cut = encoder.tokenizer.truncate(tokens, max_length)
    with measured(seconds, "encode"):
        features = frozen_features(encoder, cut)
    train, validation, test = np.split(np.arange(len(tokens)), np.cumsum([len(part) for part in parts])[:-1])
    featured = features.take(train), features.take(validation), features.take(test)
    index = train, validation, test
    return Prepared(splits, raw_labels, encoder, cut, features, index, featured, advice, max_length, why, seconds)


@contextlib.contextmanager
def measured(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's wall seconds to those of `part`."""
    begun = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - begun


def read(config: TrainConfig) -> tuple[Splits, tuple[str, ...]]:
    """The three parts, with the names to show, and the labels as the table has them; all problems are told at once."""
    problems: list[str] = []
    whole = data.load(config.data, config.text, config.label)
    shown = config.label_names or whole.names
    given: dict[str, Dataset | None] = {"validation": None, "test": None}
    for name in given:
        if source := getattr(config, name):
            try:
                table = data.load(source, config.text, config.label, known=[whole.names], least_rows=1)
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
    splits = data.split(replace(whole, names=shown), **given, seed=config.seed, duplicates=duplicates)
    return splits, whole.names


def choose_length(config: TrainConfig, advice: LengthAdvice, encoder: Encoder) -> tuple[int, str]:
    """The max_length to use and why; an `InputError` if the one asked for is over what the model takes."""
    if config.max_length is None:
        return advice.advised, advice.reason
    if config.max_length > encoder.max_length:
        most = f"{config.model} takes at most {encoder.max_length} tokens"
        raise InputError(f"--max-length {config.max_length}: {most}. The texts suggest {advice.advised}.")
    cut = float((advice.lengths > config.max_length).mean())
    source = "the article's" if config.recipe == "article" else "as asked"
    return config.max_length, f"{source}; {cut:.1%} of the training texts are cut (advised: {advice.advised})"


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
    return advise_length(tokens.lengths, limit=length_limit(shape), hidden=int(shape.hidden_size))


def default_name(source: str) -> str:
    """A run's name from the name of its data: `reviews.csv.gz` gives `reviews`."""
    return tables.ENDING.sub("", Path(source).name) or "run"
