"""The JavaScript examples of docs/serving.md, Hugging Face's npm client among them, against a real server."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import serving
from tests.test_deploy import ADDRESS, FLAGS, SECRET, blocks

pytestmark = pytest.mark.real
CLIENT = "@huggingface/inference@4"
ERRS = """
const wrong = await client.textClassification({ endpointUrl: "%s", inputs: "" }).catch((error) => error);
console.log(JSON.stringify({ message: wrong.message, status: wrong.httpResponse.status }));
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client in it; the tests are skipped where there is no npm, or it reaches no registry."""
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node.js with npm here")
    quick = ("--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000")
    command = ["npm", "install", *quick, "--prefix", str(folder), CLIENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install {CLIENT}: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="module")
def served(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    with serving(tiny_run, tmp_path_factory.mktemp("served") / "log", *FLAGS, **SECRET) as found:
        yield found.url


def run_node(code: str, url: str, folder: Path) -> list[str]:
    """The lines that a module prints when the server is at `url`."""
    assert ADDRESS in code
    (folder / "example.mjs").write_text(code.replace(ADDRESS, url), encoding="utf-8")
    environment = {**os.environ, **SECRET}
    command = ["node", "example.mjs"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("code", blocks("js"))
def test_each_javascript_example_works(code: str, modules: Path, served: str) -> None:
    (line,) = run_node(code, served, modules)
    found = json.loads(line)
    for one in found if isinstance(found, list) else [found]:
        assert one["label"] in ("0", "1")
        assert 0.5 <= one["score"] <= 1


def test_the_client_hands_on_what_the_service_says_of_an_error(modules: Path, served: str) -> None:
    (example,) = (code for code in blocks("js") if "@huggingface/inference" in code)
    *_, line = run_node(example + ERRS % ADDRESS, served, modules)
    found = json.loads(line)
    assert found["status"] == 400
    assert "in an empty text" in found["message"]
