"""Progress bars: on a terminal's stderr, in a notebook, silent elsewhere. Knows nothing of what is counted."""

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

Advance = Callable[[int, str], None]
"""Called with how many more are done and a short note (a loss, say) shown beside the bar."""
EVERY = 0.1  # seconds between drawings in a notebook


@contextmanager
def bar(label: str | None, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar that counts up to `total` `unit`, with rate and time left; a `total` of None draws a pulse without an end.

    `label` says what is being done; without one nothing is drawn.
    """
    console = Console(stderr=True)
    if label is not None and in_notebook():
        with notebook_bar(label, total, unit) as advance:
            yield advance
        return
    if label is None or not console.is_terminal:
        yield lambda done, note: None
        return
    numbers = (MofNCompleteColumn(), "{task.fields[rate]}", TimeRemainingColumn(), "{task.fields[note]}")
    with Progress("{task.description}", BarColumn(), *numbers, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, note="", rate="")

        def advance(done: int, note: str = "") -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            progress.update(task, advance=done, note=note, rate=rate)

        yield advance


def in_notebook() -> bool:
    """Whether this runs in Jupyter, or in what speaks as it does."""
    ipython: Any = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


@contextmanager
def notebook_bar(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """The same in a notebook, by an element of HTML, which goes when all is done."""
    from IPython.display import HTML, display

    handle: Any = display(HTML(""), display_id=True)
    begun, drawn, done = time.monotonic(), 0.0, 0

    def advance(more: int, note: str = "") -> None:
        nonlocal drawn, done
        done, now = done + more, time.monotonic()
        if now - drawn < EVERY and done != total:
            return
        drawn = now
        share = "" if total is None else f'max="{total}" value="{done}"'
        count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        words = html.escape(f"{count} {unit}, {done / max(now - begun, 1e-9):,.0f}/s  {note}")
        handle.update(HTML(f"<label>{html.escape(label)} <progress {share}></progress> {words}</label>"))

    try:
        yield advance
    finally:
        handle.update(HTML(""))
