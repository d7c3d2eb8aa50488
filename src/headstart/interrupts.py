"""Signals that end a process, at times that suit the work; knows nothing of what is done meanwhile."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """Set when SIGTERM comes during the block, if this is the main thread: only that may set handlers."""
    event, here = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set()) if here else None
    try:
        yield event
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C come at the end of the block, which is to be done whole or not at all."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[Any]()
    signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])
