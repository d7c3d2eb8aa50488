"""What Ray's workers do: score parts, encode batches, fine-tune with others. It knows no cluster, only its own part.

The names here are what Ray hands out, so each machine has to have this very version.
"""

import contextlib
import functools
import json
import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import distributed

from headstart.bulk import Job, Scorer
from headstart.checkpoints import Checkpoints
from headstart.config import Device, Precision
from headstart.encoder import Batch, choose_placement, encode_batch
from headstart.errors import HeadstartError, ModelError
from headstart.parts import Part, Slice, Table
from headstart.peers import seat
from headstart.recent import kept_encoder
from headstart.thaw import FineTuning
from headstart.tokens import Tokens
from headstart.train import Epoch

RAY_FILES, TOLD = "ray", "told.txt"  # in a run folder while it is fine-tuned
Json = dict[str, Any]


class Actor:
    """What scores parts, one after the other, in Ray Data."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)  # whatever the node's environment says
        self.job = job

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Made for the first part: of an actor that does not come to be, Ray tells only that it died."""
        return Scorer(self.job)

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Score the one part of a batch; what it came to, or an error of ours, to which Ray would add words."""
        name, slices = json.loads(batch["part"][0])
        part = Part(name, [Slice(Table(*table), *rows) for table, *rows in slices])
        try:
            found: Json | HeadstartError = self.scorer(part)
        except HeadstartError as error:
            found = error
        return {"done": [pickle.dumps(found)]}


def load(job: Job) -> None:
    """Load a job's classifier, for what is amiss with it to be told."""
    job.load()


def encode(
    source: str,
    device: Device,
    precision: Precision,
    fingerprint: str,
    layout: Sequence[str],
    given: tuple[NDArray[np.int64], Tokens, Sequence[int]],
) -> Batch:
    """Some whole batches: where their texts are among all, their tokens, and the sizes of the batches."""
    index, tokens, sizes = given
    torch.set_num_threads(1)  # whatever the node's environment says
    encoder = kept_encoder(source, choose_placement(device, precision)).encoder
    if encoder.fingerprint != fingerprint:
        raise ModelError(f"{source}: a worker has another model of this name, or another version of torch.")
    places = np.split(np.arange(len(index)), np.cumsum(sizes)[:-1])
    return index, np.concatenate([encode_batch(encoder, tokens, layout, some)[1] for some in places])


def fine_tune(given: Json) -> None:
    """What each worker does of fine-tuning."""
    import ray

    torch.set_num_threads(given["threads"])  # which decide how batches are cut
    join(given["backend"])
    folder, rank = Path(given["folder"]), seat().rank

    def announce(said: str) -> None:
        with contextlib.suppress(OSError):  # of a disk that is not shared; what it leads to is told at the end
            if rank == 0:
                with open(folder / RAY_FILES / TOLD, "a", encoding="utf-8") as file:
                    file.write(said + "\n")

    def on_epoch(number: int, epoch: Epoch) -> bool:
        announce(f"Epoch {number + 1:<3} {epoch.words()}, {epoch.seconds:,.0f} s")
        return False

    task: FineTuning = ray.cloudpickle.loads(ray.get(given["task"]))  # made by this very program
    task.train(given["depth"], Checkpoints(folder, given["minutes"], announce), on_epoch=on_epoch)


def join(backend: str) -> None:
    """Make torch's group of all workers, who meet at the node's own address; torch by itself listens on all."""
    from ray import train, util
    from ray.train.collective import broadcast_from_rank_zero

    here, host = train.get_context(), util.get_node_ip_address()
    rank, size = here.get_world_rank(), here.get_world_size()
    if rank == 0:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        broadcast_from_rank_zero((host, port))
        own = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        store = distributed.TCPStore(host, port, size, **own)
    else:
        store = distributed.TCPStore(*broadcast_from_rank_zero(None), size)
    for name, addresses in psutil.net_if_addrs().items():
        if host in {one.address for one in addresses}:
            os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
