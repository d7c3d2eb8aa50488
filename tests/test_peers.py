"""Alone a process is the first of one; together each has the sum."""

import subprocess
import sys
from pathlib import Path

import torch

from headstart.peers import Seat, add_up, seat

TOGETHER = """
import sys, torch
from torch import distributed
from headstart.peers import add_up, seat
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
assert tuple(seat()) == (rank, 2)
one, other = torch.full((2, 3), rank + 1.0), torch.tensor(10.0 * rank)
add_up(one, other)
print(one.flatten().tolist(), float(other))
"""


def test_alone() -> None:
    assert seat() == Seat(0, 1)
    given = torch.ones(3)
    add_up(given)
    assert given.tolist() == [1, 1, 1]


def test_two_processes_have_one_sum(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOGETHER]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in both] == [f"{[3.0] * 6} 10.0\n"] * 2
