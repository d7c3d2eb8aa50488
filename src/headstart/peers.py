"""Processes that train one model together: which one this is, and sums over all of them. It knows no models.

Whoever starts the processes makes torch.distributed's group; without one this process is alone, and its sum is its own.
"""

from typing import NamedTuple

import torch
from torch import distributed


class Seat(NamedTuple):
    """The number of this process, from 0, among so many that train together."""

    rank: int
    size: int


def seat() -> Seat:
    """Where this process sits."""
    if distributed.is_available() and distributed.is_initialized():
        return Seat(distributed.get_rank(), distributed.get_world_size())
    return Seat(0, 1)


def add_up(*tensors: torch.Tensor) -> None:
    """Put into each tensor, in place, its sum over all processes, which all must call this; it is one message."""
    if seat().size > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
