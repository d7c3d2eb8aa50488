"""README.md, docs/ and examples/ are true: their code runs, their links lead somewhere, the errors they quote are ours.

Of each page, `python`, `bash` and `console` blocks are run in order, in one folder with small tables by the names
that the pages use. Python blocks of a page share their names, as in a notebook; of a `console` block lines after `$ `
are run; `headstart serve` runs on until the page ends, at a free port. `toml` and `json` blocks are parsed.

Other blocks are not run: `text` is output; `sh` changes the machine or needs another one (pip, make, docker, systemd)
and may hold no command of headstart; `js`, and the clients in docs/serving.md, are run by test_deploy.py. A block that
could be run is left out only under `<!-- not run: REASON -->`.
"""

import ast
import contextlib
import csv
import http.server
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt

import headstart
from headstart import cli
from headstart.tables import resolve_path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PARSERS: dict[str, Callable[[str], Any]] = {"json": json.loads, "toml": tomllib.loads}
SHOWN = ("text", "sh", "js")
# By test_deploy.py, against a server with a key; and what comes before stands in README.md, too.
RUN_ELSEWHERE = {"serving.md": ("bash", "console", "python")}
PIPS = (".venv/bin/pip", "/opt/headstart/bin/pip", "pip", "python3")
OF_THE_MACHINE = {*PIPS, "(umask", "cp", "docker", "export", "journalctl", "make", "mkdir", "mlflow", "ray"}
OF_THE_MACHINE |= {"systemctl", "tensorboard"}
PORT = 8080


class Block(NamedTuple):
    """A fenced block: its language, its code, the line it begins at, and why it is not to be run, if so."""

    language: str
    code: str
    line: int
    reason: str


@cache
def parsed(page: Path) -> list[Any]:
    """The page's Markdown tokens."""
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """The page's code, without the directives of Sphinx."""
    found = []
    for before, token in itertools.pairwise([None, *parsed(page)]):
        if token.type == "fence" and not token.info.startswith("{"):
            comment = before.content if before is not None and before.type == "html_block" else ""
            reason = re.fullmatch(r"<!-- not run: (.+?) -->\s*", comment, re.DOTALL)
            found.append(Block(token.info, token.content, token.map[0] + 1, reason[1] if reason else ""))
    return found


def name_of(path: Path) -> str:
    return path.name


# --- code


