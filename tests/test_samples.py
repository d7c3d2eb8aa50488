"""The sample set shipped with headstart: sentences that differ, of both labels, with no easy way to tell them apart."""

import collections
import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import headstart

FILE = Path(headstart.__file__).parent / "samples" / "reviews.csv"


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    with open(FILE, encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file, strict=True)
    assert header == ["sentence", "label"]
    return [(sentence, label) for sentence, label in found]


def words(sentence: str) -> list[str]:
    """The words alone, without capitals and punctuation."""
    return re.findall(r"[\w']+", sentence.casefold())


def trigrams(sentence: str) -> set[tuple[str, ...]]:
    found = words(sentence)
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}


def most_alike(sentences: list[str]) -> tuple[float, list[str]]:
    """The largest share of its word 3-grams that a sentence has in common with another, and the two."""
    grams = [trigrams(sentence) for sentence in sentences]
    where = collections.defaultdict(list)
    for i, found in enumerate(grams):
        for gram in found:
            where[gram].append(i)
    common = collections.Counter(pair for places in where.values() for pair in itertools.combinations(places, 2))
    shares = {pair: count / min(len(grams[i]) for i in pair) for pair, count in common.items()}
    best = max(shares, key=lambda pair: shares[pair])
    return shares[best], [sentences[i] for i in best]


def test_there_are_enough_sentences_and_all_differ(rows: list[tuple[str, str]]) -> None:
    assert len(rows) >= 600
    assert len({" ".join(words(sentence)) for sentence, _ in rows}) == len(rows), "also without punctuation"


def test_both_labels_are_there_and_neither_rules(rows: list[tuple[str, str]]) -> None:
    counts = collections.Counter(label for _, label in rows)
    assert set(counts) == {"negative", "positive"}
    assert 0.5 <= max(counts.values()) / len(rows) <= 0.6


def test_sentences_are_of_a_sentences_length(rows: list[tuple[str, str]]) -> None:
    counts = [len(sentence.split()) for sentence, _ in rows]
    assert min(counts) >= 3
    assert max(counts) <= 45
    assert max(counts) - min(counts) > 20, "and not all alike"


def test_sentences_are_clean(rows: list[tuple[str, str]]) -> None:
    content = FILE.read_bytes()
    assert not content.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in content
    assert content.endswith(b"\n")
    for sentence, _ in rows:
        assert sentence == " ".join(sentence.split()), "no stray spaces"
        assert sentence.isprintable(), sentence
        assert sentence[-1] not in ",;:", sentence


def test_the_measure_of_likeness_sees_a_template() -> None:
    made = [f"the {noun} in this place was really quite superb" for noun in ("room", "soup")]
    assert most_alike([*made, "no word of that here"])[0] == pytest.approx(5 / 7)


def test_no_two_sentences_are_made_from_one_template(rows: list[tuple[str, str]]) -> None:
    share, pair = most_alike([sentence for sentence, _ in rows])
    assert share <= 0.7, pair


def test_sentences_begin_in_many_ways(rows: list[tuple[str, str]]) -> None:
    starts = collections.Counter(tuple(words(sentence)[:3]) for sentence, _ in rows)
    ((start, count),) = starts.most_common(1)
    assert count <= 5, start


def test_the_form_of_a_sentence_does_not_tell_its_label(rows: list[tuple[str, str]]) -> None:
    """Length and punctuation alone do little better than the commonest label, so that a good score means reading."""
    signs = ".,!?'\";-"
    form = np.array([[len(text), len(words(text)), *map(text.count, signs), not text.isascii()] for text, _ in rows])
    labels = np.array([label == "positive" for _, label in rows])
    scores = cross_val_score(make_pipeline(StandardScaler(), LogisticRegression()), form, labels, cv=5)
    assert scores.mean() < max(labels.mean(), 1 - labels.mean()) + 0.1
