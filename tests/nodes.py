"""A Ray cluster of several nodes on this machine's loopback, for tests: a head without work, and nodes of one core.

Run as a program: it prints a line of JSON with the address and the process ids of the nodes; for each line that it
reads it adds a node and prints its id; it ends all it has begun when its input ends. Ray is never imported in the
process of the tests.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

HEADSTART = [sys.executable, "-m", "headstart.cli"]
Begin = Callable[..., subprocess.Popen[str]]


class Nodes(NamedTuple):
    """A running cluster: what drivers need in their environment, and process ids of nodes, which a test may kill."""

    address: str
    environment: dict[str, str]
    raylets: list[int]
    process: Any

    def add(self) -> None:
        """One more node."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.raylets.append(int(self.process.stdout.readline()))


@contextlib.contextmanager
def running(count: int) -> Iterator[Nodes]:
    """So many nodes, with a token of their own."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **own, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, __file__, str(count)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            yield Nodes(**json.loads(process.stdout.readline()), environment=environment, process=process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 300) -> tuple[str, str]:
    """What a process said on stdout and stderr, once it has ended as it should."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    return out, err


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def listening(processes: Iterable[psutil.Process]) -> list[str]:
    """Addresses where processes listen."""
    found = list[str]()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's come and go
            found += [one.laddr.ip for one in process.net_connections() if one.status == "LISTEN"]
    return [ip.removeprefix("::ffff:") for ip in found]


def main(count: int) -> None:
    """Start the nodes, and do as told."""
    from ray.cluster_utils import Cluster

    more: dict[str, Any] = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **more})

    def add() -> int:
        return int(cluster.add_node(num_cpus=1, **more).all_processes["raylet"][0].process.pid)

    print(json.dumps({"address": cluster.address, "raylets": [add() for _ in range(count)]}), flush=True)
    for _ in sys.stdin:
        print(add(), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # it has names of libraries
    main(int(sys.argv[1]))
