"""One function over many items by several threads, results in order. Knows nothing of what is computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import psutil

Given = TypeVar("Given")
Made = TypeVar("Made")


def cores() -> int:
    """Physical cores that this process may use."""
    process, physical = psutil.Process(), psutil.cpu_count(logical=False) or 1
    return min(len(process.cpu_affinity()), physical) if hasattr(process, "cpu_affinity") else physical


def in_threads(
    function: Callable[[Given], Made], items: Iterable[Given], workers: int, begin: Callable[[], Any] | None = None
) -> Iterator[Made]:
    """`function` of each item, in order, by so many threads that each `begin` first; few items are taken ahead."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no item that has not begun
