"""Results come in order, few items are taken ahead, an error ends the work, and every thread begins as asked."""

import threading
import time

import pytest

from headstart.parallel import cores, in_threads


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(in_threads(slow_first, range(20), 2)) == [item * item for item in range(20)]


def test_few_items_are_taken_ahead() -> None:
    taken = []

    def items() -> object:
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_threads(lambda item: item, items(), 2)  # type: ignore[arg-type, var-annotated]
    next(results)
    assert len(taken) <= 6
    results.close()  # type: ignore[attr-defined]


def test_an_error_reaches_the_caller_and_ends_the_rest() -> None:
    done = []

    def fail_at_five(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        done.append(item)
        return item

    with pytest.raises(ValueError, match="five"):
        list(in_threads(fail_at_five, range(1000), 2))
    assert len(done) < 20


def test_each_thread_begins_first() -> None:
    begun: set[int] = set()
    both = threading.Barrier(2)

    def work(item: int) -> bool:
        both.wait(5)
        return threading.get_ident() in begun

    assert all(in_threads(work, range(4), 2, lambda: begun.add(threading.get_ident())))
    assert len(begun) == 2


def test_cores_are_those_of_this_process() -> None:
    assert cores() >= 1
