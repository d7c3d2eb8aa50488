"""The HTTP contract: text-embeddings-inference's dialect at /predict, Hugging Face's at /, page, health and metrics.

This room knows requests and answers. It does not know what computes: torch is loaded only by /explain, of a run that
was not exported. No text is ever logged.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field, StrictBool, field_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.config import ServeConfig
from headstart.errors import HeadstartError
from headstart.predict import ABSTAIN, probabilities_of, token_logits
from headstart.runs import Classifier, read_json
from headstart.serve.queue import Batcher, EngineDownError, Ids, Logits, OverloadedError, PoisonError
from headstart.tokens import ragged

PAGE = Path(__file__).with_name("page")
OPEN = ("/", "/health", "/docs", "/openapi.json")  # what needs no key, with the page's files; POST / does
SHORT = 20_000  # characters that are tokenised at once; more, in a thread
BATCH_TOKENS = 4096
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOG = logging.getLogger("headstart.serve")
Answer = TypeVar("Answer")


class ErrorAnswer(BaseModel):
    """What went wrong, and which kind of thing that is."""

    error: str
    error_type: str


class LabelScore(BaseModel):
    """A label and how likely it is, or its logit."""

    score: float
    label: str


def told(**schema: Any) -> Any:
    """What the schema says of a field whose refusals we word ourselves."""
    return Field(json_schema_extra=schema)


Text = Annotated[str, told(minLength=1, pattern=r"\S")]


class PredictRequest(BaseModel):
    """One text, or a batch of them: [["a"], ["b"]]."""

    inputs: Text | Annotated[list[Annotated[list[Text], told(minItems=1, maxItems=1)]], told(minItems=1, maxItems=32)]
    truncate: StrictBool = Field(default=True, description="Cut what is too long, rather than refuse it.")
    raw_scores: StrictBool = Field(default=False, description="Logits instead of probabilities.")

    @field_validator("inputs", mode="before")
    @classmethod
    def no_pairs(cls, inputs: Any) -> Any:
        """Refuse sentence pairs, with a message that shows a batch."""
        if isinstance(inputs, list) and any(not isinstance(one, list) or len(one) != 1 for one in inputs):
            raise ValueError(
                'A list of strings is a sentence pair, which this model does not take; a batch is [["a"], ["b"]].'
            )
        return inputs


class Parameters(BaseModel):
    """What Hugging Face's clients may ask for."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None


class PipelineRequest(BaseModel):
    """As Hugging Face's inference API has it: a text or several."""

    inputs: Text | Annotated[list[Text], told(minItems=1, maxItems=32)]
    parameters: Parameters = Parameters()


class ExplainRequest(BaseModel):
    """A text whose label is to be explained."""

    inputs: Text


class RefusedError(HeadstartError):
    """A request that gets an answer of this status."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


STATUSES = {400: "Empty", 401: "Unauthorized", 413: "Too large", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": STATUSES[code]} for code in STATUSES
}


def failure(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as both dialects have it."""
    needed = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse({"error": message, "error_type": kind}, status, headers or needed.get(status))


