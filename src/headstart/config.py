"""Settings: the one source of every default. Only the standard library, so that `headstart --help` is quick."""

import dataclasses
import json
import operator
import os
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from headstart.errors import InputError, printable

Recipe = Literal["headstart", "article"]
HeadKind = Literal["auto", "native", "pooled"]
Calibration = Literal["temperature", "none"]
ClassWeight = Literal["auto", "balanced", "none"]
Problem = Literal["single", "multi", "ordered"]  # one label a text, any number of them, or one of ordered ones
ProblemChoice = Literal["auto", "single", "multi", "ordered"]
Long = Literal["truncate", "head-tail", "windows"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "mlflow", "trackio", "wandb"]

MIN_ROWS = 10  # fewer rows than this cannot be split, trained on and tested with any meaning
FEATURE_BYTES_PER_TEXT = 8_000  # what the store may keep of one text; decides how many layers of a wide encoder
CACHE_MAX_BYTES = 5 * 1024**3  # the store's size cap; HEADSTART_CACHE_MAX_BYTES overrides it


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of `headstart train`. Make one with `settings`, which applies the recipe."""

    data: str  # The table to learn from: a path, an hf://datasets address, or `sample`.
    validation: str | None = None  # A table for choosing epochs and heads; without it a part of `data` is kept back.
    test: str | None = None  # A table used once, at the end; without it a part of `data` is kept back.
    text: str | None = None  # The column with the text; None: `sentence`, or another usual name when only one is there.
    label: str | None = None  # The column with the label; None: `label`, or another usual name when only one is there.
    label_names: tuple[str, ...] | None = None  # Names to show instead of the labels, in label order.
    # How many labels a text has: one, any number of several, or one of ordered ones, as stars; `auto`: by the column.
    problem: ProblemChoice = "auto"
    recipe: Recipe = "headstart"  # The named set of defaults that this run started from.
    model: str = "minilm"  # The encoder: `minilm` (embedded), a Hub id, or a folder.
    # How many of the top layers are trained after the head; `all`: embeddings, too; `auto`: what fits the time budget.
    thaw: str = "auto"
    time_budget: float = 600.0  # Seconds that `--thaw auto` may spend on fine-tuning.
    store: bool = True  # Keep the frozen layers' hidden states on disk while those above are trained; else recompute.
    dry_run: bool = False  # Predict what each depth would cost, and train nothing but the head.
    checkpoint_minutes: float = 10.0  # Minutes between checkpoints of fine-tuning; one at each epoch's end as well.
    keep_checkpoints: bool = False  # Leave the last checkpoints in the run folder.
    resume: bool = False  # Go on from the newest whole checkpoint in the run folder.
    head: HeadKind = "auto"  # `pooled`: on layers' means; `native`: the architecture's own; `auto`: pooled if frozen.
    head_features: tuple[str, ...] | None = None  # What a pooled head reads: `pooler`, `cls`, `mean-K`; None: picked.
    head_width: int | None = None  # Width of a pooled head's hidden layer, 0 for none; None: picked on validation data.
    head_dropout: float | None = None  # Dropout in a pooled head's hidden layer; None: picked on validation data.
    trials: int | None = None  # How many heads optuna tries; None: the built-in search of a few dozen.
    folds: int | None = None  # Cross-validate in so many folds, then train the final head on all but the test part.
    # Most epochs; None: 60 of a head, 3 to 6 of fine-tuning. With a thaw, this and the steps' settings are its.
    epochs: int | None = None
    max_steps: int | None = None  # Fine-tuning ends after so many steps; None: with the last epoch.
    patience: int | None = 4  # Stop after this many epochs without a better validation loss; None: never.
    batch_size: int | None = None  # Texts a training step; None: an eighth of the texts trained on, from 32 to 512.
    lr: float | None = None  # AdamW's learning rate; None: picked on validation data.
    weight_decay: float | None = None  # AdamW's weight decay; None: picked on validation data.
    clip_norm: float = 1.0  # Largest gradient norm.
    max_length: int | None = None  # Tokens kept of a text, special ones too; None: from the training texts' lengths.
    long: Long = "truncate"  # Read of a longer text: its beginning, beginning and end, or windows over it.
    # In the loss: `balanced`: each class counts alike; `none`: each text; `auto`: balanced, but not several or stars.
    class_weight: ClassWeight = "auto"
    calibration: Calibration = "temperature"  # Divides logits by what validation data says, in the head's last layer.
    seed: int = 2021  # Decides the split, the first weights and the order of batches.
    device: Device = "auto"  # Where tensors live.
    precision: Precision = "auto"  # Number format of the frozen encoder.
    report_to: tuple[Tracker, ...] = ()  # Experiment trackers that are told each epoch and the result.
    out: str | None = None  # The run folder; None: runs/NAME, from the name of the data.
    overwrite: bool = False  # Replace a run folder that is there.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name))
        article, native, pooled = self.recipe == "article", self.head == "native", self.head == "pooled"
        thawed, fixed = self.thaw != "0", article or native or self.thaw not in ("0", "auto")
        problems = {
            f"--thaw {self.thaw} does not go with --folds.": thawed and self.folds,
            f"--thaw {self.thaw} does not go with --head pooled.": thawed and pooled,
            "--overwrite starts anew and --resume goes on: give one of them.": self.overwrite and self.resume,
            "--recipe article has a head of its own: leave out --head native.": article and native,
            "--trials does not go with --recipe article, --head native or a given --thaw.": self.trials and fixed,
        }
        for problem, there in problems.items():
            if there:
                raise InputError(problem)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Every setting of `headstart serve`, but for the run folder."""

    host: str = "127.0.0.1"  # The address to listen on; others than this machine's own should come with a key.
    port: int = 8080  # 0: any that is free.
    api_key_env: str | None = None  # The environment variable with the key that clients must send.
    min_confidence: float = 0.0  # Below it, `abstain` comes before the labels.
    max_body_bytes: int = 2_000_000  # Of a request.
    max_batch: int = 32  # Texts a request.
    max_waiting: int = 512  # Texts that wait for an answer; a request for more is refused at once.
    max_connections: int = 1000  # Open ones; one more is refused at once.
    timeout: float = 30.0  # Seconds for an answer, once a request is there.
    read_timeout: float = 10.0  # Seconds for a request's headers to come, and for its body.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("host", "api_key_env", "port", "min_confidence") and value <= 0:
                raise InputError(f"--{field.name.replace('_', '-')} must be more than 0, and {value} was given.")
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"--min-confidence takes a number from 0 to 1, and {self.min_confidence} was given.")
        if not 0 <= self.port < 65536:
            raise InputError(f"--port takes a number from 0 to 65535, and {self.port} was given.")

    @property
    def most_texts(self) -> int:
        """Texts a request, for all of which there has to be a place."""
        return min(self.max_batch, self.max_waiting)


