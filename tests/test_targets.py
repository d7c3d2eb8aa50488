"""What texts should be given, by text and by piece, and what each class counts."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from headstart.targets import Targets, class_weights


@pytest.mark.parametrize("counts", [(5, 5), (1, 9), (7, 2, 91), (3, 3, 3, 1)])
def test_class_weights_are_scikit_learns(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels)
    np.testing.assert_allclose(class_weights(labels, len(counts), "balanced").numpy(), expected, rtol=1e-6)
    by_hand = [sum(counts) / (len(counts) * count) for count in counts]
    np.testing.assert_allclose(expected, by_hand)
    assert class_weights(labels, len(counts), "none").tolist() == [1.0] * len(counts)


def test_a_class_without_rows_weighs_one() -> None:
    weights = class_weights(np.array([0, 0, 0, 2]), 3, "balanced")
    np.testing.assert_allclose(weights.numpy(), [4 / 6, 1, 2], rtol=1e-6)


def test_a_text_in_pieces_is_learnt_from_piece_by_piece_and_answered_once() -> None:
    wanted = Targets(np.array([1, 0, 1]), np.array([1, 2, 3], np.float32), np.array([2, 1, 3]))
    labels, weights = wanted.by_piece(torch.tensor([10.0, 1.0]))
    assert labels.tolist() == [1, 1, 0, 1, 1, 1]
    assert weights.tolist() == [1, 1, 20, 3, 3, 3]
    assert wanted.places(np.array([2, 0])).tolist() == [3, 4, 5, 0, 1]
    some = wanted.take(np.array([2, 0]))
    assert (some.labels.tolist(), some.pieces.tolist()) == ([1, 1], [3, 2])  # type: ignore[union-attr]
    assert (len(some), some.seen, wanted.seen) == (2, 1, 2)
    assert wanted.mean(torch.arange(6.0)[:, None]).flatten().tolist() == [0.5, 2, 4]
    both = Targets.joined([wanted, some])
    assert (both.labels.tolist(), both.weights.tolist()) == ([1, 0, 1, 1, 1], [1, 2, 3, 3, 1])  # type: ignore[union-attr]
