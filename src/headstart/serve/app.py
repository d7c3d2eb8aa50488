"""The HTTP contract: text-embeddings-inference's dialect at /predict, Hugging Face's at /, page, health and metrics.

This room knows requests and answers. It does not know what computes: torch is loaded only by /explain, of a run that
was not exported. No text is ever logged.
"""

import asyncio
import contextlib
import functools
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from headstart.config import ServeConfig
from headstart.errors import HeadstartError
from headstart.predict import ABSTAIN, decide, probabilities_of, token_logits
from headstart.runs import Classifier, read_json
from headstart.serve.guard import Door, Guard
from headstart.serve.queue import Batcher, EngineDownError, Ids, Logits, OverloadedError, PoisonError
from headstart.serve.schema import (
    RESPONSES,
    ErrorAnswer,
    ExplainRequest,
    LabelScore,
    PipelineRequest,
    PredictRequest,
    RefusedError,
    failure,
)
from headstart.tokens import ragged

PAGE = Path(__file__).with_name("page")
SHORT = 20_000  # characters that are tokenised at once; more, in a thread
BATCH_TOKENS = 4096
TOLD = ("n", "accuracy", "accuracy_ci95", "macro_f1", "ece")  # of the test part
HALF = re.compile("[\ud800-\udfff]")  # of a character that UTF-16 writes as two
Answer = TypeVar("Answer")


