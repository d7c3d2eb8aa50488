"""Classes keep their type on their way through a run folder, and weights have to be weights."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.errors import ArgumentError
from headstart.inputs import classes_of, labels_in, names_of, sample_weights


# scikit-learn hints that many classes may be a regression: a hint to the caller, and no error of ours.
@pytest.mark.filterwarnings("ignore:The number of unique classes:UserWarning")
@given(
    labels=st.lists(st.integers(-(10**9), 10**9), min_size=2)
    | st.lists(st.booleans(), min_size=2)
    | st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=2)
    | st.lists(st.integers(-100, 100).map(float), min_size=2)
)
def test_classes_come_back_from_their_names(labels: list[Any]) -> None:
    index, classes = labels_in(labels)
    assert classes[index].tolist() == labels
    assert classes.tolist() == sorted(set(labels))
    back = classes_of(names_of(classes), classes.dtype.str)
    assert back.tolist() == classes.tolist()
    assert back.dtype == classes.dtype


def test_an_indicator_matrix_has_several_labels_a_text() -> None:
    labels, classes = labels_in(np.array([[1, 0, 1], [0, 0, 0]]))
    assert labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert classes.tolist() == [0, 1, 2]


def test_where_the_type_is_not_known_whole_numbers_are_numbers() -> None:
    assert classes_of(("0", "1"), None).tolist() == [0, 1]
    assert classes_of(("0", "one"), None).tolist() == ["0", "one"]


@pytest.mark.parametrize(("weights", "said"), [([1, -1], "below zero"), ([0, 0], "are zero"), ([1], "shape")])
def test_weights_that_are_none_are_refused(weights: list[float], said: str) -> None:
    assert sample_weights(None, 2) is None
    with pytest.raises(ArgumentError, match=said):
        sample_weights(weights, 2)