RECIPES: dict[Recipe, dict[str, Any]] = {  # what each changes of the defaults above
    "headstart": {},
    "article": {
        "model": "bert-base-uncased",
        "max_length": 17,
        "thaw": "0",
        "head": "pooled",
        "head_features": ("pooler",),
        "head_width": 512,
        "head_dropout": 0.2,
        "epochs": 10,
        "patience": None,
        "batch_size": 32,
        "lr": 1e-5,
        "weight_decay": 0.01,  # AdamW's own default
        "class_weight": "balanced",
        "calibration": "none",
    },
}


FIELDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
SPOKEN: dict[str, Any] = {"max_length": Literal["auto"], "thaw": int, "time_budget": str}  # other types that are taken
HUGGING_FACE = {  # what its scripts call a setting, where that is another name
    **{"validation": "validation_file", "test": "test_file", "text": "text_column_name", "label": "label_column_name"},
    **{"model": "model_name_or_path", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"},
    **{"lr": "learning_rate", "max_length": "max_seq_length", "out": "output_dir", "overwrite": "overwrite_output_dir"},
    "resume": "resume_from_checkpoint",
}
ABOVE_0 = ("epochs", "max_steps", "patience", "trials", "batch_size", "lr", "clip_norm", "time_budget")
LIMITS: dict[str, dict[str, Any]] = {  # in the words of JSON Schema: train.schema.json is made from them
    **{name: {"exclusiveMinimum": 0} for name in (*ABOVE_0, "checkpoint_minutes")},
    "weight_decay": {"minimum": 0},
    "head_width": {"minimum": 0},
    "head_dropout": {"minimum": 0, "maximum": 1},
    "max_length": {"minimum": 4},
    "folds": {"minimum": 2},
    "seed": {"minimum": 0, "maximum": 2**32 - 1},
}
MEANINGS = {
    "exclusiveMinimum": ("more than", operator.gt),
    "minimum": ("at least", operator.ge),
    "maximum": ("at most", operator.le),
}
THAW, DURATION = r"auto|all|0|0*[1-9][0-9]*", r"(\d+(?:\.\d+)?)([smh]?)"
TYPES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def check(name: str, value: Any) -> None:
    """An `InputError` if a setting cannot have this value, by its type and limits."""
    option = f"--{name.replace('_', '-')}"
    _check_type(option, value, kinds(name), SPOKEN.get(name))
    if name == "thaw" and not re.fullmatch(THAW, value):
        raise InputError(f"--thaw takes a number of layers, all, auto or 0, not {value!r}.")
    for limit, bound in LIMITS.get(name, {}).items() if value is not None else ():
        words, holds = MEANINGS[limit]
        if not holds(value, bound):
            raise InputError(f"{option} must be {words} {bound}, and {value} was given.")


def kinds(name: str) -> tuple[Any, ...]:
    """The types that the value of a setting may have."""
    kind = FIELDS[name]
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _check_type(option: str, value: Any, kinds: tuple[Any, ...], spoken: Any = None) -> None:
    several = [get_args(kind)[:1] for kind in kinds if get_origin(kind) is tuple]
    if several and isinstance(value, tuple):
        for one in value:
            _check_type(option, one, several[0])
    elif not any(_is(value, kind) for kind in kinds):
        takes = [_words(kind) for kind in (spoken, *kinds) if kind not in (None, NoneType)]
        shown = str(value) if hasattr(value, "isoformat") else repr(value)  # TOML has dates
        raise InputError(f"{option} takes {' or '.join(takes)}, not {shown}.")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        kind = (int, float)
    return get_origin(kind) is not tuple and isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of {_words(get_args(kind)[0]).replace('a string', 'strings')}"
    return TYPES[kind]


def understood(name: str, given: Any) -> Any:
    """What a person gave as a setting, as its field has it; an `InputError` if there is no such setting, or it cannot.

    Taken are also a string for several with commas (`none` for none of them), a list for a tuple, a path for a string,
    numpy's numbers, and what `SPOKEN` has.
    """
    if name not in FIELDS:
        import difflib

        alike = difflib.get_close_matches(name, FIELDS, n=1)
        near = [one for one, other in HUGGING_FACE.items() if other == name] or alike
        hint = f"Did you mean {near[0]!r}?" if near else f"The settings are: {', '.join(sorted(FIELDS))}."
        raise InputError(f"There is no setting {name!r}. {hint}")
    value = given.item() if getattr(given, "shape", None) == () else given
    several = any(get_origin(kind) is tuple for kind in kinds(name))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif several and isinstance(value, str):
        value = tuple(value.split(",")) if value != "none" else ()
    elif several and isinstance(value, list):
        value = tuple(value)
    elif name == "thaw" and type(value) is int:
        value = str(value)
    elif name == "time_budget" and isinstance(value, str):
        if not (found := re.fullmatch(DURATION, value)):
            raise InputError(f"--time-budget takes seconds, or a number with s, m or h, not {value!r}.")
        value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
    elif name == "max_length" and value == "auto":
        value = None
    check(name, value)
    return value


def settings(data: str, recipe: Recipe = "headstart", **given: Any) -> TrainConfig:
    """The settings of one run: the defaults, then the recipe's, then what is given (`max_length="auto"`: as advised).

    None counts as not given. An unknown recipe or setting, or a value out of range, is an `InputError`.
    """
    asked = {name: value for name, value in given.items() if value is not None or name not in FIELDS}
    chosen = {name: understood(name, value) for name, value in {"data": data, "recipe": recipe, **asked}.items()}
    if chosen.get("folds") or chosen.get("head") == "pooled":
        chosen.setdefault("thaw", "0")  # only the architecture's own head is fine-tuned, and once
    return TrainConfig(**{**RECIPES[recipe], **chosen})


PLACES = ("data", "out", "overwrite", "resume", "dry_run")  # settings of one call, not of what it makes
STEPS = ("epochs", "max_steps", "lr", "batch_size", "weight_decay")


def from_file(name: str) -> dict[str, Any]:
    """The settings in a .toml file, or those behind RUN/headstart.json, at the depth that was kept.

    Hugging Face's names are known, too. An `InputError` tells all that is no setting, or cannot be its value.
    """
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
        found = json.loads(text) if name.endswith(".json") else tomllib.loads(text)
        aside: tuple[str, ...] = ("data",)
        if name.endswith(".json"):
            info, found, aside = found, found["settings"], (*PLACES, "report_to")
            asked, found["thaw"] = found["thaw"], info["thaw"]["kept"]
            if found["thaw"] == "0" != asked:
                aside += STEPS  # they were fine-tuning's, which was not kept
                found["head"] = found["head"] if asked == "auto" else "native"
            elif found["thaw"] != "0":
                found["max_steps"], found["trials"] = info["thaw"].get("steps") or found.get("max_steps"), None
            found["max_length"] = found["max_length"] or "auto"  # a recipe may have another default
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--config {name}: cannot be read as settings ({error!r}).") from error
    problems, chosen = [], dict[str, Any]()
    for key, value in found.items():
        field = next((one for one, other in HUGGING_FACE.items() if other == key), key)
        try:
            if field in chosen:
                raise InputError(f"{key} is {field} by another name: give one of them.")
            if value is not None:
                understood(field, value)
        except InputError as error:
            problems.append(f"--config {name}: {error}")
        chosen[field] = tuple(value) if isinstance(value, list) else value
    if problems:
        raise InputError("\n".join(problems))
    return {field: value for field, value in chosen.items() if field not in aside}


def as_toml(config: TrainConfig, place: Path) -> str:
    """What `--config` reads from a .toml file at `place` as the same settings, but for those of one call, explained."""
    import tomli_w

    schema, folder = Path(__file__).with_name("train.schema.json"), place.absolute().parent
    where = os.path.relpath(schema, folder) if schema.drive == folder.drive else schema
    found = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACES}
    found["max_length"] = found["max_length"] or "auto"  # a recipe may have another default
    meanings = json.loads(schema.read_text(encoding="utf-8"))["properties"]
    command = f"headstart train {shlex.quote(printable(config.data))} --config {shlex.quote(printable(place.name))}"
    lines = [f"#:schema {Path(where).as_posix()}", f"# {command}"]
    for name, value in found.items():
        said = f"# {name} =" if value is None else tomli_w.dumps({name: value}).strip()
        lines += ["", f"# {meanings[name]['description']}", said]
    return "\n".join((*lines, ""))
