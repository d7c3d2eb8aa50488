"""The store of features: right answers whatever happens to it, to the process, or beside it."""

import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headstart import features
from headstart.config import CACHE_MAX_BYTES, FEATURE_BYTES_PER_TEXT
from headstart.encoder import Encoder, choose_placement, stored_layout
from headstart.errors import DiskError, InputError
from headstart.features import Features, Shelf, cache_info, clear_cache, frozen_features, text_keys
from tests.conftest import FAMILIES

CPU = choose_placement("cpu", "fp32")
TEXTS = tuple(f"the {noun} was {word} {i}" for i in range(4) for noun in ("film", "soup") for word in ("great", "rude"))

processes = multiprocessing.get_context("forkserver")  # children that inherit no threads, and no second import of torch
processes.set_forkserver_preload(["headstart.features"])


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return Encoder(str(tiny_bert), CPU)


def features_of(encoder: Encoder, texts: Sequence[str], max_length: int = 64) -> Features:
    return frozen_features(encoder, encoder.tokenizer.truncate(encoder.tokenizer(texts), max_length))


def values_of(features: Features) -> NDArray[np.float16]:
    """(n, vectors, hidden)."""
    return features.distinct[features.rows]


@contextmanager
def store_in(folder: Path) -> Iterator[Path]:
    """Another, or an empty, store for the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE_DIR", str(folder))
        yield folder


def fresh(encoder: Encoder, texts: Sequence[str], folder: Path) -> NDArray[np.float16]:
    """What the encoder makes of texts without any store before it."""
    with store_in(folder):
        found = features_of(encoder, texts)
    assert found.reused == 0
    return values_of(found)


def assert_same(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal to 1e-5, give or take the rounding to half precision (which batches a text shares may tip it)."""
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=2**-10, atol=1e-5)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# --- stored answers are the encoder's


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_for_each_family(family: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = Encoder(str(tiny_models(family)), CPU)
    first = features_of(encoder, TEXTS)
    # An impostor of the same fingerprint, whose own answers are others: what it gives must come from the store.
    shutil.copytree(tiny_models(family), tmp_path / "m")
    with_other_weights(tmp_path / "m")
    impostor = Encoder(str(tmp_path / "m"), CPU)
    assert np.abs(fresh(impostor, TEXTS, tmp_path / "other").astype(float) - values_of(first)).max() > 0.01
    impostor.fingerprint = encoder.fingerprint
    second = features_of(impostor, TEXTS[::-1])
    np.testing.assert_array_equal(values_of(second)[::-1], values_of(first))
    assert (first.encoded, first.reused, len(first.distinct)) == (len(TEXTS), 0, len(TEXTS))
    assert (second.encoded, second.reused, len(second.distinct)) == (0, len(TEXTS), len(TEXTS))
    assert not second.warnings
    assert np.abs(values_of(first)).max() > 0


def test_the_same_encoder_loaded_again_finds_what_was_stored(encoder: Encoder, tiny_bert: Path) -> None:
    stored = features_of(encoder, TEXTS)
    again = features_of(Encoder(str(tiny_bert), CPU), TEXTS)
    assert again.encoded == 0
    np.testing.assert_array_equal(values_of(again), values_of(stored))


words = st.sampled_from(("the", "film", "was", "superb", "rude", "not", "zebra", "quiz", "!", "9"))
some_texts = st.lists(st.lists(words, min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(calls=st.lists(some_texts, min_size=1, max_size=4), max_length=st.sampled_from((5, 8, 64)))
def test_any_calls_in_any_order_give_the_encoders_answers(
    calls: list[list[str]], max_length: int, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seen: set[bytes] = set()
    with store_in(tmp_path_factory.mktemp("store")):
        for texts in calls:
            tokens = encoder.tokenizer.truncate(encoder.tokenizer(texts), max_length)
            distinct = {tokens[i].tobytes() for i in range(len(texts))}
            got = frozen_features(encoder, tokens)
            assert len(got.distinct) == len(distinct)
            assert got.encoded == len(distinct - seen)
            assert got.reused == len(distinct & seen)
            assert values_of(got).shape == (len(texts), 5, 32)
            assert got.distinct.nbytes == len(distinct) * 5 * 32 * 2
            assert not got.warnings
            seen |= distinct
            with store_in(tmp_path_factory.mktemp("empty")):
                assert_same(values_of(got), values_of(frozen_features(encoder, tokens)))
        assert cache_info().texts == len(seen)


def test_a_text_that_occurs_often_is_stored_once(encoder: Encoder) -> None:
    got = features_of(encoder, ["the film was superb", "the soup was rude"] * 50)
    assert (len(got.distinct), got.encoded, cache_info().texts) == (2, 2, 2)
    assert (values_of(got)[::2] == values_of(got)[0]).all()
    assert (values_of(got)[1::2] == values_of(got)[1]).all()
    assert not (values_of(got)[0] == values_of(got)[1]).all()


# --- the key holds what changes the answer, and no more


def with_other_weights(folder: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 0.5
    model.save_pretrained(folder)


def with_other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["film"], vocabulary["soup"] = vocabulary["soup"], vocabulary["film"]
    path.write_text(json.dumps(content))


def with_other_activation(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "hidden_act": "relu"}))


@pytest.mark.parametrize("change", [with_other_weights, with_other_tokenizer, with_other_activation])
@pytest.mark.parametrize("place", ["elsewhere", "in place"])
def test_a_changed_encoder_is_another(
    change: Callable[[Path], None], place: str, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    before = features_of(Encoder(str(folder), CPU), ["the film was superb"])
    if place == "elsewhere":
        folder = folder.rename(tmp_path / "moved")
    same = features_of(Encoder(str(folder), CPU), ["the film was superb"])
    assert same.encoded == 0, "where a model lies does not matter"
    change(folder)
    after = features_of(Encoder(str(folder), CPU), ["the film was superb"])
    assert after.encoded == 1
    assert np.abs(values_of(after).astype(float) - values_of(before).astype(float)).max() > 1e-2


def test_another_precision_is_another(tiny_bert: Path) -> None:
    exact = features_of(Encoder(str(tiny_bert), CPU), TEXTS)
    coarse = features_of(Encoder(str(tiny_bert), choose_placement("cpu", "bf16")), TEXTS)
    assert coarse.encoded == len(TEXTS)
    assert (values_of(coarse) != values_of(exact)).any()
    assert features_of(Encoder(str(tiny_bert), CPU), TEXTS).encoded == 0


def test_another_layout_is_another_shelf(encoder: Encoder) -> None:
    layouts = [("cls",), ("mean-1",), ("cls", "mean-1"), ("mean-1", "cls"), stored_layout(encoder)]
    assert len({Shelf(encoder, layout).folder for layout in layouts}) == len(layouts)


def test_max_length_matters_only_where_it_cuts(encoder: Encoder) -> None:
    short, long = [f"the film was superb {i}" for i in range(6)], [f"the soup was great {i} " * 4 for i in range(3)]
    assert features_of(encoder, [*short, *long], 64).encoded == 9
    at_12 = features_of(encoder, [*short, *long], 12)
    assert (at_12.encoded, at_12.reused) == (3, 6)
    assert features_of(encoder, [*short, *long], 12).encoded == 0
    assert features_of(encoder, [*short, *long], 64).encoded == 0
    assert features_of(encoder, [*short, *long], 48).encoded == 0, "48 cuts none"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=some_texts)
def test_keys_tell_texts_apart(texts: list[str], encoder: Encoder) -> None:
    tokens = encoder.tokenizer(texts)
    keys = text_keys(tokens).tolist()
    for i in range(len(texts)):
        for j in range(i):
            assert (keys[i] == keys[j]) == (tokens[i].tolist() == tokens[j].tolist())


# --- damage


def header_of(segment: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", segment[:8])
    return {"data": 8 + size, **json.loads(segment[8 : 8 + size])}


@pytest.fixture(scope="module")
def pristine(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float16]]:
    """A store of TEXTS in one segment, and what it holds. Copy it before damaging it."""
    folder = tmp_path_factory.mktemp("pristine")
    return folder, fresh(encoder, TEXTS, folder)


def after_damage(
    encoder: Encoder, pristine: Path, folder: Path, damage: Callable[[bytes], bytes | None]
) -> tuple[Features, Features]:
    """The features of TEXTS from a damaged copy of the store, and once more."""
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    (segment,) = segments(folder)
    damaged = damage(segment.read_bytes())
    segment.unlink()
    if damaged is None:
        segment.mkdir()
    else:
        segment.write_bytes(damaged)
    with store_in(folder):
        return features_of(encoder, TEXTS), features_of(encoder, TEXTS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_torn_segment_is_never_read(
    share: float, encoder: Encoder, pristine: tuple[Path, NDArray[np.float16]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, expected = pristine
    got, again = after_damage(
        encoder, store, tmp_path_factory.mktemp("torn"), lambda whole: whole[: int(share * len(whole))]
    )
    assert_same(values_of(got), expected)
    assert got.encoded == len(TEXTS)
    assert len(got.warnings) == 1
    assert "cannot be read" in got.warnings[0]
    assert "encoded again" in got.warnings[0]
    assert (again.encoded, again.warnings) == (0, ())
    np.testing.assert_array_equal(values_of(again), values_of(got))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), part=st.sampled_from(("header", "data")))
def test_a_flipped_bit_is_never_believed(
    place: float,
    bit: int,
    part: str,
    encoder: Encoder,
    pristine: tuple[Path, NDArray[np.float16]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store, expected = pristine
    (segment,) = segments(store)
    whole = segment.read_bytes()
    header = header_of(whole)
    low, high = (0, header["data"]) if part == "header" else (header["data"], len(whole))
    offset = low + int(place * (high - low))

    def flip(content: bytes) -> bytes:
        return content[:offset] + bytes([content[offset] ^ 1 << bit]) + content[offset + 1 :]

    got, again = after_damage(encoder, store, tmp_path_factory.mktemp("flipped"), flip)
    assert_same(values_of(got), expected)
    assert got.encoded == len(TEXTS)
    if part == "data":
        assert "its checksum is another" in got.warnings[0]
    assert (again.encoded, again.warnings) == (0, ())
    np.testing.assert_array_equal(values_of(again), values_of(got))


@pytest.mark.parametrize("what", [b"", b"\0" * 4000, b'{"keys": 1}', None])
def test_something_else_in_a_segments_place(
    what: bytes | None, encoder: Encoder, pristine: tuple[Path, NDArray[np.float16]], tmp_path: Path
) -> None:
    got, again = after_damage(encoder, pristine[0], tmp_path, lambda whole: what)
    assert_same(values_of(got), pristine[1])
    assert_same(values_of(again), pristine[1])
    assert (got.encoded, len(got.warnings), again.encoded) == (len(TEXTS), 1, 0)


# --- killed, and not alone


def many_texts(count: int = 240) -> list[str]:
    return [f"the film was {'not ' * (i % 5)}great {i}" for i in range(count)]


def fill_slowly(cache: str, model: str, progress: Connection) -> None:
    """In a child: store 240 texts, eight at a time, and tell after each eight."""
    os.environ["HEADSTART_CACHE_DIR"] = cache
    encoder = Encoder(model, CPU)
    texts = many_texts()
    for start in range(0, len(texts), 8):
        features_of(encoder, texts[start : start + 8])
        progress.send(start + 8)
    progress.close()


def test_a_killed_process_leaves_a_sound_store(
    encoder: Encoder, tiny_bert: Path, cache_dir: Path, tmp_path: Path
) -> None:
    chance = random.Random(2021)
    expected = fresh(encoder, many_texts(), tmp_path)
    killed_midway = 0
    for _ in range(6):
        clear_cache()
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=fill_slowly, args=(str(cache_dir), str(tiny_bert), theirs))
        child.start()
        theirs.close()
        done = 0
        for _ in range(chance.randint(1, 12)):
            done = ours.recv()
        for _ in range(chance.randrange(300_000)):  # a moment that no step of the child's work picks
            pass
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)
        killed_midway += child.exitcode != 0
        got = features_of(encoder, many_texts())
        assert got.reused >= done, "what it said was stored is stored"
        assert got.reused % 8 == 0, "a call's texts are stored all or not at all"
        assert got.warnings == ()
        assert_same(values_of(got), expected)
        assert features_of(encoder, many_texts()).encoded == 0
        if got.encoded:
            assert not list(cache_dir.rglob("*.tmp")), "the next writer clears what the killed one left"
    assert killed_midway >= 4


def fill_at_once(cache: str, cap: int, model: str, order: list[int], start: Any, result: str) -> None:
    """In a child: once all are ready, store texts in an order of its own and save what it got."""
    os.environ |= {"HEADSTART_CACHE_DIR": cache, "HEADSTART_CACHE_MAX_BYTES": str(cap)}
    encoder = Encoder(model, CPU)
    texts = many_texts(120)
    start.wait()
    parts = []
    for at in range(0, len(order), 10):
        part = features_of(encoder, [texts[i] for i in order[at : at + 10]])
        assert part.warnings == ()
        parts.append(values_of(part))
    values = np.empty((120, *parts[0].shape[1:]), dtype=np.float16)
    values[order] = np.concatenate(parts)
    np.save(result, values)


def clear_again_and_again(cache: str, start: Any, stop: Any) -> None:
    """In a child: empty the store until told to stop."""
    os.environ["HEADSTART_CACHE_DIR"] = cache
    start.wait()
    while not stop.is_set():
        clear_cache()
        cache_info()


@pytest.mark.parametrize("disturbance", ["none", "evicting", "clearing"])
def test_processes_share_a_store(
    disturbance: str, encoder: Encoder, tiny_bert: Path, cache_dir: Path, tmp_path: Path
) -> None:
    expected = fresh(encoder, many_texts(120), tmp_path / "alone")
    cap = 12_000 if disturbance == "evicting" else CACHE_MAX_BYTES  # 12 kB hold about three calls' texts
    start, stop = processes.Barrier(3), processes.Event()
    children = []
    for number in range(2):
        order = list(range(120))
        random.Random(number).shuffle(order)
        arguments = (str(cache_dir), cap, str(tiny_bert), order, start, str(tmp_path / f"{number}.npy"))
        children.append(processes.Process(target=fill_at_once, args=arguments))
    clearing = processes.Process(target=clear_again_and_again, args=(str(cache_dir), start, stop))
    for child in children:
        child.start()
    if disturbance == "clearing":
        clearing.start()
    else:
        start.wait()
    for child in children:
        child.join()
    if disturbance == "clearing":
        stop.set()
        clearing.join()
        assert clearing.exitcode == 0
    assert [child.exitcode for child in children] == [0, 0]
    for number in range(2):
        assert_same(np.load(tmp_path / f"{number}.npy"), expected)
    assert cache_info().bytes <= cap
    after = features_of(encoder, many_texts(120))
    assert after.warnings == ()
    assert_same(values_of(after), expected)
    if disturbance == "none":
        assert after.encoded == 0


# --- size


def test_the_longest_unused_goes_first(encoder: Encoder, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {name: [f"the {name} was {i}" for i in range(10)] for name in ("film", "soup", "room", "app")}
    sizes = {}
    for age, name in ((300, "film"), (200, "soup"), (100, "room")):
        before = set(segments(cache_dir))
        features_of(encoder, groups[name])
        (segment,) = set(segments(cache_dir)) - before
        sizes[name] = segment.stat().st_size
        then = segment.stat().st_mtime - age
        os.utime(segment, (then, then))
    assert features_of(encoder, groups["film"]).encoded == 0  # the oldest, but just used
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", str(3 * max(sizes.values()) + 10))
    features_of(encoder, groups["app"])
    assert cache_info().bytes <= 3 * max(sizes.values()) + 10
    encoded = {name: features_of(encoder, groups[name]).encoded for name in ("film", "room", "app", "soup")}
    assert encoded == {"film": 0, "room": 0, "app": 0, "soup": 10}


def test_what_is_over_the_cap_by_itself_costs_nothing_else(
    encoder: Encoder, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features_of(encoder, TEXTS)
    states = cache_dir / "features" / "states-abc-2"
    states.mkdir()
    cap = cache_info().bytes + 5000
    (states / "whole.npy").write_bytes(bytes(cap + 1))
    for name in ("torn", "growing"):
        (states / f".{name}.npy.1234.tmp").write_bytes(bytes(10))
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", str(cap))
    with FileLock(states / "growing.lock"):
        features.evict(cache_dir / "features")
    assert {path.name for path in states.iterdir() if path.suffix != ".lock"} == {".growing.npy.1234.tmp"}
    assert features_of(encoder, TEXTS).encoded == 0


def test_the_cap_holds_over_all_encoders(
    encoder: Encoder, tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Encoder(str(tiny_models("electra")), CPU)
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", "9000")
    for i in range(6):
        for one in (encoder, other):
            texts = [f"the film was {i} {j}" for j in range(8)]
            assert_same(values_of(features_of(one, texts)), values_of(features_of(one, texts)))
            assert 0 < cache_info().bytes <= 9000


def test_a_cap_below_one_segment_keeps_nothing_and_still_answers(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = fresh(encoder, TEXTS, tmp_path)
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", "0")
    for _ in range(2):
        got = features_of(encoder, TEXTS)
        assert got.encoded == len(TEXTS)
        assert_same(values_of(got), expected)
    assert cache_info().texts == 0


@pytest.mark.parametrize("cap", ["lots", "-1", "5GB", "1e9", ""])
def test_a_cap_that_is_no_number_is_refused(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", cap)
    with pytest.raises(InputError, match=f"HEADSTART_CACHE_MAX_BYTES must be a number of bytes, and '{cap}' was given"):
        cache_info()


def test_a_bert_base_takes_at_most_8_kb_a_text(encoder: Encoder) -> None:
    base = copy.copy(encoder)
    base.layers, base.hidden = 12, 768  # the shape alone: no weights are made
    layout = stored_layout(base)
    shelf = Shelf(base, layout)
    keys = text_keys(encoder.tokenizer(many_texts(100)))
    values = np.random.default_rng(0).normal(size=(100, len(layout), 768)).astype(np.float16)
    shelf.append(keys, values)
    assert cache_info().texts == 100
    assert FEATURE_BYTES_PER_TEXT == 8_000
    assert cache_info().bytes / 100 <= FEATURE_BYTES_PER_TEXT
    found = np.zeros_like(values)
    assert shelf.lookup(keys, found).all()
    np.testing.assert_array_equal(found, values)


# --- what `headstart cache` shows and does


def test_info_counts_what_is_there(
    encoder: Encoder, tiny_models: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = cache_info()
    assert (empty.texts, empty.shelves, empty.bytes, empty.max_bytes) == (0, 0, 0, CACHE_MAX_BYTES)
    features_of(encoder, TEXTS)
    features_of(encoder, ["one more"])
    features_of(Encoder(str(tiny_models("albert")), CPU), TEXTS[:5])
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", "123456")
    info = cache_info()
    assert (info.texts, info.shelves, info.max_bytes) == (len(TEXTS) + 6, 2, 123_456)
    assert info.bytes == sum(path.stat().st_size for path in segments(cache_dir)) > 0
    assert cache_dir in info.folder.parents


def test_clear_frees_everything_and_says_how_much(encoder: Encoder, cache_dir: Path) -> None:
    assert clear_cache() == 0  # nothing there yet
    features_of(encoder, TEXTS)
    beside = cache_dir / "not-ours.txt"
    beside.write_text("x")
    size = cache_info().bytes
    assert clear_cache() == size > 0
    assert cache_info().texts == 0
    assert not segments(cache_dir)
    assert beside.exists()
    assert clear_cache() == 0
    assert features_of(encoder, TEXTS).encoded == len(TEXTS)


def test_the_folder_is_the_persons_unless_moved(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    import platformdirs

    assert features.cache_folder() == cache_dir
    monkeypatch.delenv("HEADSTART_CACHE_DIR")
    assert features.cache_folder() == Path(platformdirs.user_cache_dir("headstart"))


# --- a disk that refuses


def test_a_file_where_the_store_should_be(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with store_in(tmp_path / "file"), pytest.raises(DiskError, match="cannot be written"):
        features_of(encoder, TEXTS)


def fill_a_full_disk(cache: str, model: str, answer: Connection) -> None:
    """In a child that may write 2,000 bytes a file: what the store says, and what it answers with room again."""
    os.environ["HEADSTART_CACHE_DIR"] = cache
    encoder = Encoder(model, CPU)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, most))
    try:
        features_of(encoder, TEXTS)
        answer.send("no error")
    except DiskError as error:
        answer.send(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    answer.send(features_of(encoder, TEXTS).encoded)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(tiny_bert: Path, cache_dir: Path) -> None:
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=fill_a_full_disk, args=(str(cache_dir), str(tiny_bert), theirs))
    child.start()
    theirs.close()
    message, encoded = ours.recv(), ours.recv()
    child.join()
    assert "the disk is full" in message
    assert encoded == len(TEXTS)
    assert cache_info().texts == len(TEXTS)
    assert not list(cache_dir.rglob("*.tmp"))


def test_what_would_fill_memory_is_mapped_from_disk(
    encoder: Encoder, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = features_of(encoder, TEXTS)
    assert not isinstance(plain.distinct, np.memmap)
    monkeypatch.setattr("headstart.features.IN_MEMORY_SHARE", 0.0)
    mapped = features_of(encoder, TEXTS)
    assert isinstance(mapped.distinct, np.memmap)
    np.testing.assert_array_equal(values_of(mapped), values_of(plain))
    np.testing.assert_array_equal(mapped.columns(("mean-1", "cls")), values_of(plain)[:, [2, 0]].astype(np.float32))
    assert {path.suffix for path in cache_dir.rglob("*") if path.is_file()} <= {".safetensors", ""}, "it has no name"


def test_part_of_the_features_is_those_texts(encoder: Encoder) -> None:
    whole = features_of(encoder, [*TEXTS, TEXTS[0]])
    part = whole.take(np.array([len(TEXTS), 1]))
    np.testing.assert_array_equal(values_of(part), values_of(whole)[[0, 1]])
    assert len(part) == 2
    assert part.cost() == whole.cost()


@pytest.mark.parametrize("kind", ["a folder", "elsewhere"])
def test_machines_share_what_one_has_encoded(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = str(tmp_path / "shared") if kind == "a folder" else f"memory://{tmp_path.name}"
    monkeypatch.setenv("HEADSTART_SHARED_STORE", url)
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(tmp_path / "one"))
    first = features_of(encoder, TEXTS[:6])
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(tmp_path / "other"))
    both = features_of(encoder, TEXTS[:9])
    assert (both.reused, both.encoded) == (6, 3)
    np.testing.assert_array_equal(values_of(both)[:6], values_of(first))
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(tmp_path / "one"))
    assert features_of(encoder, TEXTS[:9]).encoded == 0
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(tmp_path / "small"))
    monkeypatch.setenv("HEADSTART_CACHE_MAX_BYTES", "1")
    Shelf(encoder, stored_layout(encoder)).exchange()
    assert cache_info().bytes == 0, "what is fetched counts, too"


def test_a_shared_store_in_disorder_is_a_warning(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_SHARED_STORE", str(tmp_path / "shared"))
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(tmp_path / "one"))
    features_of(encoder, TEXTS[:3])
    (shelf,) = (tmp_path / "shared").iterdir()
    (shelf / "notes").mkdir()
    (shelf / "notes.txt").write_text("mine")
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(tmp_path / "other"))
    found = features_of(encoder, TEXTS[:3])
    assert (found.reused, found.warnings) == (3, ())
    assert not list((tmp_path / "other").rglob("notes*"))
    shutil.rmtree(tmp_path / "shared")
    (tmp_path / "shared").write_text("a file")
    found = features_of(encoder, TEXTS[:6])
    assert found.encoded == 3
    assert {warning.split(":")[0] for warning in found.warnings} == {"HEADSTART_SHARED_STORE"}
