"""The queue alone: every answer is the asker's, places are counted, the cancelled are dropped, poison fails alone."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serve import queue
from headstart.serve.queue import Batcher, EngineDownError, Ids, Logits, OverloadedError, PoisonError

Answer = TypeVar("Answer")
POISON = 666


def ids(*numbers: int) -> Ids:
    return np.array(numbers, np.int32)


def twice(texts: Sequence[Ids]) -> Logits:
    """Twice the first id of each text, and its length: an answer that tells whose it is."""
    if any(POISON in text.tolist() for text in texts):
        raise ValueError("poison")
    return np.array([[2 * text[0], len(text)] for text in texts], np.float32)


def batcher(score: Callable[[Sequence[Ids]], Logits] = twice, **limits: Any) -> Batcher:
    return Batcher(score, **{"most_waiting": 1000, "most_tokens": 64, **limits})


def running(one: Batcher, work: Callable[[], Awaitable[Answer]]) -> Answer:
    """What `work` comes to beside a running queue."""

    async def both() -> Answer:
        task = asyncio.create_task(one.run())
        try:
            return await asyncio.wait_for(work(), 20)
        finally:
            task.cancel()

    return asyncio.run(both())


async def ask(one: Batcher, *texts: Ids) -> Logits:
    with one.places(len(texts)):
        return await one.logits(texts)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 600), min_size=1, max_size=9), min_size=1, max_size=5), max_size=30))
def test_every_answer_belongs_to_its_own_request(requests: list[list[list[int]]]) -> None:
    one = batcher()

    async def work() -> list[Logits]:
        return await asyncio.gather(*(ask(one, *(ids(*text) for text in texts)) for texts in requests))

    for texts, found in zip(requests, running(one, work), strict=True):
        assert found.tolist() == [[2 * text[0], len(text)] for text in texts]
    assert one.admitted == 0


def test_what_comes_while_a_batch_is_computed_is_scored_together_within_the_budget() -> None:
    sizes: list[int] = []
    first = threading.Event()

    def slow(texts: Sequence[Ids]) -> Logits:
        first.wait(5)
        return twice(texts)

    one = batcher(slow, most_tokens=10, on_batch=sizes.append)

    async def work() -> None:
        asks = [asyncio.create_task(ask(one, ids(0, 0)))]
        await asyncio.sleep(0.05)
        asks += [asyncio.create_task(ask(one, ids(i, i))) for i in range(1, 13)]
        await asyncio.sleep(0.05)
        first.set()
        await asyncio.gather(*asks)

    running(one, work)
    assert sizes == [1, 5, 5, 2], "ten tokens are five texts of two"


def test_one_text_longer_than_the_budget_is_scored_alone() -> None:
    one = batcher(most_tokens=3)
    assert running(one, lambda: ask(one, ids(*range(50)), ids(7))).tolist() == [[0, 50], [14, 1]]


def test_places_run_out_at_once_and_come_back() -> None:
    release = threading.Event()

    def stuck(texts: Sequence[Ids]) -> Logits:
        release.wait(5)
        return twice(texts)

    one = batcher(stuck, most_waiting=4)

    async def work() -> None:
        waiting = asyncio.create_task(ask(one, ids(1), ids(2), ids(3)))
        await asyncio.sleep(0.05)
        begun = time.perf_counter()
        with pytest.raises(OverloadedError, match="3 texts wait, of at most 4"):
            await ask(one, ids(4), ids(5))
        assert time.perf_counter() - begun < 0.02
        fits = asyncio.create_task(ask(one, ids(6)))
        await asyncio.sleep(0.01)
        assert one.admitted == 4
        release.set()
        await asyncio.gather(waiting, fits)
        assert one.admitted == 0
        await ask(one, ids(4), ids(5))

    running(one, work)


def test_what_nobody_waits_for_any_more_is_never_computed() -> None:
    seen: list[int] = []
    begun, release = threading.Event(), threading.Event()

    def record(texts: Sequence[Ids]) -> Logits:
        seen.extend(int(text[0]) for text in texts)
        begun.set()
        release.wait(5)
        return twice(texts)

    one = batcher(record)

    async def work() -> None:
        first = asyncio.create_task(ask(one, ids(1)))
        await asyncio.to_thread(begun.wait, 5)
        left, stays = asyncio.create_task(ask(one, ids(2))), asyncio.create_task(ask(one, ids(3)))
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.sleep(0.01)
        release.set()
        await asyncio.gather(first, stays)

    running(one, work)
    assert seen == [1, 3]


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_poison_text_fails_alone(place: int) -> None:
    sizes: list[int] = []
    gate = threading.Event()

    def waits_once(texts: Sequence[Ids]) -> Logits:
        gate.wait(5)
        sizes.append(len(texts))
        return twice(texts)

    one = batcher(waits_once, most_tokens=1000)

    async def work() -> list[Logits | BaseException]:
        first = asyncio.create_task(ask(one, ids(99)))
        await asyncio.sleep(0.05)
        texts = [ids(i) for i in range(7)]
        texts[place] = ids(POISON)
        asks = [asyncio.create_task(ask(one, text)) for text in texts]
        await asyncio.sleep(0.05)
        gate.set()
        await first
        return await asyncio.gather(*asks, return_exceptions=True)

    found = running(one, work)
    assert sizes[1] == 7, "they were in one batch"
    for i, answer in enumerate(found):
        if i == place:
            assert isinstance(answer, PoisonError)
        else:
            assert isinstance(answer, np.ndarray)
            assert answer.tolist() == [[2 * i, 1]]
    assert one.admitted == 0


class EndOfThread(BaseException):
    """What ends a thread whatever it does."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_everybody_is_told_at_once_and_nobody_hangs() -> None:
    begun = threading.Event()

    def dies(texts: Sequence[Ids]) -> Logits:
        begun.set()
        time.sleep(0.1)
        raise EndOfThread

    one = batcher(dies)

    async def work() -> None:
        asks = [asyncio.create_task(ask(one, ids(i))) for i in range(3)]
        await asyncio.to_thread(begun.wait, 5)
        late = asyncio.create_task(ask(one, ids(9)))
        died = time.perf_counter()
        told = await asyncio.gather(*asks, late, return_exceptions=True)
        assert time.perf_counter() - died < 1
        assert all(isinstance(one, EngineDownError) for one in told)
        with pytest.raises(EngineDownError):
            await ask(one, ids(1))

    running(one, work)
    assert one.admitted == 0


def test_an_engine_that_hangs_counts_as_dead_and_its_late_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "STALLED", 0.2)
    release = threading.Event()

    def hangs(texts: Sequence[Ids]) -> Logits:
        release.wait(5)
        return twice(texts)

    one = batcher(hangs)

    async def work() -> None:
        with pytest.raises(EngineDownError):
            await ask(one, ids(1))
        release.set()
        await asyncio.sleep(0.1)
        assert one.engine.works(), "it got on after all"
        assert (await ask(one, ids(4))).tolist() == [[8, 1]]

    running(one, work)