def rows_of_the_sample() -> Iterator[tuple[str, str]]:
    """Texts and labels of the sample set, the labels in turns."""
    with open(resolve_path("sample"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    by_label = [[row for row in rows if row["label"] == label] for label in ("negative", "positive")]
    return ((row["sentence"], row["label"]) for pair in zip(*by_label, strict=False) for row in pair)


def write(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader may have it: tables by the names that the pages use, and `headstart` to call."""
    rows = rows_of_the_sample()
    write(tmp_path / "reviews.csv", "sentence,label", list(itertools.islice(rows, 80)))
    write(tmp_path / "train.csv", "sentence,label", list(itertools.islice(rows, 50)))
    for name in ("dev", "test", "other", "held-out"):
        write(tmp_path / f"{name}.csv", "sentence,label", list(itertools.islice(rows, 20)))
    write(tmp_path / "new.csv", "id,sentence", [(i, text) for i, (text, _) in enumerate(itertools.islice(rows, 20))])
    mail = list(itertools.islice(rows, 72))
    write(tmp_path / "mail.csv", "body,sentiment", mail)
    topics = ("billing", "delivery", "billing|delivery", "app", "delivery|app", "")
    asked = [f"About {topics[i % 6].replace('|', ' and ')}: {text}" for i, (text, _) in enumerate(mail)]
    tickets = [(text, topics[i % 6] or "|") for i, text in enumerate(asked)]
    write(tmp_path / "tickets.csv", "text,labels", tickets)
    stars = [(text, (1 if label == "negative" else 4) + i // 2 % 2) for i, (text, label) in enumerate(mail)]
    stars[::9] = [(f"It was fine, no more. {text}", 3) for text, _ in stars[::9]]
    write(tmp_path / "stars.csv", "review,label", stars)
    long = [(" ".join([text] * 60), label) for text, label in itertools.islice(rows, 40)]
    write(tmp_path / "long.csv", "sentence,label", long)
    programs = tmp_path.parent / f"{tmp_path.name}-bin"
    programs.mkdir()
    for name, arguments in (("headstart", "-m headstart.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(code: str, serving: contextlib.ExitStack, port: int) -> None:
    """Run a page's commands, plain ones of headstart in this process, which saves seconds each; the others by bash.

    `headstart serve` is started, and waited for until it answers.
    """
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["headstart", "serve"]:
            serving.enter_context(served(words, port))
        elif words[:1] == ["headstart"] and not re.search(r"[|<>;&$*{}]", line):
            with pytest.raises(SystemExit) as end:
                cli.main(words[1:])
            assert end.value.code == 0, line
        elif words:
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)


@contextlib.contextmanager
def served(command: list[str], port: int) -> Iterator[None]:
    """That server, from when it answers until the page ends."""
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, command
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.real
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_on_each_page_runs(page: Path, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    port, elsewhere = free_port(), RUN_ELSEWHERE.get(page.name, ())
    with contextlib.ExitStack() as serving:
        for block in blocks(page):
            code = block.code.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{port}")
            if block.language in PARSERS:
                PARSERS[block.language](code)
            elif block.reason or block.language in elsewhere:
                continue
            elif block.language == "python":
                exec(compile("\n" * block.line + code, str(page), "exec"), names)
            elif block.language in ("bash", "console"):
                lines = re.findall(r"(?m)^\$ (.*\n)", code) if block.language == "console" else [code]
                run_shell("".join(lines), serving, port)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_not_run_is_not_code_that_could_be(page: Path) -> None:
    for block in blocks(page):
        assert block.language in (*PARSERS, *SHOWN, "bash", "console", "python"), f"{page.name}, line {block.line}"
        if block.language == "sh":
            first = {line.split()[0] for line in block.code.replace("\\\n", " ").splitlines() if line}
            assert first <= OF_THE_MACHINE, f"{page.name}, line {block.line}: {first - OF_THE_MACHINE}"


def test_from_scikit_learn_to_probabilities_in_five_lines() -> None:
    code = next(one.code for one in blocks(PAGES[0]) if one.language == "python" and "predict_proba" in one.code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    assert ".fit(" in code


@pytest.mark.real
@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_each_example_runs(example: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TABLE", "reviews.csv")
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


# --- links


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found, seen = set(), Counter[str]()
    for before, token in itertools.pairwise(parsed(page)):
        if before.type == "heading_open":
            plain = "".join(part.content for part in token.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
            seen[slug] += 1
    return found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere_where_the_page_lies(page: Path) -> None:
    parts = [part for token in parsed(page) for part in token.children or ()]
    for link in [str(part.attrs["href"]) for part in parts if part.type == "link_open"]:
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", url.netloc), link
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not url.fragment or url.fragment in headings(target), link


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves files, logs nothing, and says by a header that a link checker need not wait between requests."""

    def end_headers(self) -> None:
        self.send_header("LinkChecker", "is welcome")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def files_served(folder: Path) -> Iterator[str]:
    """The address of a folder's files."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_site_is_built_without_a_warning_and_all_its_links_lead_somewhere(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    flags = re.search(r"-m sphinx (.*) docs docs/_build", makefile)
    assert flags is not None
    built = tmp_path / "site"
    build = [sys.executable, "-m", "sphinx", *flags[1].split(), str(DOCS), str(built), "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "linkcheckerrc").write_text("[checking]\nmaxrequestspersecond=1000\n[AnchorCheck]\n", "utf-8")
    options = ["--config", str(tmp_path / "linkcheckerrc"), "--no-status", "--threads", "4"]
    with files_served(built) as url:
        checker = [sys.executable, "-m", "linkcheck", *options, url]
        done = subprocess.run(checker, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = re.search(r"(\d+) links in \d+ URLs checked", done.stdout)
    assert checked is not None
    assert int(checked[1]) > 100, done.stdout


# --- errors


@cache
def strings_of_the_source() -> frozenset[str]:
    """Every string in the source, and every part of one between values put into it."""
    found = set()
    for path in Path(headstart.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(found)


def test_each_error_under_troubleshooting_is_one_of_ours() -> None:
    said = [block.code for block in blocks(DOCS / "troubleshooting.md") if block.language == "text"]
    quoted = "".join(said).splitlines()
    assert len(quoted) >= 20
    for message in quoted:
        parts = [part.strip() for part in message.removeprefix("headstart: ").split("…")]
        assert max(map(len, parts)) >= 12, message
        for part in parts:
            assert any(part in string for string in strings_of_the_source()), f"{part!r} of {message!r}"
