"""What is looked at before a request is read: the key, whether the queue is full, its size. No text is ever logged."""

import hmac
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.config import ServeConfig
from headstart.errors import InputError
from headstart.serve.schema import failure

LOG = logging.getLogger("headstart.serve")
KNOWN = ("/", "/predict", "/explain", "/info", "/health", "/metrics", "/docs", "/openapi.json")
OPEN = ("/", "/health", "/docs", "/openapi.json")  # what a GET needs no key for, with the page's files
MOST_HELD = 64_000_000  # bytes of bodies that are being read, all together
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def key_of(config: ServeConfig) -> str | None:
    """The key that clients must send, None without one; an `InputError` if the environment lacks it."""
    key = os.environ.get(config.api_key_env) if config.api_key_env is not None else None
    if config.api_key_env is not None and not key:
        raise InputError(f"--api-key-env: the environment has no {config.api_key_env}, or an empty one.")
    return key


@dataclass
class Door:
    """What the guard goes by: limits, the key (None: everybody may come in), how many texts wait, where it counts."""

    config: ServeConfig
    key: str | None
    waiting: Callable[[], int]
    registry: CollectorRegistry
    held: int = field(default=0, init=False)  # bytes of bodies that are being read

    def __post_init__(self) -> None:
        names = ("path", "status"), ("path",)
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("headstart_requests", "Requests answered.", names[0], **more)
        self.seconds = Histogram("headstart_request_seconds", "Seconds from request to answer.", names[1], **more)
        self.rejected = Counter("headstart_rejected", "Requests refused with 429.", **more)

    def opens(self, authorization: bytes) -> bool:
        """Whether the key, if there is one, came with a request."""
        given = authorization.removeprefix(b"Bearer ")
        return self.key is None or hmac.compare_digest(given, self.key.encode())


class Guard:
    """Stands before the application; adds headers to answers, counts and logs them."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 499

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        try:
            await (self.refusal(scope) or self.with_body)(scope, receive, sent)
        except Exception as error:  # a fault of ours; its message may hold a text
            if status != 499:
                raise  # the answer had begun
            where = [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)]
            LOG.error(json.dumps({"fault": type(error).__name__, "where": where}))
            await failure(500, "Internal", "This is a fault of the server's.")(scope, receive, sent)
        finally:
            path, seconds = scope["path"] if scope["path"] in KNOWN else "other", time.perf_counter() - begun
            self.door.requests.labels(path, status).inc()
            self.door.rejected.inc(status == 429)
            self.door.seconds.labels(path).observe(seconds)
            entry = {"method": scope["method"], "path": path, "status": status, "ms": round(1000 * seconds, 1)}
            LOG.info(json.dumps(entry))

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that is refused unread."""
        headers, path, post = dict(scope["headers"]), scope["path"], scope["method"] == "POST"
        is_open = path.startswith("/page/") or (path in OPEN and not post)
        if not is_open and not self.door.opens(headers.get(b"authorization", b"")):
            return failure(401, "Unauthorized", "A key is needed: Authorization: Bearer KEY.")
        if post and (waiting := self.door.waiting()) >= self.door.config.max_waiting:
            return failure(429, "Overloaded", f"{waiting:,} texts wait already.")
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.door.config.max_body_bytes:
            return self.too_large()
        return None

    async def with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a request's body, no more of it than may be, and pass it on; then only the client's leaving is heard."""
        body, more, refused = bytearray(), True, None
        try:
            while more and refused is None:
                message = await receive()
                chunk, more = message.get("body", b""), message.get("more_body", False)
                body += chunk
                self.door.held += len(chunk)
                if len(body) > self.door.config.max_body_bytes:
                    refused = self.too_large()
                elif self.door.held > MOST_HELD:
                    refused = failure(429, "Overloaded", "Too much is being read.")
        finally:
            self.door.held -= len(body)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def taken() -> Message:
            return whole.pop() if whole else await receive()

        await (refused or self.app)(scope, taken, send)

    def too_large(self) -> Response:
        """The answer to a body that is."""
        return failure(413, "Too large", f"The body is over {self.door.config.max_body_bytes:,} bytes.")