class Service:
    """A run folder's classifier with its queue: what the endpoints answer from."""

    def __init__(self, run: Path, classifier: Classifier, config: ServeConfig, key: str | None = None) -> None:
        self.run, self.classifier, self.config, self.key = run, classifier, config, key
        self.registry = CollectorRegistry()

        def metric(kind: Any, name: str, about: str, labels: Sequence[str] = (), **more: Any) -> Any:
            return kind(f"headstart_{name}", about, labels, registry=self.registry, **more)

        self.requests = metric(Counter, "requests", "Requests answered.", ("path", "status"))
        self.seconds = metric(Histogram, "request_seconds", "Seconds from request to answer.", ("path",))
        self.rejected = metric(Counter, "rejected", "Requests refused since too many texts waited.")
        sizes = metric(Histogram, "batch_texts", "Texts scored together.", buckets=[2**i for i in range(10)])
        limits = {"most_waiting": config.max_waiting, "most_tokens": BATCH_TOKENS}
        self.batcher = Batcher(self.score, **limits, on_batch=sizes.observe)
        metric(Gauge, "queue_texts", "Texts that wait.").set_function(lambda: self.batcher.admitted)
        self.explaining = asyncio.Lock()

    def score(self, texts: Sequence[Ids]) -> Logits:
        """(n, labels) logits of token ids, shared by all cores."""
        tokens, workers = ragged(texts), self.classifier.workers
        share = max(64, int(tokens.lengths.sum()) // workers)
        return token_logits(self.classifier, tokens, min(2048, share), self.classifier.side_by_side)

    async def logits(self, request: Request, texts: Sequence[str], *, truncate: bool) -> Logits:
        """(n, labels) logits of a request's texts; a `RefusedError` where it gets none."""
        check_readable(texts)
        if len(texts) > self.config.max_batch:
            raise RefusedError(
                413, "Too large", f"{len(texts):,} texts are more than {self.config.max_batch} a request."
            )
        with self.batcher.places(len(texts)):
            return await self.unless_left(request, self.tokenized(texts, truncate=truncate))

    async def tokenized(self, texts: Sequence[str], *, truncate: bool) -> Logits:
        """Tokenise, and have scored."""
        tokenizer, limit = self.classifier.tokenizer, self.classifier.max_length
        short = sum(map(len, texts)) <= SHORT
        tokens = tokenizer(texts) if short else await asyncio.to_thread(tokenizer, texts)
        if not truncate and (longest := int(tokens.lengths.max())) > limit:
            raise RefusedError(
                422, "Validation", f"A text has {longest:,} tokens, of at most {limit}; or set truncate."
            )
        cut = tokenizer.truncate(tokens, limit)
        return await self.batcher.logits([cut[i] for i in range(len(cut))])

    async def unless_left(self, request: Request, work: Awaitable[Answer]) -> Answer:
        """What `work` comes to, unless the client leaves or the time is up before."""
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({task, left}, timeout=self.config.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if left.done():
                raise RefusedError(499, "Left", "The client has left.")
            raise RefusedError(503, "Timeout", f"There was no answer within {self.config.timeout:g} s.")
        finally:
            task.cancel()
            left.cancel()

    def ranked(self, scores: NDArray[np.float64], *, abstain: bool = True) -> list[dict[str, Any]]:
        """All labels of one text, the likeliest first; before them `abstain`, if that one is too unlikely."""
        order = np.argsort(-scores, kind="stable").tolist()
        found = [{"score": float(scores[i]), "label": self.classifier.names[i]} for i in order]
        if abstain and found[0]["score"] < self.config.min_confidence:
            found.insert(0, {"score": found[0]["score"], "label": ABSTAIN})
        return found

    async def predict(self, request: Request, body: PredictRequest) -> Response:
        """Score a text, or a batch of them, as text-embeddings-inference does."""
        texts = [body.inputs] if isinstance(body.inputs, str) else [one for (one,) in body.inputs]
        logits = await self.logits(request, texts, truncate=body.truncate)
        scores = logits.astype(np.float64) if body.raw_scores else probabilities_of(logits)
        found = [self.ranked(one, abstain=not body.raw_scores) for one in scores]
        return JSONResponse(found[0] if isinstance(body.inputs, str) else found)

    async def pipeline(self, request: Request, body: PipelineRequest) -> Response:
        """Score a text or several, as Hugging Face's inference API does: nested even for one text."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        logits = (await self.logits(request, texts, truncate=True)).astype(np.float64)
        applied = body.parameters.function_to_apply or "softmax"
        scores = {"softmax": probabilities_of, "sigmoid": sigmoid, "none": lambda same: same}[applied](logits)
        found = [self.ranked(one, abstain=applied == "softmax")[: body.parameters.top_k] for one in scores]
        return JSONResponse(found)

    async def explain(self, request: Request, body: ExplainRequest) -> Response:
        """Which words pushed the label of a text; not for a run that was exported, which torch does not score."""
        if not self.explains:
            raise RefusedError(404, "Not found", "This run was exported; only torch can explain.")
        check_readable([body.inputs])
        if self.explaining.locked():
            raise OverloadedError("Another text is being explained.")
        async with self.explaining:
            return JSONResponse(await self.unless_left(request, asyncio.to_thread(self.explanation, body.inputs)))

    def explanation(self, text: str) -> dict[str, Any]:
        """An explanation as JSON has it."""
        from headstart.explain import explain

        found = explain(self.exact, text, "gradients at a few points")
        return {**found._asdict(), "words": [word._asdict() for word in found.words]}

    @functools.cached_property
    def exact(self) -> Any:
        """The classifier in fp32, of which gradients are taken; loaded when first asked for."""
        from headstart.encoder import choose_placement
        from headstart.model import load_run

        return load_run(self.run, choose_placement("auto", "fp32"))

    @property
    def explains(self) -> bool:
        """Whether torch is here to explain."""
        return hasattr(self.classifier, "model")

    async def info(self) -> Response:
        """What is served, how it did on its test part, and its limits."""
        names, info, config = self.classifier.names, self.classifier.info, self.config
        tested = {}
        if (self.run / "metrics.json").is_file():
            tested = read_json(self.run, "metrics.json").get("test", {})
        wanted = ("n", "accuracy", "accuracy_ci95", "macro_f1", "ece")
        return JSONResponse(
            {
                "model_id": self.run.resolve().name,
                "version": version("headstart"),
                "model_type": {"classifier": {"id2label": dict(enumerate(names))}},
                "labels": list(names),
                "max_input_length": self.classifier.max_length,
                "max_client_batch_size": config.max_batch,
                "max_concurrent_requests": config.max_waiting,
                "auto_truncate": True,
                "calibrated": info.get("calibration", {}).get("method", "none") != "none",
                "min_confidence": config.min_confidence,
                "explains": self.explains,
                "test": {name: tested[name] for name in wanted} if tested else None,
                "limits": info.get("limits", []),
            }
        )

    async def front(self, request: Request) -> Response:
        """The page, for a browser; else what `/info` says."""
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(PAGE / "index.html")
        if not self.lets_in(request.headers.get("authorization", "").encode("latin-1")):
            raise RefusedError(401, "Unauthorized", UNAUTHORIZED)
        return await self.info()

    async def docs(self) -> Response:
        """How to ask, in words; the schema is at /openapi.json."""
        return FileResponse(PAGE / "docs.html")

    async def health(self) -> Response:
        """Whether texts can be scored."""
        if not self.batcher.engine.works():
            raise EngineDownError("The engine is down.")
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    def lets_in(self, authorization: bytes) -> bool:
        """Whether the key, if there is one, came with a request."""
        given = authorization.removeprefix(b"Bearer ")
        return self.key is None or hmac.compare_digest(given, self.key.encode())


UNAUTHORIZED = "A key is needed: Authorization: Bearer KEY."


def check_readable(texts: Sequence[str]) -> None:
    """Refuse, by a `RefusedError`, texts in which there is nothing to read."""
    if not texts or not all(text.strip() for text in texts):
        raise RefusedError(400, "Empty", "There is nothing to read in an empty text, or in no text.")
    if any("\ud800" <= sign <= "\udfff" for text in texts for sign in text):
        raise RefusedError(422, "Validation", "A text holds a lone surrogate, which is half a character.")


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each label's own probability."""
    return 1 / (1 + np.exp(-logits))


def make_app(service: Service, on_ready: Callable[[], None] = lambda: None) -> FastAPI:
    """The application; its queue runs while it does. `on_ready` is called when it can answer."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        on_ready()
        yield
        running.cancel()

    about: dict[str, Any] = {"title": "headstart", "version": version("headstart"), "responses": RESPONSES}
    app = FastAPI(**about, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.post("/predict", response_model=list[LabelScore] | list[list[LabelScore]])(service.predict)
    app.post("/", response_model=list[list[LabelScore]])(service.pipeline)
    app.post("/explain", responses={404: {"model": ErrorAnswer}})(service.explain)
    for path, answer in (("/", service.front), ("/info", service.info), ("/health", service.health)):
        app.get(path, response_model=None)(answer)
    for path, answer in (("/docs", service.docs), ("/metrics", service.metrics)):
        app.get(path, include_in_schema=False)(answer)
    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http)  # type: ignore[arg-type]
    app.add_exception_handler(HeadstartError, on_refused)  # type: ignore[arg-type]
    app.add_middleware(Guard, service=service)
    return app


async def on_invalid(_: Request, error: RequestValidationError) -> Response:
    """A request of the wrong shape: where, and what should be there."""
    wrong = [f"{'.'.join(map(str, one['loc'][1:])) or 'the body'}: {one['msg']}" for one in error.errors()[:3]]
    return failure(422, "Validation", "; ".join(wrong))


async def on_http(_: Request, error: HTTPException) -> Response:
    """A path or method that is not there, or a body that the JSON parser gave up on."""
    if error.status_code == 400:
        return failure(422, "Validation", "The body is not JSON.")
    return failure(error.status_code, error.detail, f"{error.detail}. See /docs.", error.headers)


async def on_refused(_: Request, error: HeadstartError) -> Response:
    """What the service and its queue refuse."""
    if isinstance(error, RefusedError):
        return failure(error.status, error.kind, str(error))
    kinds = {OverloadedError: (429, "Overloaded"), EngineDownError: (503, "Unhealthy"), PoisonError: (422, "Backend")}
    return failure(*kinds[type(error)], str(error))


@dataclass(frozen=True)
class Guard:
    """Before a request's body is read: the key, a place in the queue, its size. After: headers, metrics, a log."""

    app: ASGIApp
    service: Service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on to the application, one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status, path = time.perf_counter(), 499, scope["path"]

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        try:
            refusal, taken = await self.checked(scope, receive)
            await (refusal or self.app)(scope, taken, sent)
        finally:
            known = path if path in KNOWN else "other"
            seconds = time.perf_counter() - begun
            self.service.requests.labels(known, status).inc()
            self.service.rejected.inc(status == 429)
            self.service.seconds.labels(known).observe(seconds)
            entry = {"method": scope["method"], "path": known, "status": status, "ms": round(1000 * seconds, 1)}
            LOG.info(json.dumps(entry))

    async def checked(self, scope: Scope, receive: Receive) -> tuple[Response | None, Receive]:
        """An answer if a request is refused already, and what hands out its body."""
        service, config = self.service, self.service.config
        headers = dict(scope["headers"])
        post = scope["method"] == "POST"
        is_open = (scope["path"] in OPEN and not post) or scope["path"].startswith("/page/")
        if not is_open and not service.lets_in(headers.get(b"authorization", b"")):
            return failure(401, "Unauthorized", UNAUTHORIZED), receive
        if not post:
            return None, receive
        if service.batcher.admitted >= config.max_waiting:
            return failure(429, "Overloaded", f"{service.batcher.admitted:,} texts wait already."), receive
        body, more = bytearray(), True
        too_large = failure(413, "Too large", f"The body is over {config.max_body_bytes:,} bytes.")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > config.max_body_bytes:
            return too_large, receive
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > config.max_body_bytes:
                return too_large, receive
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def taken() -> Message:
            return whole.pop() if whole else await receive()

        return None, taken


KNOWN = ("/", "/predict", "/explain", "/info", "/health", "/metrics", "/docs", "/openapi.json")
