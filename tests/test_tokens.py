"""Token ids as the tokenizers library gives them, the advised length, and batches of like length."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from headstart.errors import ModelError
from headstart.tokens import (
    CANDIDATE_LENGTHS,
    CHUNK,
    MOST_CUT,
    Tokenizer,
    advise_length,
    encoder_cost,
    like_length_batches,
    mean_by_text,
)
from tests.conftest import WORDS

FAMILIES = ("bert", "roberta", "albert", "mpnet", "deberta-v2", "modernbert")
TEXTS = [
    "the film was superb",
    "",
    "un",
    "not very good , but the soup is great . " * 8,
    "zebra 42 !?",
    "naïve 🎬 çava",
]
with_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_bert, pad_id=0)


def library(folder: Path) -> FastTokenizer:
    """The same tokenizer, straight from the library."""
    return FastTokenizer.from_file(str(folder / "tokenizer.json"))


# --- tokenizing


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_librarys(family: str, tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models(family)
    tokens = Tokenizer.from_folder(folder, pad_id=0)(TEXTS)
    reference = library(folder)
    assert len(tokens) == len(TEXTS)
    for i, text in enumerate(TEXTS):
        assert tokens[i].tolist() == reference.encode(text).ids
    assert tokens.lengths.tolist() == [len(reference.encode(text).ids) for text in TEXTS]
    assert tokens.ids.dtype == np.int32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [4, 5, 7, 17, 64])
def test_truncation_is_the_librarys(family: str, max_length: int, tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models(family)
    ours = Tokenizer.from_folder(folder, pad_id=0)
    reference = library(folder)
    reference.enable_truncation(max_length)
    cut = ours.truncate(ours(TEXTS), max_length)
    for i, text in enumerate(TEXTS):
        assert cut[i].tolist() == reference.encode(text).ids


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6), most=st.integers(4, 20)
)
@with_folder
def test_any_text_is_cut_as_the_library_cuts_it(tiny_bert: Path, texts: list[str], most: int) -> None:
    ours, reference = Tokenizer.from_folder(tiny_bert, pad_id=0), library(tiny_bert)
    reference.enable_truncation(most)
    cut = ours.truncate(ours(texts), most)
    assert [cut[i].tolist() for i in range(len(cut))] == [one.ids for one in reference.encode_batch(texts)]


def test_a_tokenizer_file_that_truncates_and_pads_still_gives_full_lengths(tiny_bert: Path, tmp_path: Path) -> None:
    reference = library(tiny_bert)
    plain = reference.encode(TEXTS[3]).ids
    reference.enable_truncation(6)
    reference.enable_padding(length=40)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokenizer.from_folder(tmp_path, pad_id=0)([TEXTS[3], "un"])
    assert tokens[0].tolist() == plain
    assert len(tokens[1]) == 3


def test_nothing_to_cut_is_left_as_it_is(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(TEXTS)
    assert tokenizer.truncate(tokens, int(tokens.lengths.max())) is tokens


def test_no_texts(tokenizer: Tokenizer) -> None:
    assert len(tokenizer([])) == 0
    assert tokenizer([]).ids.dtype == np.int32


def test_long_lists_go_in_chunks_and_come_out_the_same(tokenizer: Tokenizer) -> None:
    texts = [f"the film {i} was {'great' if i % 3 else 'rude and boring'}" for i in range(2 * CHUNK + 7)]
    whole, chunked = tokenizer(texts), tokenizer(texts, progress="tokenizing")
    assert np.array_equal(whole.ids, chunked.ids)
    assert np.array_equal(whole.offsets, chunked.offsets)


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_folder_without_a_readable_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    said = "has no tokenizer.json" if content is None else "is not a readable tokenizer"
    with pytest.raises(ModelError, match=said):
        Tokenizer.from_folder(tmp_path, pad_id=0)


# --- ragged arrays


def test_take_and_padded(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(TEXTS)
    index = np.array([4, 2, 0])
    part = tokens.take(index)
    assert [part[i].tolist() for i in range(3)] == [tokens[i].tolist() for i in index]
    ids, mask = tokens.padded(index, pad_id=77)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (3, int(tokens.lengths[index].max()))
    for row, i in enumerate(index):
        length = int(tokens.lengths[i])
        assert ids[row, :length].tolist() == tokens[i].tolist()
        assert (ids[row, length:] == 77).all()
        assert mask[row].tolist() == [1] * length + [0] * (ids.shape[1] - length)


@pytest.mark.parametrize(("family", "pad_id"), [("bert", 0), ("roberta", 1), ("mpnet", 1)])
def test_padding_is_the_librarys(family: str, pad_id: int, tiny_models: Callable[[str], Path]) -> None:
    reference = library(tiny_models(family))
    reference.enable_padding(pad_id=pad_id)
    expected = reference.encode_batch(TEXTS)
    tokens = Tokenizer.from_folder(tiny_models(family), pad_id)(TEXTS)
    ids, mask = tokens.padded(np.arange(len(TEXTS)), pad_id)
    assert ids.tolist() == [one.ids for one in expected]
    assert mask.tolist() == [one.attention_mask for one in expected]


# --- long texts


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
@with_folder
@given(words=st.integers(0, 60), max_length=st.integers(4, 40))
def test_what_is_read_of_a_long_text(
    family: str, words: int, max_length: int, tiny_models: Callable[[str], Path]
) -> None:
    tokenizer = Tokenizer.from_folder(tiny_models(family), 0)
    whole = tokenizer([" ".join(WORDS[i % len(WORDS)] for i in range(words)) or "a"])
    ids, inner = whole[0].tolist(), whole[0].tolist()[1:-1]
    for long in ("truncate", "head-tail", "windows"):
        tokens, counts = tokenizer.pieces(whole, max_length, long)
        read = [tokens[i].tolist() for i in range(len(tokens))]
        assert counts.tolist() == [len(read)]
        assert all(len(one) <= max_length and (one[0], one[-1]) == (ids[0], ids[-1]) for one in read)
        if len(ids) <= max_length:
            assert read == [ids]
        elif long == "windows":
            places = [one.tolist() for one in tokenizer.places(len(ids), max_length, "windows")]
            assert set().union(*places) == set(range(len(ids))), "every token is read"
            assert all(set(one[1:-1]) & set(other[1:-1]) for one, other in itertools.pairwise(places)) or max_length < 6
            assert len({len(one) for one in places[:-1]}) == 1
        else:
            (only,) = read
            assert len(only) == max_length
            head = max_length - 2 if long == "truncate" else round((max_length - 2) / 4)
            assert only[1 : 1 + head] == inner[:head]
            assert only[1 + head : -1] == inner[len(inner) - (max_length - 2 - head) :]


def test_a_text_gets_the_mean_of_its_pieces() -> None:
    values = np.array([[1.0, 0.0], [2.0, 4.0], [4.0, 0.0], [7.0, 7.0]], np.float32)
    got = mean_by_text(values, np.array([1, 2, 1]))
    assert got.tolist() == [[1, 0], [3, 2], [7, 7]]
    assert got.dtype == np.float32
    assert mean_by_text(values, np.ones(4, np.int64)) is values


# --- the advised length


def test_advice_is_the_shortest_usual_length_that_cuts_few() -> None:
    lengths = np.array([10] * 990 + [30] * 6 + [60] * 4)
    advice = advise_length(lengths, limit=512)
    assert advice.advised == 32
    assert "0.40% are longer" in advice.reason
    assert [one.max_length for one in advice.candidates] == [16, 24, 32, 48, 64]
    assert [one.cut for one in advice.candidates] == [0.01, 0.01, 0.004, 0.004, 0.0]


def test_advice_that_cuts_nothing_says_so() -> None:
    advice = advise_length(np.array([5, 9, 40]), limit=512)
    assert advice.advised == 48
    assert advice.reason == "no text is cut, the longest has 40 tokens"


def test_advice_keeps_to_the_models_limit() -> None:
    advice = advise_length(np.array([100] * 50 + [2000] * 50), limit=300)
    assert advice.advised == 300
    assert "the most this model takes; 50.0% of the texts are longer, the longest has 2,000 tokens" in advice.reason
    assert max(one.max_length for one in advice.candidates) == 300


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=80), limit=st.sampled_from([20, 64, 510, 512, 8192]))
def test_advice_holds_for_any_lengths(lengths: list[int], limit: int) -> None:
    found = np.array(lengths)
    advice = advise_length(found, limit=limit)
    shown = [one.max_length for one in advice.candidates]
    assert advice.advised in shown
    assert shown == sorted(set(shown))
    assert all(one in (*CANDIDATE_LENGTHS, limit) and one <= limit for one in shown)
    for one in advice.candidates:
        assert one.cut == pytest.approx((found > one.max_length).mean())
        assert one.cost == pytest.approx(
            encoder_cost(np.minimum(found, one.max_length), 768) / encoder_cost(found, 768)
        )
        assert 0 < one.cost <= 1
        if one.max_length < advice.advised:
            assert one.cut > MOST_CUT, "a shorter one would have done"
    best = next(one for one in advice.candidates if one.max_length == advice.advised)
    assert best.cut <= MOST_CUT or advice.advised == limit
    assert advice.quantiles[0.0] == found.min()
    assert advice.quantiles[1.0] == found.max()
    assert list(advice.quantiles.values()) == sorted(advice.quantiles.values())
    assert all(value in lengths for value in advice.quantiles.values())


def test_cost_counts_products_and_attention() -> None:
    # 24 d² s + 4 d s² FLOPs a layer and text, in units of 24 d².
    s, d = 100.0, 768
    assert encoder_cost(np.array([100]), d) == pytest.approx((24 * d**2 * s + 4 * d * s**2) / (24 * d**2))
    assert encoder_cost(np.array([100, 100]), d) == pytest.approx(2 * encoder_cost(np.array([100]), d))


# --- batches


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(0, 600), max_size=400), most_tokens=st.integers(1, 4096))
def test_batches_cover_each_text_once_and_keep_the_budget(lengths: list[int], most_tokens: int) -> None:
    found = np.array(lengths, dtype=np.int64)
    batches = list(like_length_batches(found, most_tokens=most_tokens))
    order = [i for batch in batches for i in batch.tolist()]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True), "the longest first"
    for batch in batches:
        assert len(batch) == 1 or len(batch) * found[batch].max() <= most_tokens


def test_the_last_batches_of_many_texts_are_of_sizes_that_come_again() -> None:
    sizes = [len(batch) for batch in like_length_batches(np.full(32 * 9 + 21, 64), most_tokens=2048)]
    assert sizes == [32] * 9 + [16, 4, 1]


def test_batches_are_as_large_as_the_budget_allows() -> None:
    sizes = [len(batch) for batch in like_length_batches(np.full(100, 64), most_tokens=2048)]
    assert sizes == [32, 32, 32, 4]


def test_sorting_saves_most_padding() -> None:
    rng = random.Random(1)
    lengths = np.array([rng.choice([8, 12, 40, 200]) for _ in range(2000)])
    batches = list(like_length_batches(lengths, most_tokens=2048))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert padded <= 1.02 * lengths.sum()
