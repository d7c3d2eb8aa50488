"""Many machines, by Ray: scoring, encoding, fine-tuning there. Only this room, `workers` and `serve.replicas` know Ray.

Work goes out in pieces whose results depend on the piece alone: where it is done, and how often, changes nothing.
"""

import contextlib
import functools
import json
import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from headstart.bulk import MOST_ATTEMPTS, Job
from headstart.checkpoints import Checkpoints
from headstart.config import Device
from headstart.encoder import Batch, Encoder
from headstart.errors import HeadstartError, InputError, TerminatedError, UnevenError
from headstart.features import cache_folder
from headstart.model import Depth
from headstart.parallel import cores
from headstart.parts import Part
from headstart.predict import is_by_onnx
from headstart.thaw import FineTuning, OnEpoch, Thawed
from headstart.tokens import Tokens, like_length_batches
from headstart.workers import RAY_FILES, TOLD, Actor, encode, fine_tune, load

LOCAL = "local"
TASK_BATCHES = 16  # batches of 2,048 tokens encoded by one task: a second or more, and some megabytes of features
CONNECT = 5  # seconds to wait for a cluster
MOST_RESTARTS = 20  # so often workers may die until fine-tuning gives up
AHEAD = 4  # tasks handed out for each worker, so that none waits for the one whose turn it is
ON_SIGTERM = "SIGTERM: the work on Ray was ended. The same command goes on with what was kept; training, with --resume."
# What workers need of the environment. No keys: Ray writes these into its logs.
PASSED_ON = ("HEADSTART_CACHE_MAX_BYTES", "HF_HOME", "HF_HUB_OFFLINE")
Json = dict[str, Any]


