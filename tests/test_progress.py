"""Bars on a terminal and in a notebook, silence elsewhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

import headstart
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


IN_A_NOTEBOOK = """
import time
from headstart.progress import bar

for total in (3, None):
    with bar("counting <b>", total, "sheep") as advance:
        for i in range(3):
            time.sleep(0.15)
            advance(1, f"note <{i}>")
"""


@pytest.mark.filterwarnings("ignore")  # of the kernel's own sockets
def test_drawn_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(headstart.__file__).parents[1]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(IN_A_NOTEBOOK)])
    drawn = list[str]()

    class Client(nbclient.NotebookClient):  # type: ignore[misc]  # its types are not read
        """Keeps what was shown and went again."""

        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            drawn.append(message["content"].get("data", {}).get("text/html", ""))
            return super().process_message(message, cell, index)

    Client(notebook, timeout=60, kernel_name="python3").execute()
    assert '<label>counting &lt;b&gt; <progress max="3" value="2"></progress> 2/3 sheep' in "".join(drawn)
    assert 'max="3" value="3"' in "".join(drawn)
    assert "<progress ></progress> 3 sheep" in "".join(drawn)
    assert "note &lt;2&gt;" in "".join(drawn)
    left = [one.data["text/html"] for one in notebook.cells[0].outputs]
    assert left == ["", ""], "a bar goes when all is done, and nothing else was printed"
