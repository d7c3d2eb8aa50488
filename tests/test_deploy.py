"""docs/serving.md and deploy/ are true: examples run against a real server, files agree with the code."""

import configparser
import contextlib
import dataclasses
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import uvicorn
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from headstart import cli
from headstart.config import ServeConfig
from headstart.errors import InputError
from headstart.serve.schema import RESPONSES
from headstart.serve.server import GRACE
from tests.serve.conftest import serving

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
DEPLOY = ROOT / "deploy"
NGINX = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
ADDRESS, KEY_NAME, KEY = "http://127.0.0.1:8080", "HEADSTART_API_KEY", "open sesame"
DEFAULTS = ServeConfig()


def blocks(language: str) -> list[str]:
    """The page's examples in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    assert found, language
    return found


def table(header: str) -> list[list[str]]:
    """The rows of the page's table whose header begins so, as cells."""
    _, _, rest = DOCS.partition(f"\n{header}")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def ask(
    url: str,
    path: str,
    body: Any = None,
    *,
    key: str | None = KEY,
    method: str | None = None,
    source: str = "127.0.0.1",
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one request; the body is JSON, or bytes as they are."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60, source_address=(source, 0))
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method or ("GET" if body is None else "POST"), path, content, headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()


@pytest.fixture(scope="module")
def exported(exported_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What docs/serving.md says is read of an exported run, and no more."""
    sentence = re.search(r"Of the run folder it reads (.*?)\. ", DOCS, re.DOTALL)
    copied = re.search(r"cp -r runs/reviews/\{(.*?)\}", DOCS)
    assert sentence is not None
    assert copied is not None
    names = [name.rstrip("/") for name in re.findall(r"`([\w./]+)`", sentence[1])]
    assert names == copied[1].split(",")
    folder = tmp_path_factory.mktemp("exported")
    for name in names:
        if (exported_run / name).is_dir():
            shutil.copytree(exported_run / name, folder / name)
        else:
            shutil.copy(exported_run / name, folder / name)
    return folder


FLAGS, SECRET = ("--api-key-env", KEY_NAME), {KEY_NAME: KEY}


@pytest.fixture(scope="module")
def served(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the exported run."""
    with serving(exported, tmp_path_factory.mktemp("served") / "log", *FLAGS, **SECRET) as found:
        yield found.url


# --- docs/serving.md


def run_example(command: Sequence[str], code: str, url: str, folder: Path) -> str:
    """What an example prints when the server is at `url`."""
    assert ADDRESS in code
    environment = {**os.environ, KEY_NAME: KEY, "HF_HUB_OFFLINE": "0"}  # else its client refuses this machine, too
    done = subprocess.run(
        [*command, code.replace(ADDRESS, url)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("code", blocks("bash"))
def test_each_curl_example_works(code: str, served: str, tmp_path: Path) -> None:
    answer = json.loads(run_example(["bash", "-euc"], code, served, tmp_path))
    assert {"0", "1"} == set(answer["labels"] if isinstance(answer, dict) else labels_in(answer))


def labels_in(answer: Any) -> Iterator[str]:
    """The labels in lists of labels and scores, however deep."""
    for one in answer:
        yield from [one["label"]] if isinstance(one, dict) else labels_in(one)


@pytest.mark.parametrize("code", blocks("python"))
def test_each_python_example_works(code: str, served: str, tmp_path: Path) -> None:
    printed = run_example([sys.executable, "-W", "error", "-c"], code, served, tmp_path)
    assert re.fullmatch(r"[01] 0\.\d+\n|\[('[01]'(, )?){40}\]\n", printed), printed


def test_each_flag_is_there_with_its_default() -> None:
    rows = {
        flag.strip("`"): default.strip("`") for flags, default, _ in table("| flag |") for flag in flags.split(", ")
    }
    for field in dataclasses.fields(ServeConfig):
        shown = (
            "none" if field.default is None else f"{field.default:.9g}" if field.type is float else str(field.default)
        )
        assert rows.pop(f"--{field.name.replace('_', '-')}") == shown
    assert rows == {"--device": "auto", "--precision": "auto"}


ERRORS: list[tuple[int, str, str, Any, dict[str, Any]]] = [
    (400, "Empty", "/predict", {"inputs": " "}, {}),
    (400, "Empty", "/", {"inputs": []}, {}),
    (401, "Unauthorized", "/predict", {"inputs": "a"}, {"key": None}),
    (401, "Unauthorized", "/metrics", None, {"key": "guess"}),
    (404, "Not Found", "/nowhere", None, {}),
    (404, "Not found", "/explain", {"inputs": "a"}, {}),
    (405, "Method Not Allowed", "/predict", None, {}),
    (413, "Too large", "/predict", {"inputs": "a" * DEFAULTS.max_body_bytes}, {}),
    (413, "Too large", "/predict", {"inputs": [["a"]] * (DEFAULTS.max_batch + 1)}, {}),
    (422, "Validation", "/predict", {"inputs": ["a", "b"]}, {}),
    (422, "Validation", "/predict", b"{", {}),
    (422, "Validation", "/predict", {"inputs": "a " * 100, "truncate": False}, {}),
]


@pytest.mark.parametrize(("status", "kind", "path", "body", "more"), ERRORS)
def test_each_error_is_as_the_page_has_it(
    served: str, status: int, kind: str, path: str, body: Any, more: dict[str, Any]
) -> None:
    got, _, text = ask(served, path, body, **more)
    answer = json.loads(text)
    assert (got, answer["error_type"], answer.keys()) == (status, kind, {"error", "error_type"}), text
    assert any(row[0] == str(status) and f"`{kind}`" in row[1] + row[2] for row in table("| status |"))


def test_no_error_is_missing_from_the_page() -> None:
    assert {int(row[0]) for row in table("| status |")} >= set(RESPONSES)


def test_a_body_of_the_largest_size_is_taken(served: str) -> None:
    frame = len(json.dumps({"inputs": ""}))
    for size in (70_000, 300_000, DEFAULTS.max_body_bytes):
        status, _, text = ask(served, "/predict", {"inputs": "a" * (size - frame)})
        assert status == 200, text


def test_each_metric_is_on_the_page(served: str) -> None:
    ask(served, "/predict", {"inputs": "a"})
    _, _, text = ask(served, "/metrics")
    there = {
        name for name in re.findall(r"^# TYPE (headstart_\w+)", text, re.MULTILINE) if not name.endswith("_created")
    }
    said = {cell.strip("`").partition("{")[0] for cell, _ in table("| metric |")}
    assert said == there
    assert {name.removesuffix("_bucket") for name in re.findall(r"headstart_\w+", DOCS)} <= there


def test_a_line_of_the_log_is_as_the_page_has_it(exported: Path, tmp_path: Path) -> None:
    with serving(exported, tmp_path / "log", *FLAGS, **SECRET) as found:
        ask(found.url, "/predict", {"inputs": "a secret"})
        ask(found.url, "/etc/secret?a=secret", key="secret")
        assert found.stop() in (0, -signal.SIGTERM)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    example = re.search(r'`(\{"method".*?\})`', DOCS)
    assert example is not None
    assert [list(line) for line in lines] == [list(json.loads(example[1]))] * 2
    assert [line["path"] for line in lines] == ["/predict", "other"]
    assert "secret" not in said


# --- deploy/requirements-serve.txt

ONLY = """
import importlib.abc
import importlib.metadata
import sys

there = importlib.metadata.packages_distributions()
wanted = {"headstart", *sys.argv.pop(1).split(",")}


class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        owners = {owner.lower().replace("_", "-") for owner in there.get(name, ())} if path is None else set()
        if owners and not owners & wanted:
            raise ModuleNotFoundError(f"no {name}", name=name)
        for owner in owners & wanted:
            print("uses", owner, file=sys.stderr)


sys.meta_path.insert(0, Only())
from headstart.cli import main
main()
"""
"""The command line where nothing is installed but some packages; it says which of them it uses."""


def pins(path: Path) -> dict[NormalizedName, str]:
    """Package -> version in a file of pins."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


SMALL = pins(DEPLOY / "requirements-serve.txt")


def test_the_pins_are_those_of_the_constraints_and_of_pyproject() -> None:
    constraints = pins(ROOT / "constraints.txt")
    assert {name: version for name, version in SMALL.items() if constraints.get(name, version) != version} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["serve"])]
    asked = {canonicalize_name(one.name): one.specifier for one in known}
    assert {name for name in SMALL if name in asked and SMALL[name] not in asked[name]} == set()
    assert {canonicalize_name(Requirement(one).name) for one in project["optional-dependencies"]["serve"]} <= set(SMALL)


def test_an_exported_run_is_served_with_the_small_set_alone_and_needs_all_of_it(exported: Path, tmp_path: Path) -> None:
    start = ("-c", ONLY, ",".join(SMALL))
    with serving(exported, tmp_path / "log", *FLAGS, start=start, **SECRET) as found:
        for path, body in (("/predict", {"inputs": "the film was superb"}), ("/", {"inputs": ["a", "b"]})):
            assert ask(found.url, path, body)[0] == 200
        for path in ("/info", "/health", "/metrics", "/docs", "/openapi.json"):
            assert ask(found.url, path)[0] == 200, path
        for status, _, path, body, more in ERRORS:
            assert ask(found.url, path, body, **more)[0] == status
    said = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    used = {line.split()[1] for line in said if line.startswith("uses ")} - {"headstart"}
    assert used == set(SMALL)
    (tmp_path / "in.csv").write_text("sentence\nthe film was superb\n", encoding="utf-8")
    arguments = ["predict", str(exported), "--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv")]
    done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the film was superb,1," in (tmp_path / "out.csv").read_text(encoding="utf-8")


# --- the unit and the image


def parsed(command: Sequence[str]) -> ServeConfig:
    """The settings that a `headstart serve …` asks for; an unknown option or value ends the test."""
    assert (Path(command[0]).name, command[1]) == ("headstart", "serve")
    commands: Any = typer.main.get_command(cli.app)
    given = commands.commands["serve"].make_context("serve", list(command[2:])).params
    names = {field.name for field in dataclasses.fields(ServeConfig)}
    return ServeConfig(**{name: value for name, value in given.items() if name in names and value is not None})


def test_the_unit_agrees_with_the_code() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "headstart.service", encoding="utf-8")
    service = unit["Service"]
    config = parsed(shlex.split(service["ExecStart"]))
    assert f"server {config.host}:{config.port};" in NGINX
    assert config.api_key_env == KEY_NAME
    assert int(service["TimeoutStopSec"]) == GRACE + 5
    assert int(service["LimitNOFILE"]) >= 2 * config.max_connections
    assert service["RestartPreventExitStatus"] == str(InputError.exit_code)
    assert "AF_UNIX" in service["RestrictAddressFamilies"], "asyncio has a socket pair"
    assert "ORT_DISABLE_TELEMETRY=1" in service["Environment"]
    assert service["EnvironmentFile"] in DOCS
    assert service["ExecStart"].partition(" --")[0] in DOCS


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "headstart.service").read_text(encoding="utf-8")
    path = tmp_path / "headstart.service"
    path.write_text(unit.replace("ExecStart=/opt/headstart/bin/headstart", "ExecStart=/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and what follows it."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_agrees_with_the_code(served: str) -> None:
    image = dict(instructions())  # the last of each, which is the final stage's
    config = parsed([*json.loads(image["ENTRYPOINT"]), *json.loads(image["CMD"])])
    assert (config.host, config.port, config.api_key_env) == ("0.0.0.0", int(image["EXPOSE"]), KEY_NAME)
    assert all(int(part) > 0 for part in image["USER"].split(":"))
    assert "ORT_DISABLE_TELEMETRY=1" in image["ENV"]
    assert f"--stop-timeout {GRACE + 5}" in DOCS
    assert f':/run-folder:ro" --publish 127.0.0.1:{config.port}:{config.port} headstart' in DOCS
    shell = [rest for name, rest in instructions() if name == "RUN"]
    assert all("--no-deps" in line for line in shell if " install " in line)
    program, flag, code = json.loads(image["HEALTHCHECK"].partition("CMD ")[2])
    assert (program, flag) == ("python", "-c")
    assert f"http://127.0.0.1:{config.port}/" in code
    for url, status in ((served, 0), ("http://127.0.0.1:9", 1)):
        command = [sys.executable, flag, code.replace(ADDRESS, url)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == status


def test_the_image_is_built_from_what_is_there_and_let_in() -> None:
    copied = [
        part for name, rest in instructions() if name == "COPY" and "--from" not in rest for part in rest.split()[:-1]
    ]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert allowed[1] == "*"
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in allowed
    bases = {rest.split()[0] for name, rest in instructions() if name == "FROM"}
    assert len(bases) == 1, "a virtual environment works beside the Python that made it"


# --- nginx


def test_nginx_agrees_with_the_code() -> None:
    numbers = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)s?;", NGINX)}
    assert numbers["client_max_body_size"] == numbers["client_body_buffer_size"] == DEFAULTS.max_body_bytes
    assert numbers["proxy_read_timeout"] == DEFAULTS.timeout + 5
    assert numbers["proxy_send_timeout"] == numbers["client_body_timeout"] == DEFAULTS.read_timeout
    assert numbers["keepalive_timeout"] < uvicorn.Config("").timeout_keep_alive


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def behind_nginx(url: str, folder: Path) -> Iterator[str]:
    """The address of an nginx before the server at `url`, with deploy/nginx.conf but for its ports."""
    port = free_port()
    site = NGINX.replace("127.0.0.1:8080", url.removeprefix("http://")).replace("listen [::]:80;", "")
    (folder / "site.conf").write_text(site.replace("listen 80;", f"listen 127.0.0.1:{port};"), encoding="utf-8")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log {folder}/access.log;\n{places}include {folder}/site.conf;\n}}\n",
        encoding="utf-8",
    )
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no nginx here")
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def test_nginx_passes_on_what_is_asked_and_keeps_the_rest_to_itself(served: str, tmp_path: Path) -> None:
    with behind_nginx(served, tmp_path) as url:
        assert json.loads(ask(url, "/predict", {"inputs": "a"})[2])[0].keys() == {"label", "score"}
        assert ask(url, "/predict", {"inputs": "a"}, key=None)[0] == 401
        frame = len(json.dumps({"inputs": ""}))
        largest = {"inputs": "a" * (DEFAULTS.max_body_bytes - frame)}
        assert ask(url, "/predict", largest)[0] == 200
        assert list((tmp_path / "client_body").iterdir()) == [], "no text is written to a disk"
        status, _, text = ask(url, "/predict", {"inputs": largest["inputs"] + "a"})
        assert (status, json.loads(text)["error_type"]) == (413, "Too large")
        assert ask(url, "/metrics")[0] == 200
        if sys.platform == "linux":
            for path in ("/metrics", "/%6detrics", "//metrics", "/page/../metrics"):
                assert ask(url, path, source="127.0.0.2")[0] == 403, path
            assert ask(url, "/info", source="127.0.0.2")[0] == 200
        assert ask(url, "/health", key=None)[1]["x-content-type-options"] == "nosniff"


def test_nginx_says_when_the_service_is_away(tmp_path: Path) -> None:
    with behind_nginx(f"http://127.0.0.1:{free_port()}", tmp_path) as url:
        status, headers, text = ask(url, "/predict", {"inputs": "a"})
        assert (status, headers["retry-after"], json.loads(text)["error_type"]) == (503, "1", "Unhealthy")
