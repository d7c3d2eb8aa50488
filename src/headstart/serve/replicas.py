"""The same app by replicas on a Ray cluster, behind Ray Serve's proxy. It knows Ray Serve, and no requests."""

import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve.config import HTTPOptions, ProxyLocation

from headstart import predict
from headstart.bulk import Job
from headstart.config import Device, Precision, ServeConfig
from headstart.errors import InputError, StoppedEarlyError, count_of
from headstart.scale import Cluster, device_of, shares_of_nodes, threads_each
from headstart.serve.guard import key_of
from headstart.serve.server import bind, url_of, warn_of_strangers


def serve(
    cluster: Cluster,
    run: str,
    config: ServeConfig,
    device: Device,
    precision: Precision,
    announce: Callable[[str], None],
) -> None:
    """Serve a run folder until Ctrl-C or SIGTERM, as the only one that this cluster serves.

    A `RunError` if it cannot be loaded, an `InputError` if the key cannot be used, or the cluster.
    """
    key, on_loopback = key_of(config), cluster.on_loopback
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    job = Job(run, "", None, config.min_confidence, device, precision, math.inf)
    cluster.check(job)  # what is amiss is told here, and not by replicas
    workers, share = cluster.room(device_of(job))
    threads_each(workers, shares_of_nodes("GPU" if "num_gpus" in share else "CPU"))
    if (there := ray_serve.status()).proxies or there.applications:
        raise InputError("--ray: the cluster serves something already. End that first: serve shutdown.")
    with contextlib.closing(bind(config.host, config.port)) as bound:
        host, port = bound.getsockname()[:2]
    warn_of_strangers(host, key, announce)

    def build() -> Any:  # in each replica
        if on_loopback:
            _listen_on_loopback()
        from headstart.serve.app import Service, make_app

        classifier = predict.load(run, device=device, precision=precision, texts=math.inf).classifier
        return make_app(Service(Path(run), classifier, config, key))

    deployment = ray_serve.deployment(
        ray_serve.ingress(build)(),
        num_replicas=workers,
        ray_actor_options=share,
        # It is the replica's own queue that refuses, by a 429; Ray's would say 503.
        max_ongoing_requests=config.max_connections,
        max_queued_requests=config.max_connections,
        graceful_shutdown_timeout_s=config.timeout,
    )
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as long as Ray waits for replicas
    try:
        ray_serve.start(http_options=HTTPOptions(host=host, port=port), proxy_location=ProxyLocation.HeadOnly)
        ray_serve.run(deployment.bind(), name="headstart")
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        announce(f"Serving   {url_of(host, port)} by {count_of(workers, 'replica')}")
        ended.wait()
    except KeyboardInterrupt:
        raise StoppedEarlyError("Ctrl-C: the replicas have stopped; what they had accepted was answered.") from None
    finally:
        ray_serve.shutdown()


def _listen_on_loopback() -> None:
    """Ray Serve lets each replica listen on all interfaces, for calls from other deployments, of which there are none.

    It has no setting for that (2.60); if the name below goes, replicas fail to start rather than be open to all.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))