@contextlib.contextmanager
def connected(address: str, workers: int | None) -> Iterator["Cluster"]:
    """A Ray cluster: the one at `address`, or for `local` one of this machine alone, which ends with the block.

    The latter listens on loopback only and asks for a token that nobody else has. An `InputError` if there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    given: Json = {"address": address}
    if address == LOCAL:
        # For all that Ray knows there are no clusters on this system: each of its servers listens on loopback then.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        given |= {"num_cpus": max(cores(), workers or 1), "include_dashboard": False}
    else:
        check_reachable(address)
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs more. Install it with: pip install 'headstart[ray]'") from error
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    passed["HEADSTART_CACHE_DIR"] = str(cache_folder().absolute())
    terminated, before = threading.Event(), signal.getsignal(signal.SIGTERM)

    def end(*_: Any) -> None:
        terminated.set()
        raise KeyboardInterrupt  # while Ray waits, it makes this of whatever a handler raises

    try:
        ray.init(**given, runtime_env={"env_vars": passed}, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"--ray {address}: no cluster answers there ({why}).") from error
    try:
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0))
        with contextlib.redirect_stdout(sys.stderr):  # where Ray brings what workers and machines say
            here = all(node["NodeManagerAddress"].startswith("127.") for node in ray.nodes())
            signal.signal(signal.SIGTERM, end)
            yield Cluster(workers, gpus, max(1, int(has.get("CPU", 1))), here, terminated)
    except (KeyboardInterrupt, HeadstartError) as error:
        if terminated.is_set():
            raise TerminatedError(ON_SIGTERM) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Refuse, by an `InputError`, an address where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return  # `auto`, or another of Ray's words
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: no cluster answers there ({error}).") from error


class Cluster(NamedTuple):
    """What does the work: `asked` workers at once, or as many as there are GPUs, or else cores."""

    asked: int | None
    gpus: int
    cores: int
    on_loopback: bool  # all its machines are this one
    terminated: threading.Event  # by SIGTERM

    def room(self, device: Device) -> tuple[int, Json]:
        """How many workers compute on such a device at once, and what each takes: a GPU, or else a core."""
        on_gpus = self.gpus > 0 and device != "cpu"
        return self.asked or (self.gpus if on_gpus else self.cores), {"num_gpus" if on_gpus else "num_cpus": 1}

    def seats(self, device: Device) -> tuple[int, int]:
        """How many workers train together, and the threads of each; an `InputError` if there is no room for them."""
        (workers, _), on_gpus = self.room(device), device == "cuda"
        most = threads_each(workers, shares_of_nodes("GPU" if on_gpus else "CPU"))
        return workers, 1 if on_gpus else most

    def each(self, function: Callable[[Any], Any], items: Iterable[Any], device: Device = "cpu") -> Iterator[Any]:
        """`function` of each item, in order; what is lost with a machine is begun again elsewhere."""
        import ray

        workers, share = self.room(device)
        # By `max_calls` a worker stays, with its encoder, also where it has a GPU.
        task = ray.remote(**share, max_retries=MOST_ATTEMPTS, max_calls=0)(lambda function, item: function(item))
        left, waiting, known = iter(items), deque[Any](), ray.put(function)
        while True:
            waiting.extend(task.remote(known, item) for item in islice(left, AHEAD * workers - len(waiting)))
            if not waiting:
                return
            with own_errors():
                found = ray.get(waiting.popleft())
            yield found

    def score(self, job: Job, parts: Sequence[Part]) -> Iterator[Json]:
        """As `bulk.in_process`, by actors that each hold a classifier; as parts are done, in any order.

        A part is an item and a block of its own, so that it is read, scored and written in one place, and done again
        in another if that is lost. A lost actor comes back as soon as there is room.
        """
        from ray import data

        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = data.from_items([{"part": json.dumps(part)} for part in parts], override_num_blocks=len(parts))
        workers, share = self.room(device_of(job))
        pool = data.ActorPoolStrategy(min_size=1, max_size=workers)
        done = items.map_batches(Actor, fn_constructor_args=(job,), batch_size=1, compute=pool, **share)
        with own_errors():
            for row in done.iter_rows():
                found = pickle.loads(row["done"])  # made by this very program
                if isinstance(found, HeadstartError):
                    raise found
                yield found

    def check(self, job: Job) -> None:
        """Load its classifier where it will be, so that what is amiss is told before anything is done."""
        list(self.each(load, [job], device_of(job)))

    def encode(self, encoder: Encoder, tokens: Tokens, layout: Sequence[str]) -> Iterator[Batch]:
        """As `encoder.encode`, with the same batches, so to the same bytes where processors are alike."""
        batches = list(like_length_batches(tokens.lengths))
        packs = (batches[start : start + TASK_BATCHES] for start in range(0, len(batches), TASK_BATCHES))
        source = str(Path(encoder.source).absolute()) if Path(encoder.source).is_dir() else encoder.source
        device: Any = encoder.placement.device.type
        compute = functools.partial(encode, source, device, encoder.placement.precision, encoder.fingerprint, layout)
        given = ((np.concatenate(pack), tokens.take(np.concatenate(pack)), list(map(len, pack))) for pack in packs)
        return self.each(compute, given, device)

    def fine_tune(
        self, task: FineTuning, depth: Depth, checkpoints: Checkpoints, deadline: float, on_epoch: OnEpoch
    ) -> Thawed:
        """As `FineTuning.fit`, by workers in Ray Train that have the same loop, each with its part of every batch.

        They leave a last checkpoint in the run folder, which they all have to reach, and here it is gone on from. When
        a worker dies, all begin anew from the newest checkpoint; when one raises an error of ours, all end.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
        from ray.train.backend import Backend
        from ray.train.torch import TorchConfig, TorchTrainer

        class NoGroup(TorchConfig):  # workers make it: see `workers.join`
            backend_cls = Backend

        class GiveUp(UserCallback):
            def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
                found = next(filter(None, map(ours, worker_exceptions.values())), None)
                # A node that is taken away, and a disk that shows others late, are reasons to try again.
                if found is not None and not isinstance(found, (TerminatedError, UnevenError)):
                    raise found

        folder, on_gpus = checkpoints.folder.absolute(), task.encoder.placement.device.type == "cuda"
        workers, threads = self.seats("cuda" if on_gpus else "cpu")
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        given = {"depth": depth, "folder": str(folder), "minutes": checkpoints.minutes}
        given |= {"task": ray.put(ray.cloudpickle.dumps(task)), "backend": backend, "threads": threads}
        trainer = TorchTrainer(
            fine_tune,
            train_loop_config=given,
            torch_config=NoGroup(backend),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpus, resources_per_worker={"CPU": threads}),
            run_config=RunConfig(
                name=secrets.token_hex(4),  # Ray would go on with a run of the same name
                storage_path=str(folder / RAY_FILES),
                callbacks=[GiveUp()],
                failure_config=FailureConfig(max_failures=MOST_RESTARTS, controller_failure_limit=MOST_RESTARTS),
            ),
        )
        try:
            with own_errors(), told(folder / RAY_FILES, checkpoints.announce), interruptible(self.terminated):
                trainer.fit()
        except TrainingFailedError as error:
            why = next((line for line in reversed(str(error).splitlines()) if line.strip()), "it is not known why")
            hint = "With --resume it goes on from the newest checkpoint, with as many --workers as there is room for."
            raise InputError(f"{folder}: workers died or could not be started too often ({why}). {hint}") from error
        at_end = Checkpoints(folder, checkpoints.minutes)
        if at_end.newest() is None:
            raise InputError(f"{folder}: workers left no checkpoint here: --out has to be on a disk that all share.")
        found = task.fit(depth, at_end)
        for number, epoch in enumerate(found.history.epochs):
            on_epoch(number, epoch)
        return found


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Pass on an error of ours that a worker raised as it was there, without Ray's wrapping."""
    try:
        yield
    except Exception as error:  # Ray has several ways to wrap one
        if (found := ours(error)) is not None:
            raise found from None
        raise


