"""Many machines, by Ray: scoring, encoding, fine-tuning and serving there. Only this room knows Ray.

Work goes out in pieces whose results depend on the piece alone: where it is done, and how often, changes nothing.
"""

import contextlib
import functools
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from headstart import predict
from headstart.bulk import MOST_ATTEMPTS, Job, Part, Scorer, Slice, Table
from headstart.checkpoints import Checkpoints
from headstart.config import Device, Precision, ServeConfig
from headstart.encoder import Batch, Encoder, choose_placement, encode_batch
from headstart.errors import HeadstartError, InputError, ModelError, StoppedEarlyError, TerminatedError, count_of
from headstart.features import cache_folder
from headstart.model import Depth
from headstart.parallel import cores
from headstart.peers import seat
from headstart.thaw import FineTuning, OnEpoch, Thawed
from headstart.tokens import Tokens, like_length_batches
from headstart.train import Epoch

LOCAL = "local"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}  # nothing is reported to Ray's makers
# For all that Ray knows there are no clusters on this system: each of its servers listens on loopback then.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TASK_BATCHES = 16  # batches of 2,048 tokens encoded by one task: a second or more, and some megabytes of features
CONNECT = 5  # seconds to wait for a cluster
MOST_RESTARTS = 20  # so often workers may die until fine-tuning gives up
RAY_FILES, TOLD = "ray", "told.txt"  # in a run folder while it is fine-tuned
# What workers need of the environment. No keys: Ray writes these into its logs.
PASSED_ON = ("HEADSTART_CACHE_MAX_BYTES", "HEADSTART_SHARED_STORE", "HF_HOME", "HF_HUB_OFFLINE")
Json = dict[str, Any]


@contextlib.contextmanager
def connected(address: str, workers: int | None) -> Iterator["Cluster"]:
    """A Ray cluster: the one at `address`, or for `local` one of this machine alone, which ends with the block.

    The latter listens on loopback only and asks for a token that nobody else has. An `InputError` if there is none.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given: Json = {"address": address}
    if address == LOCAL:
        os.environ |= ALONE
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
            yield Cluster(workers or gpus or max(1, int(has.get("CPU", 1))), gpus, here)
    finally:
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
    """What does the work: so many workers at once, on GPUs if there are any; a worker has a GPU, or else a core."""

    workers: int
    gpus: int
    on_loopback: bool  # all its machines are this one

    def each(self, function: Callable[[Any], Any], items: Iterable[Any], device: Device = "cpu") -> Iterator[Any]:
        """`function` of each item, as they are done; what is lost with a machine is begun again elsewhere."""
        import ray

        share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
        task = ray.remote(**share, max_retries=MOST_ATTEMPTS)(_call)
        left, waiting, known = iter(items), list[Any](), ray.put(function)
        while waiting := waiting + [task.remote(known, item) for item in islice(left, 2 * self.workers - len(waiting))]:
            done, waiting = ray.wait(waiting)
            with own_errors():
                yield from map(ray.get, done)

    def score(self, job: Job, parts: Sequence[Part]) -> Iterator[Json]:
        """As `bulk.in_process`, by actors that each hold a classifier; as parts are done, in any order.

        A part is an item and a block of its own, so that it is read, scored and written in one place, and done again
        in another if that is lost. A lost actor comes back as soon as there is room.
        """
        from ray import data

        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = data.from_items([{"part": json.dumps(part)} for part in parts], override_num_blocks=len(parts))
        share = {"num_gpus": 1} if self.gpus and job.device != "cpu" else {"num_cpus": 1}
        pool = data.ActorPoolStrategy(min_size=1, max_size=self.workers)
        done = items.map_batches(Actor, fn_constructor_args=(job,), batch_size=1, compute=pool, **share)
        with own_errors():
            yield from (json.loads(one["done"]) for one in done.iter_rows())

    def encode(self, encoder: Encoder, tokens: Tokens, layout: Sequence[str]) -> Iterator[Batch]:
        """As `encoder.encode`, with the same batches, so to the same bytes where processors are alike."""
        batches = list(like_length_batches(tokens.lengths))
        packs = (batches[start : start + TASK_BATCHES] for start in range(0, len(batches), TASK_BATCHES))
        source = str(Path(encoder.source).absolute()) if Path(encoder.source).is_dir() else encoder.source
        device: Any = encoder.placement.device.type
        compute = functools.partial(_encode, source, device, encoder.placement.precision, encoder.fingerprint, layout)
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
        from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
        from ray.train.torch import TorchConfig, TorchTrainer

        class GiveUp(UserCallback):  # type: ignore[misc]  # of Ray's classes mypy knows nothing here
            def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
                found = next(filter(None, map(ours, worker_exceptions.values())), None)
                if found is not None and not isinstance(found, TerminatedError):  # as of a node that is taken away
                    raise found

        folder, on_gpus = checkpoints.folder.absolute(), task.encoder.placement.device.type == "cuda"
        given = {"depth": depth, "folder": str(folder), "minutes": checkpoints.minutes}
        given["task"] = ray.put(ray.cloudpickle.dumps(task))
        nodes = [int(node["Resources"].get("GPU" if on_gpus else "CPU", 0)) for node in ray.nodes() if node["Alive"]]
        threads = 1 if on_gpus else threads_each(self.workers, nodes)
        trainer = TorchTrainer(
            _fine_tune,
            train_loop_config=given,
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.workers, use_gpu=on_gpus, resources_per_worker={"CPU": threads}
            ),
            run_config=RunConfig(
                name=secrets.token_hex(4),  # Ray would go on with a run of the same name
                storage_path=str(folder / RAY_FILES),
                callbacks=[GiveUp()],
                failure_config=FailureConfig(max_failures=MOST_RESTARTS),
            ),
        )
        with own_errors(), told(folder / RAY_FILES, checkpoints.announce):
            trainer.fit()
        at_end = Checkpoints(folder, checkpoints.minutes)
        if at_end.newest() is None:
            raise InputError(f"{folder}: workers left no checkpoint here: --out has to be on a disk that all share.")
        found = task.fit(depth, at_end)
        for number, epoch in enumerate(found.history.epochs):
            on_epoch(number, epoch)
        return found

    def serve(
        self, run: str, config: ServeConfig, device: Device, precision: Precision, announce: Callable[[str], None]
    ) -> None:
        """Serve a run folder by replicas of the same app behind Ray Serve's proxy, until Ctrl-C or SIGTERM.

        A `RunError` if it cannot be loaded, an `InputError` if the key cannot be used.
        """
        from ray import serve as ray_serve
        from ray.serve.config import HTTPOptions, ProxyLocation

        from headstart.serve.guard import key_of
        from headstart.serve.server import bind, url_of, warn_of_strangers

        key, on_loopback = key_of(config), self.on_loopback
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        # What is amiss is told here, and not by replicas.
        predict.load(run, device=device, precision=precision, min_confidence=config.min_confidence)
        with contextlib.closing(bind(config.host, config.port)) as bound:
            host, port = bound.getsockname()[:2]
        warn_of_strangers(host, key, announce)

        def build() -> Any:  # in each replica
            if on_loopback:
                _listen_on_loopback()
            from headstart.serve.app import Service, make_app

            classifier = predict.load(run, device=device, precision=precision, texts=math.inf).classifier
            return make_app(Service(Path(run), classifier, config, key))

        options = {"num_gpus": 1} if self.gpus and device != "cpu" else {"num_cpus": 1}
        deployment = ray_serve.deployment(
            ray_serve.ingress(build)(),
            num_replicas=self.workers,
            ray_actor_options=options,
            max_ongoing_requests=config.max_connections,  # so that it is the replica's own queue that refuses
            max_queued_requests=config.max_waiting,
        )
        ray_serve.start(http_options=HTTPOptions(host=host, port=port), proxy_location=ProxyLocation.HeadOnly)
        ray_serve.run(deployment.bind(), name="headstart")
        announce(f"Serving   {url_of(host, port)} by {count_of(self.workers, 'replica')}")
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        try:
            ended.wait()
        except KeyboardInterrupt:
            raise StoppedEarlyError("Ctrl-C: the replicas have stopped; what they had accepted was answered.") from None
        finally:
            ray_serve.delete("headstart")
            if not ray_serve.status().applications:  # else they go on
                ray_serve.shutdown()


class Actor:
    """What scores parts, one after the other, in Ray Data."""

    def __init__(self, job: Job) -> None:
        self.scorer = Scorer(job)

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Score the one part of a batch."""
        name, slices = json.loads(batch["part"][0])
        part = Part(name, [Slice(Table(*table), *rows) for table, *rows in slices])
        return {"done": [json.dumps(self.scorer(part))]}


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
        raise InputError(f"--workers {workers}: the cluster has {count_of(sum(cores), 'core')}; give fewer.")
    return fitting[-1]


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


