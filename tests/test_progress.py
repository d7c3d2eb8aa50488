"""Bars on a terminal, silence elsewhere."""

import os
import subprocess
import sys

import pytest

from headstart.progress import bar

COUNT_TO_THREE = """
from headstart.progress import bar
with bar("counting", 3, "sheep") as advance:
    for i in range(3):
        advance(1, f"note {i}")
"""


def test_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("counting", 3, "sheep") as advance:
        for _ in range(3):
            advance(1, "a note")
    with bar("counting", None, "sheep") as advance:
        advance(5, "")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_drawn_on_a_terminal_on_stderr_alone() -> None:
    import pty

    master, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", COUNT_TO_THREE],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(terminal)
        drawn = b""
        try:
            while piece := os.read(master, 65536):
                drawn += piece
        except OSError:
            pass  # Linux ends a closed pseudo-terminal so
        os.close(master)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert printed == b"", "stdout is for results"
    shown = drawn.decode("utf-8")
    assert "counting" in shown
    assert "3/3" in shown
    assert "note 2" in shown


def test_what_happens_inside_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), bar("counting", 3, "sheep") as advance:
        advance(1 // 0, "")