def ours(error: BaseException | None) -> HeadstartError | None:
    """The error of ours behind another; None where there is none."""
    if error is None:
        return None
    wrapped = [getattr(error, name, None) for name in ("cause", "controller_failure")]
    wrapped += getattr(error, "worker_failures", {}).values()
    if (found := next(filter(None, map(ours, wrapped)), None)) is not None:  # Ray's copy of an error is of its class
        return found
    return error if isinstance(error, HeadstartError) else ours(error.__cause__)


def threads_each(workers: int, cores: Sequence[int]) -> int:
    """The most cores that each of so many workers can have, by those of each node; an `InputError` if they lack."""
    fitting = [count for count in range(1, max(cores, default=0) + 1) if sum(one // count for one in cores) >= workers]
    if not fitting:
        raise InputError(f"--workers {workers}: the cluster has room for {sum(cores)}; give fewer.")
    return fitting[-1]


def shares_of_nodes(kind: Literal["CPU", "GPU"]) -> list[int]:
    """How many of them each living node has."""
    import ray

    return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def interruptible(terminated: threading.Event) -> Iterator[None]:
    """Ctrl-C within the block is a KeyboardInterrupt: Ray Train takes it for itself, exits, and keeps it.

    A `TerminatedError` if it was SIGTERM: then there is no best so far to be tested.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:
        raise TerminatedError(ON_SIGTERM) if terminated.is_set() else KeyboardInterrupt from end
    finally:
        signal.signal(signal.SIGINT, before)


def device_of(job: Job) -> Device:
    """Where it is scored: what onnxruntime computes needs no GPU."""
    return "cpu" if is_by_onnx(job.run, job.device, job.precision) else job.device


@contextlib.contextmanager
def told(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Announce what a worker says in a file of `folder`, while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOLD).write_text("", encoding="utf-8")  # a run that was killed has left its words
    ended = threading.Event()

    def listen(file: TextIO) -> None:
        over = False
        while not over:
            over = ended.wait(0.2)  # and once more, for the last words
            for line in file:
                announce(line.rstrip())

    with open(folder / TOLD, encoding="utf-8") as file:
        listener = threading.Thread(target=listen, args=(file,))
        listener.start()
        try:
            yield
        finally:
            ended.set()
            listener.join()
