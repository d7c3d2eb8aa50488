"""The guard before an application: what is refused unread, how much is read, and what it adds, counts and logs."""

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from headstart.config import ServeConfig
from headstart.serve import guard
from headstart.serve.guard import Door, Guard


def door(waiting: int = 0, key: str | None = None, **limits: Any) -> Door:
    return Door(ServeConfig(**limits), key, lambda: waiting, CollectorRegistry())


def pass_through(
    one: Door, chunks: Iterable[bytes] = (b"{}",), method: str = "POST", path: str = "/predict", **headers: str
) -> tuple[int, dict[str, str], bytes | None]:
    """Status and headers of the answer, and the body that the application behind the guard got, if any."""
    got: list[bytes] = []
    answers: list[Message] = []
    pieces = iter(chunks)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: Message) -> None:
        answers.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": named}
    asyncio.run(Guard(app, one)(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in answers[0]["headers"]}
    return answers[0]["status"], told, got[0] if got else None


def test_a_body_is_handed_on_whole() -> None:
    one = door()
    status, headers, body = pass_through(one, [b"{", b"", b"}"])
    assert (status, body) == (200, b"{}")
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert one.held == 0


def test_no_more_of_a_body_is_read_than_may_be() -> None:
    one = door(max_body_bytes=10)
    assert pass_through(one, [b"12345"] * 2)[0] == 200
    taken: list[int] = []

    def chunks() -> Iterable[bytes]:
        for number in range(100):
            taken.append(number)
            yield b"12345"

    status, _, body = pass_through(one, chunks())
    assert (status, body, taken) == (413, None, [0, 1, 2])
    assert pass_through(one, content_length="11")[0] == 413
    assert pass_through(one, content_length="nonsense")[0] == 200
    assert one.held == 0


def test_bodies_together_may_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_HELD", 100)
    one = door()
    one.held = 99  # of others, who are still sending
    status, headers, body = pass_through(one)
    assert (status, headers["retry-after"], body) == (429, "1", None)
    assert one.held == 99


def test_a_full_queue_is_told_before_the_body_is_read() -> None:
    status, headers, body = pass_through(door(waiting=512), [])
    assert (status, headers["retry-after"], body) == (429, "1", None)
    assert pass_through(door(waiting=512), method="GET", path="/health")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "opened"),
    [
        *(("GET", path, True) for path in ("/", "/health", "/docs", "/openapi.json", "/page/page.js")),
        *(("GET", path, False) for path in ("/info", "/metrics", "/predict", "/pages", "/x/page/")),
        *(("POST", path, False) for path in ("/", "/predict", "/explain", "/health")),
    ],
)
def test_the_key_is_asked_for_everywhere_but_at_the_page(method: str, path: str, opened: bool) -> None:
    one = door(key="secret")
    assert pass_through(one, method=method, path=path)[0] == (200 if opened else 401)
    assert pass_through(one, method=method, path=path, authorization="Bearer secret")[0] == 200
    assert pass_through(one, method=method, path=path, authorization="Bearer Secret")[0] == (200 if opened else 401)


def test_a_fault_of_ours_is_answered_counted_and_logged_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    one, answers = door(), list[Message]()

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("a text")

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    with caplog.at_level(logging.INFO, "headstart.serve"):
        asyncio.run(Guard(fails, one)(scope, receive, send))
    assert answers[0]["status"] == 500
    assert json.loads(answers[1]["body"])["error_type"] == "Internal"
    assert one.registry.get_sample_value("headstart_requests_total", {"path": "/predict", "status": "500"}) == 1
    assert '"fault": "ValueError"' in caplog.text
    assert "test_guard.py" in caplog.text
    assert "a text" not in caplog.text


def test_what_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    one = door()
    with caplog.at_level(logging.INFO, "headstart.serve"):
        pass_through(one, [b"a text"], path="/predict")
        pass_through(one, [b"a text"], path="/somewhere/else")
    entries = [json.loads(record.message) for record in caplog.records]
    assert [(entry["path"], entry["status"]) for entry in entries] == [("/predict", 200), ("other", 200)]
    assert "a text" not in caplog.text
    assert one.registry.get_sample_value("headstart_requests_total", {"path": "other", "status": "200"}) == 1
