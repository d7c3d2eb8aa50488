"""What texts should be given, what each of them counts, and the loss by it. It knows nothing of models or batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart.config import ClassWeight
from headstart.tokens import mean_by_text


@dataclass(frozen=True)
class Targets:
    """What n texts should be given: `labels`, (n,) indexes or (n, classes) of 0 and 1; and (n,) weights, None: 1 each.

    `pieces` says in how many each text is read, None: in one. Each is learnt from; a text gets their mean logits.
    """

    labels: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    pieces: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence["Targets"]) -> "Targets":
        """Those of several parts, one after the other; either all have weights, and pieces, or none has."""
        fields: Any = zip(*((one.labels, one.weights, one.pieces) for one in parts), strict=True)
        found: list[Any] = [None if some[0] is None else np.concatenate(some) for some in fields]
        return cls(*found)

    @property
    def seen(self) -> int:
        """How many labels there are examples of."""
        return len(np.unique(self.labels)) if self.labels.ndim == 1 else int(self.labels.any(axis=0).sum())

    def take(self, index: NDArray[np.int64]) -> "Targets":
        """Those of the texts at `index`, in that order."""
        fields: Any = (self.labels, self.weights, self.pieces)
        found: list[Any] = [None if one is None else one[index] for one in fields]
        return Targets(*found)

    def places(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the pieces of the texts at `index` are among all pieces."""
        if self.pieces is None:
            return index
        ends = np.cumsum(self.pieces)
        return np.concatenate([index[:0], *(np.arange(ends[i] - self.pieces[i], ends[i]) for i in index.tolist())])

    def by_piece(self, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as the loss takes them, and what each counts in it, by piece; `classes` (classes,) are weights."""
        labels, weights = self.tensors(classes)
        if self.pieces is None:
            return labels, weights
        pieces = torch.from_numpy(self.pieces)
        return labels.repeat_interleave(pieces, dim=0), weights.repeat_interleave(pieces, dim=0)

    def tensors(self, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for each text."""
        labels = torch.from_numpy(self.labels)
        weights = classes[labels] if labels.ndim == 1 else torch.where(labels > 0, classes, torch.ones(()))
        if self.weights is not None:
            weights = weights * torch.from_numpy(self.weights).view(-1, *[1] * (labels.ndim - 1))
        return labels if labels.ndim == 1 else labels.float(), weights

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, classes) logits of texts from those of their pieces."""
        return logits if self.pieces is None else torch.from_numpy(mean_by_text(logits.numpy(), self.pieces))


def class_weights(labels: NDArray[np.int64], classes: int, kind: ClassWeight) -> torch.Tensor:
    """(classes,) fp32 weights in the loss; `balanced` is scikit-learn's n / (classes * count).

    Where a text may have several labels, `balanced` is how many texts lack a label for each that has it. A class
    without rows (possible where a split was given) weighs 1: it is never a target.
    """
    several = labels.ndim == 2
    if kind == "none" or (several and kind == "auto"):
        return torch.ones(classes)
    counts = labels.sum(axis=0) if several else np.bincount(labels, minlength=classes)
    whole = len(labels) - counts if several else len(labels) / np.count_nonzero(counts)
    return torch.from_numpy(np.where(counts, whole / np.maximum(counts, 1), 1.0)).float()


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of cross-entropy; where labels are (n, classes) of 0 and 1, of each label's binary one."""
    if labels.ndim == 1:
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
    else:
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (each * weights).sum() / weights.sum().clamp_min(1e-12)


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """The weighted loss of (n, classes) logits, and the share of texts whose labels are all right."""
    several = labels.ndim == 2
    right = ((logits > 0) == (labels > 0)).all(dim=1) if several else logits.argmax(dim=1) == labels
    return float(weighted_loss(logits, labels, weights)), float(right.float().mean())
