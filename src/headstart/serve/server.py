"""The server: its socket, its patience with slow clients, how it begins and ends. It knows nothing of texts."""

import asyncio
import functools
import ipaddress
import logging
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headstart.config import Device, Precision, ServeConfig
from headstart.errors import InputError, StoppedEarlyError
from headstart.predict import load
from headstart.serve.app import Service, make_app
from headstart.serve.guard import LOG, key_of

GRACE = 30  # seconds in which what was accepted is answered after SIGTERM
MOST_HEADER_BYTES = 65_536
FULL = b'{"error": "Too many connections are open.", "error_type": "Unhealthy"}'
FULL_HEAD = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\n"
    b"connection: close\r\n\r\n"
)


def serve(run: str, config: ServeConfig, device: Device, precision: Precision, announce: Callable[[str], None]) -> None:
    """Serve a run folder until SIGTERM or Ctrl-C; what was accepted by then is answered.

    A `RunError` if it cannot be loaded, an `InputError` if the address or the key cannot be used.
    """
    key = key_of(config)
    bound = bind(config.host, config.port)
    options: dict[str, Any] = {"min_confidence": config.min_confidence, "texts": math.inf}  # as many as come
    predictor = load(run, device=device, precision=precision, **options)
    predictor.predict(["to warm up"])
    bound.listen(2048)  # now that there will be an answer
    host, port = bound.getsockname()[:2]
    warn_of_strangers(host, key, announce)
    LOG.setLevel(logging.INFO)
    LOG.addHandler(logging.StreamHandler())
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else whoever sends nonsense fills the log
    protocol: Any = functools.partial(PatientProtocol, config)
    plain: dict[str, Any] = {"ws": "none", "log_config": None, "access_log": False, "server_header": False}
    url = url_of(host, port)
    app = make_app(Service(Path(run), predictor.classifier, config, key), lambda: announce(f"Serving   {url}"))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, timeout_graceful_shutdown=GRACE, **plain))
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        raise StoppedEarlyError("Ctrl-C: the server has stopped; what it had accepted was answered.") from None


def warn_of_strangers(host: str, key: str | None, announce: Callable[[str], None]) -> None:
    """Say so where others than this machine's own users can ask without a key."""
    if key is None and not ipaddress.ip_address(host).is_loopback:
        announce(f"Warning   {host} can be reached by others, and no key is asked for: see --api-key-env.")


def url_of(host: str, port: int) -> str:
    """The address to ask at."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address of its own; an `InputError` if that cannot be had."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}). Choose another."
        ) from error
    return bound


class PatientProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP, but for its endless patience.

    It closes a connection whose request's headers, or then its body, do not come in time, or whose headers are too
    large, and one that is too many.
    """

    def __init__(self, limits: ServeConfig, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.limits = limits
        self.timer: asyncio.TimerHandle | None = None
        self.in_head, self.received = True, 0  # whether headers are awaited; bytes of this request so far

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        """Refuse one too many, or wait for its headers."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.write(FULL_HEAD % len(FULL) + FULL)
            transport.close()
        else:
            self.wait()

    def data_received(self, data: bytes) -> None:
        """Count what comes before a request's headers are whole."""
        self.received += len(data)
        super().data_received(data)
        if self.in_head and self.received > MOST_HEADER_BYTES:
            self.transport.abort()

    def wait(self) -> None:
        """Give up unless `stop` is called in time."""
        self.stop()
        self.timer = self.loop.call_later(self.limits.read_timeout, self.transport.abort)

    def stop(self) -> None:
        """What was waited for has come."""
        if self.timer is not None:
            self.timer.cancel()

    def on_message_begin(self) -> None:
        """A request has begun: wait for its headers."""
        super().on_message_begin()
        self.wait()

    def on_headers_complete(self) -> None:
        """Its headers are there: wait for its body."""
        super().on_headers_complete()
        self.in_head = False
        self.wait()

    def on_message_complete(self) -> None:
        """All of it is there."""
        super().on_message_complete()
        self.in_head, self.received = True, 0
        self.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there to wait for."""
        super().connection_lost(exc)
        self.stop()
