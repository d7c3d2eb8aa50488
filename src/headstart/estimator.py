"""The scikit-learn face: `TextClassifier`, and `Encoder` for features alone, of texts from memory.

This room knows scikit-learn's contract, and turns what it is given into a `Dataset` for the rooms that train. It knows
nothing of how they do it.
"""

import contextlib
import copy
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils import check_consistent_length, check_random_state, compute_sample_weight
from sklearn.utils.validation import check_is_fitted, validate_data

from headstart import data, judge, metrics, prepare, report, run
from headstart.checkpoints import check_out
from headstart.config import FIELDS, TrainConfig, check, settings
from headstart.data import Dataset, Splits
from headstart.encoder import choose_placement
from headstart.errors import ArgumentError, DataError
from headstart.folders import new_folder
from headstart.inputs import classes_of, labels_in, names_of, sample_weights, texts_in
from headstart.model import head_inputs, rescale, save_model
from headstart.predict import decide, probabilities_of
from headstart.recent import FrozenScorer, Kept, Logits, kept_encoder, scorer_of
from headstart.runs import HUB_FILES, read_about, read_json
from headstart.trials import TrainedHead

IN_MEMORY = "(in memory)"  # where the texts come from, in headstart.json
Json = dict[str, Any]


def held_out(dataset: Dataset, share: float, seed: int) -> Splits:
    """A stratified part kept for choosing, and no test part.

    Where a label has too few rows, but for copies, to be on both sides, or the share is 0, heads and epochs are chosen
    on the training texts themselves.
    """
    nothing = dataset.take(np.empty(0, np.int64))
    with contextlib.suppress(DataError):
        if share:
            parts = data.split(dataset, None, nothing, seed=seed, duplicates="together", held=share)
            if dataset.problem == "multi" or all(part.counts.all() for part in parts[:2]):
                return parts
    return Splits(dataset, dataset, nothing)


class TextInput(BaseEstimator):
    """What both estimators take: texts, as a column or alone."""

    def _texts(self, X: Any, *, reset: bool) -> list[str]:
        """The texts; of a column its name is noted with `reset`, else it has to be the one noted."""
        texts = texts_in(X)
        if reset:
            for noted in ("n_features_in_", "feature_names_in_"):
                self.__dict__.pop(noted, None)
        if len(getattr(X, "shape", ())) == 2 and (reset or hasattr(self, "n_features_in_")):
            validate_data(self, X, reset=reset, skip_check_array=True)
        return texts

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