@functools.lru_cache(maxsize=1)
def _encoder(source: str, device: Device, precision: Precision, fingerprint: str) -> Encoder:
    found = Encoder(source, choose_placement(device, precision))
    if found.fingerprint != fingerprint:
        raise ModelError(f"{source}: a worker has another model of this name, or another version of torch.")
    return found


def _encode(
    source: str,
    device: Device,
    precision: Precision,
    fingerprint: str,
    layout: Sequence[str],
    given: tuple[NDArray[np.int64], Tokens, Sequence[int]],
) -> Batch:
    """Some whole batches: where their texts are among all, their tokens, and the sizes of the batches."""
    index, tokens, sizes = given
    encoder = _encoder(source, device, precision, fingerprint)
    places = np.split(np.arange(len(index)), np.cumsum(sizes)[:-1])
    return index, np.concatenate([encode_batch(encoder, tokens, layout, some)[1] for some in places])


def _fine_tune(given: Json) -> None:
    """What each worker does of fine-tuning."""
    import ray

    folder, rank = Path(given["folder"]), seat().rank

    def announce(said: str) -> None:
        if rank == 0:
            with open(folder / RAY_FILES / TOLD, "a", encoding="utf-8") as file:
                file.write(said + "\n")

    def on_epoch(number: int, epoch: Epoch) -> bool:
        announce(f"Epoch {number + 1:<3} {epoch.words()}, {epoch.seconds:,.0f} s")
        return False

    task: FineTuning = ray.cloudpickle.loads(ray.get(given["task"]))  # made by this very program
    task.train(given["depth"], Checkpoints(folder, given["minutes"], announce), on_epoch=on_epoch)


def _listen_on_loopback() -> None:
    """Ray Serve lets each replica listen on all interfaces, for calls from other deployments, of which there are none.

    It has no setting for that (2.60); if the name below goes, replicas fail to start rather than be open to all.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


@contextlib.contextmanager
def told(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Announce what a worker says in a file of `folder`, while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOLD).touch()
    ended = threading.Event()

    def listen(file: TextIO) -> None:
        while not ended.wait(0.2):
            for line in file:
                announce(line.rstrip())

    with open(folder / TOLD, encoding="utf-8") as file:
        listener = threading.Thread(target=listen, args=(file,))
        listener.start()
        try:
            yield
        finally:
            time.sleep(0.3)  # for the last words
            ended.set()
            listener.join()
