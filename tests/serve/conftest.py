"""Real servers under test: as a process of their own, or in a thread whose inside can be reached."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from headstart import predict
from headstart.config import ServeConfig
from headstart.serve.app import Service, make_app
from headstart.serve.server import bind


@dataclass
class Served:
    """A server process: where it is, and what it says on stderr."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@contextlib.contextmanager
def serving(
    run: Path, log: Path, *flags: str, start: Sequence[str] = ("-m", "headstart.cli"), **environment: str
) -> Iterator[Served]:
    """`headstart serve` in a process of its own, until the block ends; `start` is how Python gets at headstart."""
    command = [sys.executable, *start, "serve", str(run), "--port", "0", *flags]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, **environment})
    try:
        limit = time.monotonic() + 60
        while not (found := re.search(r"Serving +(http\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, "it did not start"
            time.sleep(0.02)
        yield Served(found[1], process, log)
    finally:
        process.kill()
        process.wait()


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture
def serve(exported_run: Path, tmp_path: Path) -> Serve:
    """A function that starts a server of the exported run, which is quick to start, with some flags."""

    def start(*flags: str, run: Path = exported_run, **environment: str) -> AbstractContextManager[Served]:
        return serving(run, tmp_path / "serve.log", *flags, **environment)

    return start


@pytest.fixture(scope="module")
def served(exported_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with its defaults, of one module's tests."""
    with serving(exported_run, tmp_path_factory.mktemp("served") / "serve.log") as found:
        yield found


@contextlib.contextmanager
def inside(run: Path, **limits: Any) -> Iterator[tuple[str, Service]]:
    """A server in a thread of this process, and its service."""
    service = Service(run, predict.load(run, device="cpu", precision="fp32").classifier, ServeConfig(**limits))
    bound = bind("127.0.0.1", 0)
    bound.listen()
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None, ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
