"""Requests made up by schemathesis from /openapi.json, valid and not: no 5xx, and every answer as the schema says."""

import subprocess
import sys
from pathlib import Path

from tests.serve.conftest import Serve, Served

# Where two routes share a path, Starlette's 405 names the methods of the first.
LEFT_OUT = "allow_header_conformance"


def run(served: Served, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = str(Path(sys.executable).with_name("schemathesis"))
    command = [tool, "run", f"{served.url}/openapi.json", "--seed", "1", "--no-color", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)


def test_every_answer_is_as_the_schema_says(served: Served, tmp_path: Path) -> None:
    done = run(served, tmp_path, "--max-examples", "25", "--exclude-checks", LEFT_OUT)
    assert done.returncode == 0, done.stdout
    assert "6 selected / 6 total" in done.stdout


def test_with_a_key_nothing_is_answered_without_it(serve: Serve, tmp_path: Path) -> None:
    with serve("--api-key-env", "KEY", KEY="k") as served:
        bearer = ("--header", "Authorization: Bearer k")
        done = run(served, tmp_path, "--max-examples", "5", "--exclude-checks", LEFT_OUT, *bearer)
        assert done.returncode == 0, done.stdout