class TextClassifier(ClassifierMixin, TextInput):
    """A classifier of texts: a head on a pretrained encoder, and, as `thaw` says, the encoder's upper layers.

    The encoder runs once over each text; every later head, fold and candidate of a search is trained, and scored, on
    what it produced, which stays on disk and, of texts seen lately, in memory. Parameters not described here are those
    of `headstart.config.TrainConfig`, by the same name and with the same default.

    Args:
        thaw: how many of the encoder's upper layers are trained after the head: 0, a number, `all`, or `auto`: as many
            as fit `time_budget`, in seconds, if that is better on held-out texts.
        class_weight: `balanced`, None, a weight for each class, or `auto`: balanced with one label a text.
        validation_fraction: the share of the texts, stratified, that is kept off for choosing heads and epochs, and for
            calibration. Where a class has too few of them for that, or with 0, the choice is made on the training
            texts, and probabilities are not calibrated.
        random_state: an int, or a RandomState, from which a number is drawn; None: headstart's own seed, so that two
            fits give the same result.

    After `fit`: `classes_`, sorted as by `np.unique`; `features_`, how many distinct texts were encoded, and how many
    of them were there already; `metrics_`, as in a run folder's metrics.json, without a test part; `n_features_in_` and
    `feature_names_in_`, where texts came as a column of a table.

    Ctrl-C while fitting leaves the best so far, and is then passed on.
    """

    _info: Json  # headstart.json
    _learnt: Any  # what was trained here, and its encoder; None where it was read
    _files: Any  # else the files of a run folder
    _scorer: Any  # what makes logits; None before it is needed where it was read

    def __init__(
        self,
        *,
        model: str = TrainConfig.model,
        thaw: int | str = TrainConfig.thaw,
        time_budget: float | str = TrainConfig.time_budget,
        head: str = TrainConfig.head,
        head_features: Sequence[str] | None = TrainConfig.head_features,
        head_width: int | None = TrainConfig.head_width,
        head_dropout: float | None = TrainConfig.head_dropout,
        trials: int | None = TrainConfig.trials,
        epochs: int | None = TrainConfig.epochs,
        max_steps: int | None = TrainConfig.max_steps,
        patience: int | None = TrainConfig.patience,
        batch_size: int | None = TrainConfig.batch_size,
        lr: float | None = TrainConfig.lr,
        weight_decay: float | None = TrainConfig.weight_decay,
        clip_norm: float = TrainConfig.clip_norm,
        max_length: int | None = TrainConfig.max_length,
        long: str = TrainConfig.long,
        class_weight: str | Mapping[Any, float] | None = TrainConfig.class_weight,
        calibration: str = TrainConfig.calibration,
        validation_fraction: float = 0.15,
        random_state: int | np.random.RandomState | None = None,
        device: str = TrainConfig.device,
        precision: str = TrainConfig.precision,
    ) -> None:
        given = dict(locals())  # parameters are stored as they are, as scikit-learn asks
        del given["self"]
        self.__dict__ |= given

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Train on n texts: a list, an array, a Series or a table of one column, of any library.

        `y` are (n,) classes, or an (n, labels) indicator matrix where a text may have several labels; `sample_weight`
        are (n,) weights in the loss, and texts of weight 0 are left out. Two texts of different classes are the least.
        What cannot be used is an `ArgumentError`, which is a ValueError, or another `InputError`.
        """
        begun = time.perf_counter()
        if not isinstance(self.validation_fraction, (int, float)) or not 0 <= self.validation_fraction < 1:
            raise ArgumentError(f"validation_fraction takes a share from 0 to below 1, not {self.validation_fraction}.")
        dataset, classes, class_weight = self._labelled(X, y, sample_weight)
        seed = TrainConfig.seed if self.random_state is None else self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(2**31)
        given = {name: one for name, one in self.get_params(deep=False).items() if name in FIELDS}
        given["class_weight"] = class_weight
        if self.head == "pooled" and self.thaw == TrainConfig.thaw:
            given["thaw"] = None  # not given, so that the head decides it
        config = settings(IN_MEMORY, seed=int(seed), **given)
        config = dataclasses.replace(config, patience=self.patience)  # None: never
        splits = held_out(dataset, self.validation_fraction, config.seed)
        if splits.validation is dataset:
            config = dataclasses.replace(config, calibration="none")
        kept = kept_encoder(config.model, choose_placement(config.device, config.precision))
        ready = prepare.ready(splits, dataset.names, config, kept.encoder, kept.features)
        seconds = {**ready.seconds, "train": 0.0}
        with prepare.measured(seconds, "train"), tempfile.TemporaryDirectory(prefix="headstart-") as work:
            learnt = run.learn(ready, config, Path(work) / "run", lambda said: None)
        held = learnt.validation_logits.double().numpy()
        calibration, thresholds = judge.calibrated(held, splits.validation, config.calibration)
        rescale(learnt.module, *calibration)
        numbers: Json = {"stages": [run.stage_record(*stage) for stage in learnt.stages.items()]}
        numbers["calibration"] = {"method": config.calibration, **calibration.described()}
        if splits.validation is not dataset:
            said, truth = probabilities_of(calibration(held), dataset.problem), splits.validation.labels
            numbers["validation"] = metrics.evaluate(said, truth, dataset.names, dataset.problem, thresholds)
        numbers["features"] = ready.features.cost()
        numbers["timing"] = {**seconds, "total": time.perf_counter() - begun}
        self.metrics_, self.features_ = numbers, numbers["features"]
        self._info = run.record(ready, config, learnt, Path(IN_MEMORY))
        self._info |= {name: numbers[name] for name in ("calibration", "timing")}
        self._info |= {"thresholds": list(thresholds), "class_type": classes.dtype.str}
        self.classes_, self._learnt = classes, (learnt.model, kept.encoder)
        self._files, self._scorer = None, None
        if isinstance(learnt.model, TrainedHead):
            head = learnt.model.head if learnt.model.spec is None else copy.deepcopy(learnt.model.head).double()
            self._scorer = FrozenScorer(kept, head, learnt.model.features, ready.max_length, config.long)
        if learnt.interrupted:
            raise KeyboardInterrupt
        return self

    def decision_function(self, X: Any) -> Logits:
        """Logits of n texts: (n,) of the second class against the first, or (n, classes), or (n, labels)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if self._info["problem"] != "multi" and logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> Logits:
        """(n, classes) calibrated probabilities of n texts; where a text may have several labels, of each."""
        return probabilities_of(self._logits(X), self._info["problem"])

    def predict(self, X: Any) -> NDArray[Any]:
        """(n,) classes of n texts, or an (n, labels) indicator matrix if there was one in `fit`."""
        said = decide(self.predict_proba(X), self._info["thresholds"]).labels
        return said if said.ndim == 2 else self.classes_[said]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a run folder as `headstart train` does, but for the result on a test part, since there was none.

        A `RunError` if the folder holds something and is not to be replaced, a `DiskError` if it cannot be written.
        """
        check_is_fitted(self)
        out = Path(folder)
        check_out(out, overwrite=overwrite, resume=False)
        with new_folder(out, overwrite=overwrite) as place:
            self._write(place, str(out))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The classifier in a run folder, also in one of `headstart train`'s; a `RunError` if there is none.

        Of the latter `classes_` are ints where all its labels are whole numbers, and else strings: those of the columns
        of `predict_proba`, too, where a text may have several.
        """
        about, place = read_about(folder), Path(folder)
        info: Json = {name: about[name] for name in ("problem", "thresholds", "long", "max_length")} | about["info"]
        given: Json = {**info.get("settings", {}), "random_state": info.get("seed")}
        if given.get("class_weight") == "none":
            given["class_weight"] = None
        if given.get("thaw", "").isdecimal():
            given["thaw"] = int(given["thaw"])
        known: Json = {name: tuple(one) if isinstance(one, list) else one for name, one in given.items()}
        self = cls(**{name: known[name] for name in cls().get_params() if name in known})
        self.classes_ = classes_of(about["names"], info.get("class_type"))
        self.metrics_ = read_json(place, "metrics.json") if (place / "metrics.json").is_file() else {}
        self.features_ = self.metrics_.get("features", {})
        parts = (*HUB_FILES, "modeling_headstart.py")  # and no texts, which a pickle would take along
        self._files = {one.name: one.read_bytes() for part in parts for one in place.glob(part) if one.is_file()}
        self._info, self._learnt, self._scorer = info, None, None
        return self

    def _labelled(self, X: Any, y: Any, sample_weight: ArrayLike | None) -> tuple[Dataset, NDArray[Any], str]:
        """What was given as a `Dataset`, the classes, and the setting of class weights that is left to do."""
        texts, (labels, classes) = self._texts(X, reset=True), labels_in(y)
        check_consistent_length(texts, labels)
        weights, several = sample_weights(sample_weight, len(texts)), labels.ndim == 2
        class_weight = "none" if self.class_weight is None else self.class_weight
        if not isinstance(class_weight, Mapping):
            check("class_weight", class_weight)
        if isinstance(class_weight, Mapping):
            if several:
                raise ArgumentError("class_weight takes a weight for each class only with one class a text.")
            by_class = compute_sample_weight(dict(class_weight), classes[labels])
            weights, class_weight = by_class if weights is None else weights * by_class, "none"
        if weights is not None:
            counted = np.flatnonzero(weights)
            texts, labels, weights = [texts[i] for i in counted], labels[counted], weights[counted]
            if not several:
                present, labels = np.unique(labels, return_inverse=True)
                classes = classes[present]
                if class_weight != "none":  # each class's weights sum to the same
                    weights, class_weight = weights / np.bincount(labels, weights)[labels], "none"
            weights = (weights / weights.mean()).astype(np.float32)
        if len(classes) < 2:
            raise ArgumentError(f"y has one class ({data.shown(str(classes[0]))}), and at least two are needed.")
        about: Json = {"problem": "multi" if several else "single", "source": IN_MEMORY, "weights": weights}
        return Dataset(texts, labels, names_of(classes), np.arange(len(texts)), **about), classes, class_weight

    def _logits(self, X: Any) -> Logits:
        """(n, labels) logits of n texts."""
        check_is_fitted(self)
        texts = self._texts(X, reset=False)
        if self._scorer is None:
            placement: Any = self.device, self.precision
            with tempfile.TemporaryDirectory(prefix="headstart-", ignore_cleanup_errors=True) as work:
                self._write(Path(work), work)
                self._scorer = scorer_of(Path(work), self._info, choose_placement(*placement))
        return self._scorer(texts)

    def _write(self, folder: Path, out: str) -> None:
        """Fill a folder, which will be `out`."""
        if self._learnt is None:
            for name, content in self._files.items():
                (folder / name).write_bytes(content)
        else:
            model, encoder = self._learnt
            whole = model.whole(self._info["names"])
            save_model(folder, whole, encoder, self._info["max_length"], self._info["problem"])
        report.write_json(folder / "headstart.json", {**self._info, "out": out})
        report.write_json(folder / "metrics.json", self.metrics_)

    def __getstate__(self) -> Json:
        """Without what is torch's: the files of a run folder instead, whose weights are safetensors."""
        state: Json = super().__getstate__()
        if "_learnt" in state:
            with tempfile.TemporaryDirectory(prefix="headstart-") as work:
                self._write(Path(work), work)
                files = {one.name: one.read_bytes() for one in Path(work).iterdir()}
            state = {**state, "_learnt": None, "_files": files, "_scorer": None}
        return state

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_info")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class Encoder(TransformerMixin, TextInput):
    """Texts to vectors by a frozen pretrained encoder, each text once: for a pipeline of your own.

    Args:
        model: `minilm`, a Hub id or a folder.
        features: what is made of a text, one after the other: `mean-last` or `mean-K`, the mean over its tokens after
            the last or the K-th layer (0: the embeddings), `cls`, the last layer's first token, or `pooler`. Of a wide
            encoder only some layers are there.
        max_length: tokens read of a text; None: as many as the encoder takes.
        device: where to compute.
        precision: the number format to compute in.

    There is nothing to fit.
    """

    def __init__(
        self,
        *,
        model: str = TrainConfig.model,
        features: Sequence[str] = ("mean-last",),
        max_length: int | None = None,
        device: str = TrainConfig.device,
        precision: str = TrainConfig.precision,
    ) -> None:
        self.model = model
        self.features = features
        self.max_length = max_length
        self.device = device
        self.precision = precision

    def fit(self, X: Any, y: Any = None) -> Self:
        """Look whether these are texts, and note the name of their column."""
        self._texts(X, reset=True)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """(n, d) features of n texts; a `ModelError` if the encoder has none of such a name."""
        texts, (kept, names) = self._texts(X, reset=False), self._source()
        encoder = kept.encoder
        check("max_length", self.max_length)
        if (length := self.max_length or encoder.max_length) > encoder.max_length:
            raise ArgumentError(f"max_length {length}: {self.model} takes at most {encoder.max_length} tokens.")
        tokens = encoder.tokenizer.truncate(encoder.tokenizer(texts), length)
        return head_inputs(encoder, kept.features(encoder, tokens), names).numpy()

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """(d,) names: `mean-6_0`, `mean-6_1`, …; those of the column do not matter."""
        kept, names = self._source()
        return np.array([f"{name}_{i}" for name in names for i in range(kept.encoder.hidden)], dtype=object)

    def _source(self) -> tuple[Kept, list[str]]:
        """The encoder, and the features' own names."""
        placement: Any = self.device, self.precision
        kept = kept_encoder(self.model, choose_placement(*placement))
        given = (self.features,) if isinstance(self.features, str) else self.features
        return kept, [f"mean-{kept.encoder.layers}" if name == "mean-last" else name for name in given]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags
