"""Dynamic batching: texts of many requests are scored together, by one engine thread. It knows token ids, not HTTP.

Nothing waits for a batch to fill: while one is computed, the next gathers. A text whose request was cancelled, or came
to its deadline, is dropped when its turn comes. A batch that fails is halved until the text that made it fail is alone.
"""

import asyncio
import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.errors import HeadstartError

Ids = NDArray[np.int32]  # (length,) token ids of a text
Logits = NDArray[np.float32]  # (n, labels), or (labels,) of one text
Score = Callable[[Sequence[Ids]], Logits]

STALLED = 60.0  # seconds for one batch after which the engine counts as dead
GLANCE = 0.1  # seconds between two looks at the engine
NICENESS = 5


class OverloadedError(HeadstartError):
    """As many texts wait as may: come again later."""


class EngineDownError(HeadstartError):
    """The engine thread has ended, or hangs: nothing can be scored."""


class PoisonError(HeadstartError):
    """Scoring this one text fails."""


class Engine(threading.Thread):
    """A thread that scores one batch after another."""

    def __init__(self, score: Score) -> None:
        super().__init__(name="headstart-engine", daemon=True)
        self.score = score
        self.batches: queue.SimpleQueue[tuple[Sequence[Ids], Future[Logits]] | None] = queue.SimpleQueue()
        self.begun: float | None = None  # when it took up the batch it is at

    def run(self) -> None:
        """Score what comes until None does; on Linux with less claim to the cores than what answers and refuses has."""
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # threads that it starts inherit it
        while (job := self.batches.get()) is not None:
            batch, answer = job
            self.begun = time.monotonic()
            with contextlib.suppress(InvalidStateError):  # it took so long that it was given up
                try:
                    answer.set_result(self.score(batch))
                except Exception as error:  # whatever a text can do to a model
                    answer.set_exception(error)
            self.begun = None

    def works(self) -> bool:
        """Whether it is alive and gets on."""
        begun = self.begun
        return self.is_alive() and (begun is None or time.monotonic() - begun < STALLED)


@dataclass(eq=False)
class Waiting:
    """A text that waits, and where its logits go."""

    ids: Ids
    answer: asyncio.Future[Logits]


class Batcher:
    """The queue: admits at most `most_waiting` texts, and scores them in batches of about `most_tokens`.

    `run` has to run as a task. `on_batch` is told how many texts each batch has.
    """

    def __init__(
        self, score: Score, *, most_waiting: int, most_tokens: int, on_batch: Callable[[int], None] = lambda _: None
    ) -> None:
        self.engine = Engine(score)
        self.most_waiting, self.most_tokens, self.on_batch = most_waiting, most_tokens, on_batch
        self.admitted = 0  # texts that have a place, until they are answered
        self.line: deque[Waiting] = deque()
        self.under_way: Future[Logits] = Future()
        self.some = asyncio.Event()

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Places for so many texts during the block; an `OverloadedError` or `EngineDownError` at once if none are."""
        if not self.engine.works():
            raise EngineDownError("The engine is down.")
        if self.admitted + count > self.most_waiting:
            raise OverloadedError(f"{self.admitted:,} texts wait, of at most {self.most_waiting:,}.")
        self.admitted += count
        try:
            yield
        finally:
            self.admitted -= count

    async def logits(self, texts: Sequence[Ids]) -> Logits:
        """(n, labels) logits of n texts that have places; a `PoisonError` if one of them cannot be scored.

        To cancel this is to drop those that are not being computed yet.
        """
        loop = asyncio.get_running_loop()
        items = [Waiting(ids, loop.create_future()) for ids in texts]
        self.line.extend(items)
        self.some.set()
        try:
            return np.stack(await asyncio.gather(*(item.answer for item in items)))
        finally:
            for item in items:
                item.answer.cancel()

    async def run(self) -> None:
        """Start the engine and keep it busy, until cancelled; if it dies, everybody who waits is told."""
        self.engine.start()
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                await self.some.wait()
                if batch := self._next():
                    self.on_batch(len(batch))
                    await self._score(batch)
                else:
                    self.some.clear()
        finally:
            watch.cancel()
            self.engine.batches.put(None)

    def _next(self) -> list[Waiting]:
        """The next batch, in the order of arrival, without those nobody waits for any more."""
        batch, tokens = list[Waiting](), 0
        while self.line and (not batch or tokens + len(self.line[0].ids) <= self.most_tokens):
            item = self.line.popleft()
            if not item.answer.done():
                batch.append(item)
                tokens += len(item.ids)
        return batch

    async def _score(self, batch: Sequence[Waiting]) -> None:
        """Answer a batch; where that fails, its halves."""
        self.under_way = Future()
        self.engine.batches.put(([item.ids for item in batch], self.under_way))
        try:
            found = await asyncio.wrap_future(self.under_way)
        except EngineDownError as error:
            _fail(batch, error)
        except Exception as error:  # the engine passes on whatever it met
            if len(batch) > 1:
                await self._score(batch[: len(batch) // 2])
                await self._score(batch[len(batch) // 2 :])
            else:
                _fail(batch, PoisonError(f"The text cannot be scored ({type(error).__name__})."))
        else:
            for item, logits in zip(batch, found, strict=True):
                if not item.answer.done():
                    item.answer.set_result(logits)

    async def _watch(self) -> None:
        """Tell those who wait when the engine has died."""
        while True:
            await asyncio.sleep(GLANCE)
            if not self.engine.works():
                error = EngineDownError("The engine is down.")
                with contextlib.suppress(InvalidStateError):
                    self.under_way.set_exception(error)
                _fail(self.line, error)


def _fail(items: Sequence[Waiting] | deque[Waiting], error: HeadstartError) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)
