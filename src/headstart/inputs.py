"""Texts, classes and weights from memory, as people hold them: lists, arrays, columns of any library.

This room knows what scikit-learn takes as a target, and numpy. It knows nothing of training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from headstart import data
from headstart.data import Indexes, is_number
from headstart.errors import ArgumentError, count_of
from headstart.tables import name_rows

INFINITE = (float("inf"), float("-inf"))


def texts_in(given: Any) -> list[str]:
    """The texts of a list, an array, a Series, or a table of one column, of any library; else an `ArgumentError`."""
    if isinstance(given, (str, bytes)):
        raise ArgumentError(f"A lone text was given; give a list of texts: [{data.shown(str(given))}].")
    if isinstance(given, Mapping):
        raise ArgumentError("Texts are given as a list, a Series or one column, not as a dict.")
    columns = getattr(given, "column_names", None)  # of a `datasets.Dataset`, which numpy would take for records
    if columns is not None and not hasattr(given, "__array__"):
        given = given[columns[0]] if len(columns) == 1 else np.empty((len(given), len(columns)))
    array = hasattr(given, "__array__")
    found = np.asarray(given if array or not np.iterable(given) else [*given], dtype=object)
    if found.ndim == 2 and found.shape[1] != 1:
        raise ArgumentError(f"One column of texts is needed, and there are {count_of(found.shape[1], 'column')}.")
    if found.ndim not in (1, 2):
        raise ArgumentError(f"Texts are given as a list, a Series or one column, not as {type(given).__name__}.")
    texts = found.ravel().tolist()
    if not texts:
        raise ArgumentError("There are no texts: at least one is needed.")
    if wrong := [place for place, one in enumerate(texts) if not isinstance(one, str)]:
        what, where = texts[wrong[0]], name_rows(wrong).replace("row", "position")
        raise ArgumentError(f"Not a text at {where}, counted from 0: {what!r} ({type(what).__name__}).")
    return list(map(str, texts))


def labels_in(y: Any) -> tuple[Indexes, NDArray[Any]]:
    """Labels and classes of what scikit-learn takes as a target: (n,) classes, or an indicator matrix, also sparse.

    Labels are (n,) indexes into the classes, or (n, classes) of 0 and 1 where a text may have several.
    """
    if y is None:
        raise ArgumentError("A classifier requires y to be passed, but the target y is None.")
    if hasattr(y, "toarray"):
        y = y.toarray()
    try:
        y = np.asarray(y if hasattr(y, "__array__") or not np.iterable(y) else [*y])
    except ValueError as error:
        mend = "give an indicator matrix, as scikit-learn's MultiLabelBinarizer makes it"
        raise ArgumentError(f"y holds lists of labels; {mend}.") from error
    flat = y.ravel().tolist()
    kinds = (str,) if y.dtype.kind in "OU" and any(isinstance(one, str) for one in flat) else (int, float)
    if wrong := [i for i, one in enumerate(flat) if not isinstance(one, kinds) or one != one or one in INFINITE]:
        where = name_rows(wrong).replace("row", "position")
        raise ArgumentError(f"Not a class at {where} of y, counted from 0: {flat[wrong[0]]!r}.")
    if y.dtype == object and kinds != (str,):
        y = np.array(flat).reshape(y.shape)
    kind = type_of_target(y, input_name="y")
    check_classification_targets(y)
    if kind == "multilabel-indicator":
        if not np.isin(y, (0, 1)).all():
            raise ArgumentError("y is an indicator matrix with other numbers than 0 and 1.")
        return y.astype(np.int64), np.arange(y.shape[1])
    classes, labels = np.unique(column_or_1d(y, warn=True), return_inverse=True)
    return labels.astype(np.int64), classes


def names_of(classes: NDArray[Any]) -> tuple[str, ...]:
    """Classes as a run folder names them: whole numbers in plain digits."""
    plain = classes.astype(np.int64) if classes.dtype.kind == "f" else classes
    return tuple(map(str, plain.tolist()))


def classes_of(names: Sequence[str], dtype: str | None) -> NDArray[Any]:
    """Classes from a run folder's names, of the type that they had; where that is not known, numbers if all are."""
    kind = np.dtype(dtype or ("int64" if all(map(is_number, names)) else "str"))
    if kind.kind == "b":
        return np.array([name == "True" for name in names])
    return np.array(names, dtype=kind if kind.kind in "OU" else np.int64).astype(kind)


def sample_weights(sample_weight: ArrayLike | None, n: int) -> NDArray[np.float64] | None:
    """(n,) weights as given, None: 1 each; an `ArgumentError` if they are no weights, or all are zero."""
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, np.float64)
    if weights.shape != (n,):
        raise ArgumentError(f"sample_weight has the shape {weights.shape}, and ({n},) is needed.")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ArgumentError("sample_weight has a weight below zero, or one that is no number.")
    if not weights.any():
        raise ArgumentError("sample_weight: all weights are zero, so there is nothing to learn from.")
    return weights
