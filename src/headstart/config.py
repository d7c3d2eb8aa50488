"""Settings: the one source of every default, for the command line, Python and the run folder.

This room knows no library but the standard one, so that `headstart --help` is quick.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from headstart.errors import InputError

Recipe = Literal["headstart", "article"]
HeadKind = Literal["auto", "native", "pooled"]
ClassWeight = Literal["balanced", "none"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

MIN_ROWS = 10
"""Fewer rows than this cannot be split, trained on and tested with any meaning."""

FEATURE_BYTES_PER_TEXT = 8_000
"""What the store may keep of one text on disk; decides how many layers are kept of a wide encoder."""

CACHE_MAX_BYTES = 5 * 1024**3
"""The store's size cap; HEADSTART_CACHE_MAX_BYTES overrides it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of `headstart train`. Make one with `settings`, which applies the recipe."""

    data: str
    """The table to learn from: a path, an hf://datasets address, or `sample`."""
    validation: str | None = None
    """A table for choosing epochs and heads; without it a part of `data` is kept back."""
    test: str | None = None
    """A table used once, at the end; without it a part of `data` is kept back."""
    text: str | None = None
    """The column with the text; None: `sentence`, or another usual name when only one is there."""
    label: str | None = None
    """The column with the label; None: `label`, or another usual name when only one is there."""
    label_names: tuple[str, ...] | None = None
    """Names to show instead of the labels, in label order."""
    recipe: Recipe = "headstart"
    """The named set of defaults that this run started from."""
    model: str = "minilm"
    """The encoder: `minilm` (embedded), a Hub id, or a folder."""
    thaw: Literal["0"] = "0"
    """How many encoder layers are trained; 0: the encoder stays frozen."""
    head: HeadKind = "auto"
    """`pooled`: on means over layers; `native`: the architecture's own; `auto`: pooled while frozen."""
    head_features: tuple[str, ...] | None = None
    """What a pooled head reads: `pooler`, `cls`, `mean-K`; None: picked on validation data."""
    head_width: int | None = None
    """Width of a pooled head's hidden layer, 0 for none; None: picked on validation data."""
    head_dropout: float = 0.2
    """Dropout in a pooled head's hidden layer."""
    trials: int | None = None
    """How many heads optuna tries; None: the built-in search of a few dozen."""
    folds: int | None = None
    """Cross-validate in so many folds, then train the final head on all but the test part."""
    epochs: int = 60
    """Most epochs of the head stage."""
    patience: int | None = 4
    """Stop after this many epochs without a better validation loss; None: never."""
    batch_size: int | None = None
    """Texts a training step; None: an eighth of the texts trained on, from 32 to 512."""
    lr: float | None = None
    """AdamW's learning rate; None: picked on validation data."""
    weight_decay: float | None = None
    """AdamW's weight decay; None: picked on validation data."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    max_length: int | None = None
    """Tokens kept of a text, special ones included; None: read off the training texts' lengths."""
    class_weight: ClassWeight = "balanced"
    """`balanced`: each class counts alike in the loss (scikit-learn's formula); `none`: each text does."""
    seed: int = 2021
    """Decides the split, the first weights and the order of batches."""
    device: Device = "auto"
    """Where tensors live."""
    precision: Precision = "auto"
    """Number format of the frozen encoder."""
    out: str | None = None
    """The run folder; None: runs/NAME, from the name of the data."""
    overwrite: bool = False
    """Replace a run folder that is there."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "clip_norm", "patience", "trials")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} must be more than 0, and {value} was given.")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise InputError(f"--weight-decay must not be negative, and {self.weight_decay} was given.")
        if self.max_length is not None and self.max_length < 4:
            raise InputError(
                f"--max-length must be at least 4 tokens (two are special ones), and {self.max_length} was given."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be from 0 to 4294967295, and {self.seed} was given.")
        kinds = {
            "recipe": Recipe,
            "head": HeadKind,
            "class_weight": ClassWeight,
            "device": Device,
            "precision": Precision,
        }
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise InputError(f"--{name.replace('_', '-')} takes {known}, not {getattr(self, name)!r}.")
        if str(self.thaw) != "0":
            raise InputError(f"--thaw takes 0 (the encoder stays frozen), not {self.thaw!r}.")
        if self.folds is not None and self.folds < 2:
            raise InputError(f"--folds must be at least 2, and {self.folds} was given.")
        if self.recipe == "article" and self.head == "native":
            raise InputError("--recipe article has a head of its own: leave out --head native.")
        if self.trials is not None and (self.recipe == "article" or self.head == "native"):
            raise InputError("--trials searches pooled heads: leave out --recipe article and --head native.")

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain JSON types."""
        return dataclasses.asdict(self)


RECIPES: dict[Recipe, dict[str, Any]] = {
    "headstart": {},
    "article": {
        "model": "bert-base-uncased",
        "max_length": 17,
        "head": "pooled",
        "head_features": ("pooler",),
        "head_width": 512,
        "head_dropout": 0.2,
        "epochs": 10,
        "patience": None,
        "batch_size": 32,
        "lr": 1e-5,
        "weight_decay": 0.01,  # AdamW's own default
        "clip_norm": 1.0,
        "class_weight": "balanced",
    },
}
"""What each recipe changes of the defaults above."""


def settings(data: str, recipe: Recipe = "headstart", **given: Any) -> TrainConfig:
    """The settings of one run: the defaults, then the recipe's, then what was given.

    Args:
        data: the table to learn from.
        recipe: a key of `RECIPES`.
        given: fields of `TrainConfig`; None counts as not given. `max_length="auto"` is the advised length, where
            a recipe has another.

    Raises:
        InputError: an unknown recipe or setting, or a value out of range.
    """
    if recipe not in RECIPES:
        raise InputError(f"--recipe takes {', '.join(RECIPES)}, not {recipe!r}.")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(given) - known):
        raise InputError(f"There is no setting {unknown[0]!r}. The settings are: {', '.join(sorted(known))}.")
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("max_length") == "auto":
        chosen["max_length"] = None
    return TrainConfig(data=data, recipe=recipe, **{**RECIPES[recipe], **chosen})