class Service:
    """A run folder's classifier with its queue: what the endpoints answer from."""

    def __init__(self, run: Path, classifier: Classifier, config: ServeConfig, key: str | None = None) -> None:
        self.run, self.classifier, self.config = run, classifier, config
        self.registry = CollectorRegistry()
        sizes = Histogram(
            "headstart_batch_texts", "Texts scored together.", buckets=[2**i for i in range(10)], registry=self.registry
        )
        limits = {"most_waiting": config.max_waiting, "most_tokens": BATCH_TOKENS}
        self.batcher = Batcher(self.score, **limits, on_batch=sizes.observe)
        waiting = Gauge("headstart_queue_texts", "Texts that wait.", registry=self.registry)
        waiting.set_function(lambda: self.batcher.admitted)
        self.door = Door(config, key, lambda: self.batcher.admitted, self.registry)
        self.explaining = threading.Lock()

    def score(self, texts: Sequence[Ids]) -> Logits:
        """(n, labels) logits of token ids, shared by all cores."""
        tokens, workers = ragged(texts), self.classifier.workers
        share = max(64, int(tokens.lengths.sum()) // workers)
        return token_logits(self.classifier, tokens, min(2048, share), self.classifier.side_by_side)

    async def logits(self, request: Request, texts: Sequence[str], *, truncate: bool) -> Logits:
        """(n, labels) logits of a request's texts; a `RefusedError` where it gets none."""
        check_readable(texts)
        if len(texts) > self.config.most_texts:
            raise RefusedError(
                413, "Too large", f"{len(texts):,} texts are more than {self.config.most_texts} a request."
            )
        with self.batcher.places(len(texts)):
            return await self.unless_left(request, self.tokenized(texts, truncate=truncate))

    async def tokenized(self, texts: Sequence[str], *, truncate: bool) -> Logits:
        """Tokenise, and have scored."""
        tokenizer, limit, long = self.classifier.tokenizer, self.classifier.max_length, self.classifier.long
        short = sum(map(len, texts)) <= SHORT
        tokens = tokenizer(texts) if short else await asyncio.to_thread(tokenizer, texts)
        if not truncate and long != "windows" and (longest := int(tokens.lengths.max())) > limit:
            raise RefusedError(
                422, "Validation", f"A text has {longest:,} tokens, of at most {limit}; or set truncate."
            )
        read = tokenizer.pieces(tokens, limit, long)
        if (count := len(read.tokens)) > self.config.max_waiting:
            raise RefusedError(
                413, "Too large", f"{count:,} windows are more than {self.config.max_waiting} a request."
            )
        with self.batcher.places(count - len(texts)):
            return read.mean(await self.batcher.logits([read.tokens[i] for i in range(count)]))

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
        """All labels of one text, the likeliest first; before them `abstain`, if its answer is too unlikely."""
        order = np.argsort(-scores, kind="stable").tolist()
        found = [{"score": float(scores[i]), "label": self.classifier.names[i]} for i in order]
        sure = float(decide(scores[None], self.classifier.thresholds).confidence[0])
        if abstain and sure < self.config.min_confidence:
            found.insert(0, {"score": sure, "label": ABSTAIN})
        return found

    async def predict(self, request: Request, body: PredictRequest) -> Response:
        """Score a text, or a batch of them, as text-embeddings-inference does."""
        texts = [body.inputs] if isinstance(body.inputs, str) else [one for (one,) in body.inputs]
        logits = await self.logits(request, texts, truncate=body.truncate)
        scores = logits.astype(np.float64) if body.raw_scores else probabilities_of(logits, self.classifier.problem)
        found = [self.ranked(one, abstain=not body.raw_scores) for one in scores]
        return JSONResponse(found[0] if isinstance(body.inputs, str) else found)

    async def pipeline(self, request: Request, body: PipelineRequest) -> Response:
        """Score a text or several, as Hugging Face's inference API does: nested even for one text."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        logits = (await self.logits(request, texts, truncate=True)).astype(np.float64)
        usual = "sigmoid" if self.classifier.problem == "multi" else "softmax"
        applied = body.parameters.function_to_apply or usual
        scores = {
            "softmax": lambda: probabilities_of(logits),
            "sigmoid": lambda: probabilities_of(logits, "multi"),
            "none": lambda: logits,
        }[applied]()
        found = [self.ranked(one, abstain=applied == usual)[: body.parameters.top_k] for one in scores]
        return JSONResponse(found)

    async def explain(self, request: Request, body: ExplainRequest) -> Response:
        """Which words pushed the label of a text; not for a run that was exported, which torch does not score."""
        if not self.explains:
            raise RefusedError(404, "Not found", "This run was exported; only torch can explain.")
        check_readable([body.inputs])
        return JSONResponse(await self.unless_left(request, asyncio.to_thread(self.explanation, body.inputs)))

    def explanation(self, text: str) -> dict[str, Any]:
        """An explanation as JSON has it, one at a time; it goes on where nobody waits any more."""
        from headstart.explain import FEW, explain

        if not self.explaining.acquire(blocking=False):
            raise OverloadedError("Another text is being explained.")
        try:
            found = explain(self.exact, text, FEW)
        finally:
            self.explaining.release()
        return asdict(found)

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
        has_test = (self.run / "metrics.json").is_file()
        tested = read_json(self.run, "metrics.json").get("test") if has_test else None
        return JSONResponse(
            {
                "model_id": self.run.resolve().name,
                "version": version("headstart"),
                "model_type": {"classifier": {"id2label": dict(enumerate(names))}},
                "labels": list(names),
                "problem": self.classifier.problem,
                "thresholds": list(self.classifier.thresholds),
                "max_input_length": self.classifier.max_length,
                "max_client_batch_size": config.most_texts,
                "max_concurrent_requests": config.max_waiting,
                "max_body_bytes": config.max_body_bytes,
                "auto_truncate": True,
                "calibrated": info.get("calibration", {}).get("method", "none") != "none",
                "min_confidence": config.min_confidence,
                "explains": self.explains,
                "test": {name: tested[name] for name in TOLD} if tested else None,
                "limits": info.get("limits", []),
            }
        )

    async def front(self, request: Request) -> Response:
        """The page, for a browser; else what `/info` says."""
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(PAGE / "index.html")
        if not self.door.opens(request.headers.get("authorization", "").encode("latin-1")):
            raise RefusedError(401, "Unauthorized", "A key is needed: Authorization: Bearer KEY.")
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


def check_readable(texts: Sequence[str]) -> None:
    """Refuse, by a `RefusedError`, texts in which there is nothing to read."""
    if not texts or not all(text.strip() for text in texts):
        raise RefusedError(400, "Empty", "There is nothing to read in an empty text, or in no text.")
    if any(map(HALF.search, texts)):
        raise RefusedError(422, "Validation", "A text holds a lone surrogate, which is half a character.")


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
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]  # typed for any Exception
    app.add_exception_handler(HTTPException, on_http)  # type: ignore[arg-type]  # typed for any Exception
    app.add_exception_handler(HeadstartError, on_refused)  # type: ignore[arg-type]  # typed for any Exception
    app.add_middleware(Guard, door=service.door)
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
    return failure(*kinds.get(type(error), (503, "Unhealthy")), str(error))
