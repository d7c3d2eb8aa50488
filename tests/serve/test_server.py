"""How the server begins, ends, and bears clients that are slow, many, or send nonsense."""

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from tests.conftest import LIGHT
from tests.serve.conftest import Serve, Served, serving

HEAD = b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 15\r\n"
BODY = b'{"inputs": "a"}'


def connect(served: Served) -> socket.socket:
    where = urlsplit(served.url)
    assert where.hostname is not None
    assert where.port is not None
    return socket.create_connection((where.hostname, where.port), timeout=20)


def closed_after(client: socket.socket) -> float:
    """Seconds until the server ends a connection."""
    begun = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while client.recv(65536):
            pass
    return time.monotonic() - begun


def test_a_plain_socket_is_served(served: Served) -> None:
    with connect(served) as client, client.makefile("rb") as answers:
        for _ in range(2):  # the connection is kept
            client.sendall(HEAD + b"\r\n" + BODY)
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            sizes = [int(line.split(b":")[1]) for line in iter(answers.readline, b"\r\n") if b"content-length" in line]
            assert b'"label"' in answers.read(sizes[0])


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"\r\n", HEAD + b"\r\n" + BODY[:5]])
def test_headers_and_bodies_that_do_not_come_end_the_connection(serve: Serve, sent: bytes) -> None:
    with serve("--read-timeout", "0.5") as served, connect(served) as client:
        client.sendall(sent)
        assert 0.3 < closed_after(client) < 3


def test_trickling_does_not_help(serve: Serve) -> None:
    with serve("--read-timeout", "0.5") as served, connect(served) as client:
        begun = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for letter in HEAD * 10:
                client.sendall(bytes([letter]))
                time.sleep(0.05)
        assert time.monotonic() - begun < 10, "all of it would take a minute"


def test_endless_headers_end_the_connection(served: Served) -> None:
    with connect(served) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(b"GET /health HTTP/1.1\r\n")
        for number in range(3000):
            client.sendall(b"X-%d: %s\r\n" % (number, b"a" * 1000))
        pytest.fail("three megabytes of headers were taken")


@pytest.mark.parametrize("nonsense", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\0" * 100])
def test_what_is_no_http_is_refused(served: Served, nonsense: bytes) -> None:
    with connect(served) as client:
        client.sendall(nonsense)
        assert closed_after(client) < 3
    assert httpx.get(served.url + "/health").status_code == 200


def test_one_connection_too_many_is_told_and_closed(serve: Serve) -> None:
    with serve("--max-connections", "3") as served:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connect(served))
            time.sleep(0.1)
            answer = httpx.get(served.url + "/health")
            assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
        time.sleep(0.1)
        assert httpx.get(served.url + "/health").status_code == 200


@contextlib.contextmanager
def slow_clients(served: Served, count: int) -> Iterator[list[socket.socket]]:
    """So many connections, half of which stop in their headers, half in their body."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(served)) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(HEAD if number % 2 else HEAD + b"\r\n" + BODY[:3])
        yield clients


def p99(url: str) -> float:
    """Of the seconds that a hundred requests take, one after another."""
    seconds = []
    with httpx.Client() as client:
        for _ in range(100):
            begun = time.perf_counter()
            assert client.post(url + "/predict", json={"inputs": "the film was superb"}).status_code == 200
            seconds.append(time.perf_counter() - begun)
    return statistics.quantiles(seconds, n=100)[98]


def test_five_hundred_slow_clients_disturb_nobody_and_are_closed(serve: Serve) -> None:
    with serve("--read-timeout", "6") as served:
        before = p99(served.url)
        with slow_clients(served, 500) as clients:
            assert httpx.get(served.url + "/health").status_code == 200
            assert p99(served.url) < max(20 * before, 1), "the benchmark measures it more closely"
            assert max(map(closed_after, clients)) < 12


def test_sigterm_answers_what_was_accepted_then_ends(serve: Serve) -> None:
    with serve() as served:
        texts = [[f"the film {i} was superb and the soup was awful"] for i in range(32)]
        found: list[int] = []

        def ask() -> None:
            with contextlib.suppress(httpx.TransportError):  # of one that came too late to be accepted
                found.append(httpx.post(served.url + "/predict", json={"inputs": texts}, timeout=20).status_code)

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        limit = time.monotonic() + 5  # they may all be answered before the first look
        while "headstart_queue_texts 0.0" in httpx.get(served.url + "/metrics").text and time.monotonic() < limit:
            time.sleep(0.002)
        code = served.stop()
        for client in clients:
            client.join()
        assert code == -signal.SIGTERM
        assert found.count(200) >= 1
        assert set(found) <= {200, 429}
        with pytest.raises(httpx.ConnectError):
            httpx.get(served.url + "/health")


def test_ctrl_c_ends_with_130(serve: Serve) -> None:
    with serve() as served:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(20) == 130
        assert "the server has stopped" in served.log.read_text()


def test_an_exported_run_is_served_without_torch_or_transformers(exported_run: Path, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    with serving(exported_run, log, start=("-c", LIGHT)) as served:
        for path in ("/predict", "/"):
            assert httpx.post(served.url + path, json={"inputs": "the film was superb"}).status_code == 200
        for path in ("/info", "/metrics", "/docs", "/health"):
            assert httpx.get(served.url + path).status_code == 200
        served.process.send_signal(signal.SIGINT)
        served.process.wait(20)
    assert log.read_text().splitlines()[-1] == "loaded:"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headstart.cli", "serve", *arguments]
    everything = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=everything)


def test_what_cannot_be_served_is_said_in_a_sentence(exported_run: Path, served: Served, tmp_path: Path) -> None:
    taken = str(urlsplit(served.url).port)
    for arguments, said in (
        ((str(exported_run), "--port", taken), f"--port {taken}: cannot be listened on"),
        ((str(exported_run), "--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
        ((str(exported_run), "--api-key-env", "NOT_THERE"), "the environment has no NOT_THERE"),
        ((str(exported_run), "--max-batch", "0"), "--max-batch must be more than 0"),
        ((str(tmp_path / "nowhere"),), "no such run folder"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_an_empty_key_is_no_key(exported_run: Path) -> None:
    assert "or an empty one" in run(str(exported_run), "--api-key-env", "EMPTY", EMPTY="").stderr


def test_without_a_key_it_warns_when_others_can_reach_it(serve: Serve) -> None:
    with serve("--host", "0.0.0.0") as served:
        assert "can be reached by others" in served.log.read_text()
    with serve("--host", "0.0.0.0", "--api-key-env", "KEY", KEY="k") as served:
        assert "can be reached by others" not in served.log.read_text()


def test_each_line_of_the_log_is_json(served: Served) -> None:
    httpx.get(served.url + "/health")
    first, *lines = served.log.read_text().splitlines()
    assert first.startswith("Serving ")
    assert [json.loads(line) for line in lines][-1]["path"] == "/health"
