"""The real client of the Hub pushes to a small Hub on this machine, which keeps what came; what the card says there."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart import hub, predict, report
from headstart.cli import main
from headstart.errors import InputError, RunError, printable
from tests.conftest import EXACT

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's, of its own doing

HOSTILE = "a \"b\": 'c' #d --- [e] {f} <g> & \\ 😒 é %h"


@dataclass
class Hub:
    """What a small Hub has, what it was asked, and how it answers: `refuses` maps a part of a path to a status."""

    url: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    tokens: dict[str, str | None] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256, as Git LFS has them


class Handler(BaseHTTPRequestHandler):
    """The few endpoints that pushing needs, as the Hub has them."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        self.hub.tokens[self.path] = self.headers.get("authorization")
        status = next((status for part, status in self.hub.refuses.items() if part in self.path), None)
        if status is not None:
            self.answer({"error": f"refused with {status}"}, status)
        return status is not None

    def do_GET(self) -> None:  # http.server's name
        repo = self.path.removeprefix("/api/models/")
        if self.refused():
            return
        if repo not in self.hub.files:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        names = [{"rfilename": name} for name in (".gitattributes", *self.hub.files[repo])]
        self.answer({"id": repo, "private": repo in self.hub.private, "siblings": names})

    def do_POST(self) -> None:  # http.server's name
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.files[repo] = {}
            if asked.get("visibility") == "private":
                self.hub.private.add(repo)
            self.answer({"url": f"{self.hub.url}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            names = [one["path"] for one in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith((".safetensors", ".onnx")) else "regular" for name in names}
            modes = [{"path": name, "uploadMode": kind, "shouldIgnore": False} for name, kind in kinds.items()]
            self.answer({"files": modes})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer({"objects": [one | {"actions": {"upload": self.place(one["oid"])}} for one in objects]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    self.hub.files[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.hub.files[found[1]][value["path"]] = self.hub.large[value["oid"]]
                elif item["key"] == "deletedFile":
                    del self.hub.files[found[1]][value["path"]]
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.hub.url}/{found[1]}/commit/0"})
        else:
            self.answer({"error": "not found"}, 404)

    def place(self, oid: str) -> dict[str, str]:
        return {"href": f"{self.hub.url}/large/{oid}"}

    def do_PUT(self) -> None:  # http.server's name
        content = self.rfile.read(int(self.headers["content-length"]))
        if self.refused():
            return
        oid = self.path.removeprefix("/large/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self.answer({})


@pytest.fixture
def here() -> Iterator[Hub]:
    """A Hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield Handler.hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def online(here: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client goes there, with a token."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # whose server is another one
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield here
    huggingface_hub.close_session()


@pytest.fixture
def run(exported_run: Path, tmp_path: Path) -> Path:
    """An exported run with all that may lie in such a folder."""
    folder = tmp_path / "my run"
    shutil.copytree(exported_run, folder)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "state.safetensors").write_bytes(b"state")
    (folder / "onnx" / ".hidden").write_text("x")
    for name in ("notes.txt", ".env", "reviews.csv", "optimizer.safetensors"):
        (folder / name).write_text("mine")
    info = json.loads((folder / "headstart.json").read_text())
    info["notices"] = ["/home/me/t.csv: 1 text stands there with different labels (for example 'i was there')."]
    (folder / "headstart.json").write_text(json.dumps(info))
    return folder


SENT = {
    *("README.md", "config.json", "headstart.json", "metrics.json", "model.safetensors", "modeling_headstart.py"),
    *("onnx/export.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"),
}


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def test_what_is_needed_goes_byte_for_byte_and_nothing_else(
    run: Path, online: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("push", run, "user/name")
    sent = online.files["user/name"]
    assert set(sent) == SENT
    for name in SENT - {"headstart.json", "README.md"}:
        assert sent[name] == (run / name).read_bytes(), name
    assert set(online.large.values()) == {sent["model.safetensors"], sent["onnx/model.onnx"]}
    assert {token for path, token in online.tokens.items() if "large" not in path} == {"Bearer hf_secret"}
    assert online.private == set()
    assert [one for one in online.asked if "commit" in one] == ["POST /api/models/user/name/commit/main"], "one commit"
    assert capsys.readouterr().out.splitlines() == [
        f"Pushed    {online.url}/user/name",
        "Use       from transformers import pipeline",
        '          classify = pipeline("text-classification", "user/name", truncation=True, trust_remote_code=True)',
        '          classify("your text")',
    ]
    # What is there is a run folder, which says what it said.
    for name, content in sent.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    texts = ["the film was superb", "the waiter was rude"]
    for options in ({}, EXACT):
        before, after = (predict.load(one, **options).predict_proba(texts) for one in (run, tmp_path / "back"))
        assert (before == after).all()


def test_neither_texts_nor_folders_go(run: Path, online: Hub) -> None:
    info = json.loads((run / "headstart.json").read_text())
    places = [info["settings"][name] for name in ("data", "model", "out")]
    assert all(Path(place).is_absolute() for place in places), "or this test sees nothing"
    hub.push(hub.pack(run, "user/name"))
    sent = online.files["user/name"]
    for name in SENT - {"model.safetensors", "onnx/model.onnx", "tokenizer.json"}:
        for place in places:
            assert str(Path(place).parent).encode() not in sent[name], name
    there = json.loads(sent["headstart.json"])
    assert there["settings"]["data"] == Path(info["settings"]["data"]).name
    assert there["out"] == Path(info["out"]).name
    assert "notices" not in there
    kept = {name for name in info if name not in ("notices", "settings", "out")}
    assert {name: there[name] for name in kept} == {name: info[name] for name in kept}
    rows = (run / "predictions.csv").read_text().splitlines()[1:]
    texts = [row.split(",")[0] for row in rows]
    assert all(text.encode() not in content for text in texts for content in sent.values())


def test_texts_go_if_asked_for(run: Path, online: Hub) -> None:
    hub.push(hub.pack(run, "user/name", with_texts=True))
    sent = online.files["user/name"]
    assert set(sent) == SENT | {"predictions.csv", "report.html"}
    assert sent["predictions.csv"] == (run / "predictions.csv").read_bytes()
    assert json.loads(sent["headstart.json"])["notices"]
    info = json.loads((run / "headstart.json").read_text())
    assert html.escape(info["settings"]["data"]).encode() in (run / "report.html").read_bytes()
    assert str(Path(info["settings"]["data"]).parent).encode() not in sent["report.html"]


@pytest.mark.parametrize("folder", ['/home/it\'s <me> & "you"', "../clients/ACME", "/très/😒"])
def test_paths_lose_their_folders_however_they_are_written(folder: str) -> None:
    place = f"{folder}/x.csv"
    info = {"out": ".", "settings": {"data": place, "label": "a/b", "model": "user/name", "thaw": "0", "seed": 3}}
    places = hub.local_places(info | {"calibration": {"data": "hf://datasets/a/b/c.csv"}}, "user/name")
    assert places == {place}
    text = f"{json.dumps(place, ensure_ascii=False)} {report.filled('explain.html', explanation(place))} {place} a/b ."
    found = hub.without_folders(text.encode(), places).decode()
    assert folder not in found
    assert html.escape(folder) not in found
    assert found.startswith('"x.csv" ')
    assert found.endswith(" x.csv a/b .")


def explanation(text: str) -> dict[str, Any]:
    return {"text": text, "label": text, "confidence": 1.0, "words": [], "completeness_error": 0.0, "nearest": []}


def test_a_private_one_is_made_so_and_a_public_one_is_left_alone(run: Path, online: Hub) -> None:
    hub.push(hub.pack(run, "user/name", private=True))
    assert online.private == {"user/name"}
    hub.push(hub.pack(run, "user/name", private=True))
    online.private.clear()
    before = dict(online.files["user/name"])
    with pytest.raises(InputError, match="user/name: is there already, and public"):
        hub.push(hub.pack(run, "user/name", private=True))
    assert online.files["user/name"] == before


def test_what_an_earlier_push_left_there_goes_and_what_others_put_there_stays(run: Path, online: Hub) -> None:
    hub.push(hub.pack(run, "user/name", with_texts=True))
    online.files["user/name"]["their/notes.md"] = b"theirs"
    shutil.rmtree(run / "onnx")
    hub.push(hub.pack(run, "user/name"))
    assert set(online.files["user/name"]) == {name for name in SENT if "onnx" not in name} | {"their/notes.md"}
    assert sum("repos/create" in one for one in online.asked) == 1


def test_the_model_of_another_tool_is_not_replaced(run: Path, online: Hub) -> None:
    online.files["user/name"] = {"config.json": b"{}", "model.safetensors": b"theirs"}
    with pytest.raises(InputError, match=r"user/name: holds a model that headstart did not make\. Choose another name"):
        hub.push(hub.pack(run, "user/name"))
    assert online.files["user/name"] == {"config.json": b"{}", "model.safetensors": b"theirs"}


@pytest.mark.parametrize(
    ("refuses", "said"),
    [
        ({"/": 401}, "the Hub does not accept your token. Log in with one that may write: hf auth login"),
        ({"repos/create": 403}, "your token may not write there"),
        ({"commit": 403}, "your token may not write there"),
        ({"large": 403}, "your token may not write there"),
        ({"repos/create": 404}, "the Hub has no such place. Is USER you, or an organisation of yours?"),
        ({"repos/create": 409}, "the Hub refuses it (409: refused with 409)."),
        ({"validate-yaml": 400}, "the Hub refuses it (Invalid metadata in README.md.)."),
        ({"commit": 500}, "the Hub has a fault of its own (500). Try again later."),
        ({"api/models": 503}, "the Hub has a fault of its own (503). Try again later."),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    refuses: dict[str, int], said: str, run: Path, online: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    online.refuses = refuses
    with pytest.raises(SystemExit) as ended:
        main(["push", str(run), "user/name"])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith(f"headstart: user/name: {said}")
    assert len(printed.err.splitlines()) == 1
    assert not online.files.get("user/name"), "nothing has come"


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_it_says_so(offline: bool, run: Path, online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(InputError, match="user/name: the Hub cannot be reached") as caught:
            hub.push(hub.pack(run, "user/name"))
    assert len(str(caught.value).splitlines()) == 1
    assert ("HF_HUB_OFFLINE" in str(caught.value)) == offline


def test_without_a_token_it_says_how_to_get_one(
    run: Path, online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InputError, match=r"the Hub wants a token, and there is none on this machine.*hf auth login"):
        hub.push(hub.pack(run, "user/name"))
    assert online.asked == []


@pytest.mark.parametrize(
    "name",
    ["name", "", "a/b/c", "user/", "/name", "user/na me", "us--er/x", "user/x.git", "datasets/x", "spaces/x", "é/x"],
)
def test_what_is_no_name_on_the_hub_is_refused_at_once(name: str, run: Path) -> None:
    with pytest.raises(InputError, match=r"is no name for a model on the Hub\. Give USER/NAME") as caught:
        hub.pack(run, name)
    assert str(caught.value).startswith(f"{name}: ")


def test_what_is_no_run_folder_is_refused(run: Path, tmp_path: Path, elsewhere: Callable[..., Path]) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        hub.pack(tmp_path / "nowhere", "user/name")
    with pytest.raises(RunError, match=r"it has no headstart\.json"):
        hub.pack(elsewhere("bert"), "user/name")
    (run / "README.md").write_text("---\nmodel-index:\n- name: x\n---\n")
    with pytest.raises(InputError, match=r"README\.md: the Hub could not read this model card"):
        hub.pack(run, "user/name")
    (run / "README.md").write_text('---\na: "b\n---\n')
    with pytest.raises(InputError, match=r"README\.md: the Hub could not read this model card"):
        hub.pack(run, "user/name")
    (run / "model.safetensors").unlink()
    with pytest.raises(RunError, match="has no weights"):
        hub.pack(run, "user/name")


def test_a_dry_run_shows_what_would_go_and_asks_nobody(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(socket, "socket", None)  # nobody can be asked
    call("push", run, "user/name", "--private", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Would go  to user/name, private: 10 files, 1.1 MB; nothing was sent")
    shown = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines[1:11]}
    assert set(shown) == SENT
    assert shown["model.safetensors"] == (run / "model.safetensors").stat().st_size
    (stays,) = [line for line in lines if line.startswith("Stays")]
    kept = "checkpoint-5, notes.txt, optimizer.safetensors, predictions.csv, report.html, reviews.csv"
    assert stays == f"Stays     {kept}"
    assert any("show texts of the test part; they stay, but for --with-texts" in line for line in lines)
    card = lines[lines.index("Card") + 1 :]
    assert "          pipeline_tag: text-classification" in card
    assert any("model-index" in line for line in card)
    call("push", run, "user/name", "--with-texts", "--dry-run")
    told = capsys.readouterr().out
    assert "predictions.csv\n" in told
    assert "they would go" in told


def test_from_a_process_of_its_own(run: Path, here: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": here.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "headstart.cli", "push", str(run), "org/its.name", "--private"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Pushed    {here.url}/org/its.name (private)\n")
    assert set(here.files["org/its.name"]) == SENT
    assert here.private == {"org/its.name"}


# --- the card's metadata


def card_of(run: Path, out: str = "runs/x", **changed: Any) -> str:
    info, numbers = (json.loads((run / name).read_text()) for name in ("headstart.json", "metrics.json"))
    return report.told("card.md", info | {"out": out, "settings": info["settings"] | changed}, numbers)


def test_the_card_has_the_test_result_where_the_hub_looks(tiny_run: Path) -> None:
    card = ModelCard.load(tiny_run / "README.md")
    test = json.loads((tiny_run / "metrics.json").read_text())["test"]
    accuracy, f1 = card.data.eval_results
    assert card.data.model_name == "run"
    for one in (accuracy, f1):
        assert (one.task_type, one.dataset_type, one.dataset_name) == ("text-classification", "unknown", "small.csv")
        assert (one.dataset_split, one.verified) == ("test", False)
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", round(test["accuracy"], 4))
    assert (f1.metric_type, f1.metric_value) == ("f1", round(test["macro_f1"], 4))
    assert f1.metric_args == {"average": "macro"}
    assert card.data.base_model is None, "an encoder in a folder has no Hub id"
    assert card.data.datasets is None
    assert metadata_load(tiny_run / "README.md")["library_name"] == "headstart"


@pytest.mark.parametrize(
    ("model", "base"),
    [("minilm", "sentence-transformers/all-MiniLM-L6-v2"), ("user/model-x", "user/model-x"), ("/a/b", None)],
)
def test_the_card_names_an_encoder_of_the_hub(model: str, base: str | None, tiny_run: Path) -> None:
    assert ModelCard(card_of(tiny_run, model=model)).data.base_model == base


def test_the_card_names_tables_of_the_hub(tiny_run: Path) -> None:
    source = "hf://datasets/user/set-x@main/data/train.csv"
    card = ModelCard(card_of(tiny_run, data=source))
    assert card.data.datasets == ["user/set-x"]
    assert {(one.dataset_type, one.dataset_name) for one in card.data.eval_results} == {("user/set-x", "train.csv")}
    card = ModelCard(card_of(tiny_run, data=source, test="/home/me/test.csv"))
    assert card.data.datasets == ["user/set-x"]
    assert {(one.dataset_type, one.dataset_name) for one in card.data.eval_results} == {("unknown", "test.csv")}


NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\ufffe\uffff"), min_size=1).filter(
    lambda name: name.strip(".")
)


@settings(max_examples=100, deadline=None)
@given(
    name=NAME
    | st.sampled_from([HOSTILE, "---", "\n---\n", "a\nb: c", "null", "1.0", "yes", "{{ 7 * 7 }}", "- x", "&a *b"])
)
def test_whatever_a_file_is_called_the_metadata_are_whole(name: str, tiny_run: Path) -> None:
    data = ModelCard(card_of(tiny_run, out=f"/runs/{name}", data=f"/home/{name}")).data
    assert data.model_name == printable(name)
    assert {one.dataset_name for one in data.eval_results} == {printable(name)}
    assert (data.pipeline_tag, data.tags) == ("text-classification", ["text-classification", "headstart"])
