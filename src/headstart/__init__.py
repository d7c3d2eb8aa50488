"""headstart: a person's own labelled text in, a tested BERT classifier out.

Importing this does no work; torch and transformers are imported when something is trained or loaded.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from headstart.estimator import Encoder, TextClassifier
    from headstart.predict import Predictor
    from headstart.run import Run

__all__ = ["Encoder", "TextClassifier", "load", "train"]


def train(data: str, *, out: str | None = None, **settings: Any) -> "Run":
    """Train a classifier on a table, test it, and write its run folder: `out`, or runs/NAME.

    `data` is a path, an hf://datasets address, or `sample`; `settings` are fields of `headstart.config.TrainConfig`,
    `recipe` among them. What cannot be used is a `headstart.errors.InputError` that says how to mend it.
    """
    from headstart import config, run

    return run.train(config.settings(data, out=out, **settings))


def load(run: "str | Path") -> "Predictor":
    """Load a run folder: `load("run").predict(["a text"])`; a `headstart.errors.RunError` if it is none or damaged."""
    from headstart import predict

    return predict.load(run)


class _Package(ModuleType):
    """Keeps `headstart.train` the function: importing the room of that name would set the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """The estimators, when they are first asked for: they bring scikit-learn and torch."""
        if name not in ("Encoder", "TextClassifier"):
            raise AttributeError(f"module 'headstart' has no attribute {name!r}")
        from headstart import estimator

        return getattr(estimator, name)


sys.modules[__name__].__class__ = _Package
