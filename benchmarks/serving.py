"""The group on serving: a run folder behind `headstart serve`, beside a plain endpoint around the same model."""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import OFFLINE, BenchError, Numbers, Samples, alternate, run_child
from setting import DATA, HEADSTART, HERE, OURS, PEERS, THEIRS, Bench, Ratio, headstart, trained_run

CLIENTS, BATCH, SLOW = 64, 16, 500
START_SECONDS = 120
TEN = 10  # times the load that can be borne


@contextlib.contextmanager
def server(command: Sequence[str | Path], ready: str) -> Iterator[tuple[str, int]]:
    """A server process: its address, which it says in the group of `ready` on stderr, and its id. It is ended after."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([str(word) for word in command], stderr=log, env={**os.environ, **OFFLINE})
        try:
            limit = time.monotonic() + START_SECONDS
            while not (found := re.search(ready, Path(log.name).read_text())):
                if process.poll() is not None or time.monotonic() > limit:
                    raise BenchError(f"{command}: did not start: {Path(log.name).read_text()[-2000:]}")
                time.sleep(0.05)
            yield found[1], process.pid
        finally:
            process.kill()
            process.wait()


def plain(run: Path) -> contextlib.AbstractContextManager[tuple[str, int]]:
    """The plain endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return server([THEIRS, PEERS / "pipeline_server.py", run, str(port)], r"running on (http\S+)")


def ours(run: Path, *flags: str) -> contextlib.AbstractContextManager[tuple[str, int]]:
    """`headstart serve`."""
    return server([HEADSTART, "serve", run, "--port", "0", *flags], r"Serving +(http\S+)")


def load(url: str, *words: str) -> Numbers:
    """What load.py measured."""
    return run_child([OURS, HERE / "load.py", url, DATA / "sst2" / "test.csv", *words], limit=300).said


def resident(process: int) -> float:
    """A process's memory in bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


@contextlib.contextmanager
def slow_clients(url: str) -> Iterator[None]:
    """Connections that stop in the middle of their headers, or of their body."""
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    with contextlib.ExitStack() as stack:
        for number in range(SLOW):
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.sendall(head if number % 2 else head + b"\r\n{")
        yield


def serve(bench: Bench, samples: Samples) -> list[Ratio]:
    """Serving SST-2's test sentences on loopback: many clients at once, ten times too many, and slow ones."""
    run, seconds = trained_run(bench, "native"), str(bench.size(10, 2))
    small = bench.work / "run-int8"
    subprocess.run(["cp", "-r", str(run), str(small)], check=True)
    headstart("export", small, "--int8", "--force")
    many = ("--clients", str(CLIENTS), "--seconds", seconds)
    servers = {
        "plain endpoint": lambda: plain(run),
        "headstart": lambda: ours(run),
        "headstart, int8 export": lambda: ours(small),
    }

    def measure(name: str) -> None:
        with servers[name]() as (url, _):
            load(url, "--clients", "8", "--seconds", "2")  # to warm up
            samples.add(name, load(url, *many))

    alternate([(name, bench.repeats, lambda name=name: measure(name)) for name in servers])  # type: ignore[misc]
    rate = TEN * samples.median("headstart", "texts_a_second") / BATCH
    with ours(run, "--timeout", "10") as (url, process):
        hard_words = ("--rate", str(rate), "--batch", str(BATCH), "--seconds", str(bench.size(20, 3)))
        load(url, *many)
        load(url, *hard_words)
        before = resident(process)  # what such load takes has been taken
        hard = load(url, *hard_words)
        samples.add("ten times the load", {**hard, "rate": rate, "memory_grew": resident(process) / before})
    with ours(run, "--read-timeout", "60") as (url, _):
        few = ("--clients", "8", "--seconds", seconds)
        load(url, *few)
        samples.add("without slow clients", load(url, *few))
        with slow_clients(url):
            samples.add("with slow clients", load(url, *few))
    return ratios(samples)


def ratios(samples: Samples) -> list[Ratio]:
    """What the group says of what it measured."""
    what, against = f"serving, {CLIENTS} clients at once, a sentence a request", "FastAPI around transformers.pipeline"
    found = []
    for name, add in (("headstart", ""), ("headstart, int8 export", ", int8 export")):
        gain, late = (
            samples.median(name, number) / samples.median("plain endpoint", number)
            for number in ("texts_a_second", "answered_p99")
        )
        goal = "" if add else "at least 4"
        found.append(Ratio(what + add, against, gain, note=f"p99 latency {late:.0%} of its", goal=goal))
    hard = {name: samples.median("ten times the load", name) for name in samples.of["ten times the load"][0]}
    what = f"{TEN} times the load it can bear"
    late = f"{hard['status_429']:,.0f} refused, {hard['status_200']:,.0f} answered"
    found.append(Ratio(f"{what}: p99 of refusals", "50 ms", hard["refused_p99"] / 0.05, "share", late, "at most 100%"))
    found.append(Ratio(f"{what}: slowest answer", "its deadline of 10 s", hard["answered_max"] / 10, "share"))
    found.append(Ratio(f"{what}, twice as long: memory", "after half of it", hard["memory_grew"], "share", goal="flat"))
    slowed = samples.median("with slow clients", "answered_p99") / samples.median(
        "without slow clients", "answered_p99"
    )
    found.append(Ratio(f"p99 beside {SLOW} slow clients", "without them", slowed, "share", goal="at most 200%"))
    return found
