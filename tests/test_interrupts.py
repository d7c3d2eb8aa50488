"""Real signals, sent to this process."""

import signal
import threading

import pytest

from headstart.interrupts import termination, undisturbed

pytestmark = pytest.mark.usefixtures("ctrl_c")


def test_ctrl_c_comes_at_the_end_of_the_block_and_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the block is what is tested
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("more")
    assert done == ["whole"]
    with undisturbed():
        done.append("again")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_error_in_the_block_is_passed_on_and_the_handler_is_put_back() -> None:
    with pytest.raises(ValueError, match="mine"), undisturbed():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in its background
    try:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_set_no_handlers() -> None:
    done = []

    def work() -> None:
        with undisturbed(), termination() as terminated:
            done.append(terminated.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]


def test_sigterm_is_noted_within_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with termination() as terminated:
        assert not terminated.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert terminated.is_set()
    assert signal.getsignal(signal.SIGTERM) == before
