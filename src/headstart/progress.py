"""Progress bars on stderr: drawn on a terminal, silent elsewhere. Knows nothing of what is counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

Advance = Callable[[int, str], None]
"""Called with how many more are done and a short note (a loss, say) shown beside the bar."""


@contextmanager
def bar(label: str | None, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar that counts up to `total` `unit`, with rate and time left; a `total` of None draws a pulse without an end.

    `label` says what is being done; without one nothing is drawn.
    """
    console = Console(stderr=True)
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
