"""A run folder on the Hugging Face Hub, and nothing with it that its owner may not want to be seen.

This room knows which files go, what is taken out of them, and what the Hub may answer. It is a face: the command line
alone calls it.
"""

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from markupsafe import escape

from headstart.errors import InputError, RunError
from headstart.runs import read_json

WEIGHTS = "model*.safetensors"
GOES = (
    *("config.json", WEIGHTS, "model.safetensors.index.json", "modeling_headstart.py", "tokenizer.json"),
    *("tokenizer_config.json", "headstart.json", "metrics.json", "README.md", "onnx/*"),
)
TEXTS = ("predictions.csv", "report.html")  # they show texts of the test part, and go only if asked for
WRITTEN = (".json", ".md", ".html")  # what may name a place on this machine
TIMEOUT = 10  # seconds for the Hub to answer at all
REFUSALS = {
    401: "the Hub does not accept your token. Log in with one that may write: hf auth login",
    403: "your token may not write there. Choose a name of your own, or a token that may: hf auth login",
    404: "the Hub has no such place. Is USER you, or an organisation of yours?",
}


@dataclass(frozen=True)
class Upload:
    """What would go to the Hub: each file's name there, with its bytes, or where they are if they go as they are.

    `kept` are names of what stays, `card` the model card's metadata, as YAML.
    """

    repo: str
    private: bool
    files: dict[str, bytes | Path]
    kept: tuple[str, ...]
    card: str
    runs_code: bool  # transformers needs leave to run modeling_headstart.py

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in self.files.items()}


def pack(run: Path, repo: str, *, private: bool = False, with_texts: bool = False) -> Upload:
    """What of a run folder goes to the repository USER/NAME; no network is needed.

    Paths lose their folders. A `RunError` if it is no run folder, an `InputError` if the Hub can have no such
    repository, or could not read the model card.
    """
    from huggingface_hub import ModelCard

    check_name(repo)
    info, config = read_json(run, "headstart.json"), read_json(run, "config.json")
    if not any(run.glob(WEIGHTS)):
        raise RunError(f"{run}: has no weights ({WEIGHTS}).")
    if not (run / "README.md").is_file():
        raise InputError(f"{run}: has no model card (README.md). headstart train and headstart calibrate write one.")
    try:
        card = ModelCard.load(run / "README.md").data
    except Exception as error:  # of the disk, of YAML, of what it should say
        raise InputError(f"{run / 'README.md'}: the Hub could not read this model card ({one_line(error)}).") from error
    patterns = (*GOES, *TEXTS) if with_texts else GOES
    found = [path for pattern in patterns for path in sorted(run.glob(pattern)) if path.is_file()]
    names = {path.relative_to(run).as_posix(): path for path in found if path.name[0] != "."}
    places = local_places(info, card.get("base_model"))
    files: dict[str, bytes | Path] = dict(names)
    for name, path in names.items():
        if path.suffix in WRITTEN and path.name != "tokenizer.json":
            files[name] = without_folders(path.read_bytes(), places)
    if not with_texts and info.pop("notices", None):  # some quote a text
        written = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
        files["headstart.json"] = without_folders(written.encode(), places)
    tops = {name.split("/")[0] for name in files}
    kept = (path.name for path in sorted(run.iterdir()) if path.name not in tops and path.name[0] != ".")
    return Upload(repo, private, files, tuple(kept), card.to_yaml(), config.get("model_type") == "headstart")


def check_name(repo: str) -> None:
    """Refuse, by an `InputError`, what is no USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1 or repo.startswith(("datasets/", "spaces/")):
            raise HFValidationError("a model's name has two parts")
    except HFValidationError as error:
        how = "Give USER/NAME: letters, digits, '-', '_' and '.'."
        raise InputError(f"{repo}: is no name for a model on the Hub. {how}") from error


def local_places(info: dict[str, Any], base_model: str | None) -> set[str]:
    """The paths that headstart.json names: settings but for columns and a Hub id, where the run was, what it read."""
    settings = {name: one for name, one in info.get("settings", {}).items() if name not in ("text", "label")}
    named = [*settings.values(), info.get("out"), info.get("calibration", {}).get("data")]
    paths = {one for one in named if isinstance(one, str) and "://" not in one and one != base_model}
    return {one for one in paths if Path(one).name not in ("", one)}


def without_folders(content: bytes, places: set[str]) -> bytes:
    """UTF-8 in which each of those paths is but its last part, also where it is escaped for JSON or a page."""
    for place in sorted(places, key=len, reverse=True):
        for written in (place, json.dumps(place, ensure_ascii=False)[1:-1], str(escape(place))):
            content = content.replace(written.encode(), Path(place).name.encode())
    return content


def push(upload: Upload) -> str:
    """Send it in one commit, which also deletes what an earlier push has left there, and return the address.

    An `InputError` says why the Hub does not take it, or that it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    version, repo = importlib.metadata.version("headstart"), upload.repo
    if not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(repo):
        api = HfApi(library_name="headstart", library_version=version)
        if get_token() is None:
            how = f"Make one that may write at {api.endpoint}/settings/tokens, then: hf auth login"
            raise InputError(f"{repo}: the Hub wants a token, and there is none on this machine. {how}")
        there: set[str] = set()
        try:
            found = api.model_info(repo, timeout=TIMEOUT)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=upload.private or None)
        else:
            there = {one.rfilename for one in found.siblings or ()}
            if upload.private and not found.private:
                raise InputError(f"{repo}: is there already, and public. Make it private in its settings, or rename.")
        if "config.json" in there and "headstart.json" not in there:
            raise InputError(f"{repo}: holds a model that headstart did not make. Choose another name.")
        ours = {name for name in there if any(fnmatch(name, pattern) for pattern in (*GOES, *TEXTS))}
        deleted = [CommitOperationDelete(name) for name in sorted(ours - upload.files.keys())]
        added = [CommitOperationAdd(name, one) for name, one in upload.files.items()]
        api.create_commit(repo, [*deleted, *added], commit_message=f"Pushed by headstart {version}")
    return f"{api.endpoint}/{repo}"


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn the Hub's refusals inside the block, and its silence, into an `InputError` about a repository."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whichever client error a missing network gives
        cause = error.__cause__ or error if type(error) is RuntimeError else error  # so those of one file are wrapped
        why = f"the Hub cannot be reached ({type(cause).__name__}: {one_line(cause)})."
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            why = f"the Hub refuses it ({status}: {one_line(cause.server_message or cause)})."
            why = f"the Hub has a fault of its own ({status}). Try again later." if status >= 500 else why
            why = REFUSALS.get(status, why)
        elif isinstance(cause, ValueError):
            why = f"the Hub refuses it ({one_line(cause)})."
        raise InputError(f"{repo}: {why}") from error


def one_line(error: object) -> str:
    """What an error says, in one line that is not long."""
    return " ".join(str(error).split())[:200]
