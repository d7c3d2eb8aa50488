"""The HTTP contract against real servers: both dialects, refusals, the key, health, metrics, no text in logs."""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from headstart import predict
from headstart.config import ServeConfig
from headstart.export import export
from headstart.run import Run
from headstart.serve.queue import Ids, Logits
from tests.conftest import BAD, GOOD, NOUNS, kinds_of_rows
from tests.serve.conftest import Serve, Served, inside

TEXTS = ["the film was superb", "the waiter was rude", "zebra", "the soup was awful and the room was broken"]
LONG = "the waiter was rude at the end of this story " * 3


def ask(served: Served, path: str, content: Any, **headers: str) -> httpx.Response:
    return httpx.post(served.url + path, json=content, headers=headers, timeout=20)


@pytest.fixture(scope="module")
def expected(exported_run: Path) -> dict[str, list[dict[str, Any]]]:
    """All labels of each text, the likeliest first, by the library."""
    predictor = predict.load(exported_run)
    found = {}
    for text, shares in zip(TEXTS, predictor.predict_proba(TEXTS), strict=True):
        order = np.argsort(-shares)
        found[text] = [{"score": pytest.approx(shares[i], abs=1e-3), "label": predictor.names[i]} for i in order]
    return found


@pytest.mark.parametrize("kind", ["multi", "ordered", "long"])
def test_other_kinds_are_exported_and_served_as_they_are_predicted(
    kind: str, train: Callable[..., Run], serve: Serve
) -> None:
    rows = kinds_of_rows()[kind]
    run = train(rows, epochs=30, **({"long": "windows", "max_length": 32} if kind == "long" else {})).folder
    texts = [text for text, _ in rows[:8]]
    plain = predict.load(run, device="cpu", precision="fp32").predict_proba(texts)
    assert export(run, "fp32", "refuses").agreement == 1
    predictor = predict.load(run)
    np.testing.assert_allclose(predictor.predict_proba(texts), plain, atol=1e-3)
    with serve(run=run) as served:
        info = httpx.get(served.url + "/info").json()
        assert info["problem"] == ("single" if kind == "long" else kind)
        assert len(info["thresholds"]) == (3 if kind == "multi" else 0)
        found = ask(served, "/predict", {"inputs": [[text] for text in texts], "truncate": kind != "long"}).json()
        nested = ask(served, "/", {"inputs": texts}).json()
        for one, other, shares in zip(found, nested, plain, strict=True):
            assert one == other
            assert {item["label"]: item["score"] for item in one} == pytest.approx(
                dict(zip(predictor.names, shares, strict=True)), abs=1e-3
            )
        if kind == "long":
            answer = ask(served, "/predict", {"inputs": "word " * 20_000})
            assert (answer.status_code, answer.json()["error_type"]) == (413, "Too large")


# --- text-embeddings-inference's dialect


def test_one_text_gets_all_labels_best_first(served: Served, expected: dict[str, Any]) -> None:
    for text in TEXTS:
        answer = ask(served, "/predict", {"inputs": text, "truncate": True, "raw_scores": False})
        assert (answer.status_code, answer.json()) == (200, expected[text])


def test_a_batch_gets_a_list_of_them_in_order(served: Served, expected: dict[str, Any]) -> None:
    answer = ask(served, "/predict", {"inputs": [[text] for text in TEXTS]})
    assert answer.json() == [expected[text] for text in TEXTS]


def test_raw_scores_are_logits(served: Served, expected: dict[str, Any]) -> None:
    found = ask(served, "/predict", {"inputs": TEXTS[0], "raw_scores": True}).json()
    powers = np.exp([one["score"] for one in found])
    assert [one["label"] for one in found] == [one["label"] for one in expected[TEXTS[0]]]
    np.testing.assert_allclose(powers / powers.sum(), [one["score"].expected for one in expected[TEXTS[0]]], atol=1e-3)
    assert abs(sum(one["score"] for one in found) - 1) > 0.01


def test_a_sentence_pair_is_refused_and_shown_the_batch_form(served: Served) -> None:
    answer = ask(served, "/predict", {"inputs": ["a", "b"]})
    assert answer.status_code == 422
    assert '[["a"], ["b"]]' in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        ({"inputs": ""}, 400, "Empty"),
        ({"inputs": " \n\t"}, 400, "Empty"),
        ({"inputs": []}, 400, "Empty"),
        ({"inputs": [["a"], [""]]}, 400, "Empty"),
        ({"inputs": [["a"]] * 33}, 413, "Too large"),
        ({"inputs": "a" * 2_000_001}, 413, "Too large"),
        ({"inputs": LONG, "truncate": False}, 422, "Validation"),
        ({"inputs": [["a", "b"]]}, 422, "Validation"),
        ({"inputs": 3}, 422, "Validation"),
        ({"inputs": None}, 422, "Validation"),
        ({"inputs": {"text": "a"}}, 422, "Validation"),
        ({"inputs": "a", "truncate": "perhaps"}, 422, "Validation"),
        ({}, 422, "Validation"),
        ([], 422, "Validation"),
    ],
)
def test_refusals_say_why_in_the_contracts_shape(served: Served, content: Any, status: int, kind: str) -> None:
    answer = ask(served, "/predict", content)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == kind
    assert answer.headers["content-type"] == "application/json"


def test_a_long_text_is_cut_unless_that_is_forbidden(served: Served) -> None:
    whole = ask(served, "/predict", {"inputs": LONG}).json()
    assert whole == ask(served, "/predict", {"inputs": LONG + "and more", "truncate": True}).json()


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"inputs": "\\ud800"}', b"[" * 100_000, b"NaN"])
def test_a_body_that_is_no_json_is_refused(served: Served, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(served.url + "/predict", content=body, headers=headers, timeout=20)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "error_type"}


def test_a_body_without_an_end_is_refused_when_it_is_too_long(served: Served) -> None:
    def endless() -> Any:
        for _ in range(100):
            yield b"a" * 100_000

    with httpx.Client() as client:
        try:
            status = client.post(served.url + "/predict", content=endless(), timeout=20).status_code
        except httpx.TransportError:
            return  # it was cut off in the middle of sending, which is right as well
    assert status == 413


# --- Hugging Face's dialect


CLIENT = """
import json, sys
from huggingface_hub import InferenceClient
client = InferenceClient(model=sys.argv[1])
answers = [client.text_classification(text) for text in sys.argv[2:]]
print(json.dumps([[{"score": one.score, "label": one.label} for one in answer] for answer in answers]))
print(len(client.text_classification(sys.argv[2], top_k=1)))
"""


def test_hugging_faces_client_works(served: Served, expected: dict[str, Any]) -> None:
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # as its users are
    command = [sys.executable, "-c", CLIENT, served.url, *TEXTS]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=online).stdout.splitlines()
    assert json.loads(found[0]) == [expected[text] for text in TEXTS]
    assert found[1] == "1"


def test_its_dialect_is_nested_and_takes_parameters(served: Served, expected: dict[str, Any]) -> None:
    assert ask(served, "/", {"inputs": TEXTS[0]}).json() == [expected[TEXTS[0]]]
    assert ask(served, "/", {"inputs": TEXTS}).json() == [expected[text] for text in TEXTS]
    one = ask(served, "/", {"inputs": TEXTS[0], "parameters": {"top_k": 1, "function_to_apply": "softmax"}})
    assert one.json() == [expected[TEXTS[0]][:1]]
    logits = ask(served, "/", {"inputs": TEXTS[0], "parameters": {"function_to_apply": "none"}}).json()[0]
    shares = ask(served, "/", {"inputs": TEXTS[0], "parameters": {"function_to_apply": "sigmoid"}}).json()[0]
    for logit, share in zip(logits, shares, strict=True):
        assert share["score"] == pytest.approx(1 / (1 + np.exp(-logit["score"])), abs=1e-6)
    assert ask(served, "/", {"inputs": "a", "parameters": {"top_k": 0}}).status_code == 422
    assert ask(served, "/", {"inputs": "a", "parameters": {"function_to_apply": "max"}}).status_code == 422


# --- the rest of the contract


def test_what_is_served_is_told(served: Served, tiny_run: Path) -> None:
    found = httpx.get(served.url + "/info").json()
    tested = json.loads((tiny_run / "metrics.json").read_text())["test"]
    assert found["labels"] == ["0", "1"]
    assert (found["max_input_length"], found["max_client_batch_size"]) == (16, 32)
    assert found["test"] == {name: tested[name] for name in ("n", "accuracy", "accuracy_ci95", "macro_f1", "ece")}
    assert found["explains"] is False
    assert found["calibrated"] is True
    assert httpx.get(served.url + "/").json() == found, "who does not ask for a page"


def test_the_page_and_the_docs_ask_nothing_of_others(served: Served) -> None:
    page = httpx.get(served.url + "/", headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    docs = httpx.get(served.url + "/docs")
    for answer in (page, docs):
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert 'src="http' not in answer.text
    assert httpx.get(served.url + "/openapi.json").json()["info"]["title"] == "headstart"


def test_health_and_metrics(served: Served) -> None:
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}
    ask(served, "/predict", {"inputs": "a"})
    told = httpx.get(served.url + "/metrics").text
    for name in ("requests_total", "request_seconds_bucket", "batch_texts_bucket", "queue_texts", "rejected_total"):
        assert f"headstart_{name}" in told
    assert 'headstart_requests_total{path="/predict",status="200"}' in told
    httpx.get(served.url + "/strange/" + "x" * 50)
    assert "strange" not in httpx.get(served.url + "/metrics").text, "or else anybody could fill the memory"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("DELETE", "/predict", 405)])
def test_unknown_paths_and_methods(served: Served, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, served.url + path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}


def test_an_explanation_has_the_words_and_their_scores(serve: Serve, served: Served, tiny_run: Path) -> None:
    with serve(run=tiny_run) as by_torch:
        assert httpx.get(by_torch.url + "/info").json()["explains"] is True
        found = ask(by_torch, "/explain", {"inputs": TEXTS[0]}).json()
        assert [one["word"] for one in found["words"]] == TEXTS[0].split()
        assert all(isinstance(one["score"], float) for one in found["words"])
        assert found["label"] == ask(by_torch, "/predict", {"inputs": TEXTS[0]}).json()[0]["label"]
        assert ask(by_torch, "/explain", {"inputs": " "}).status_code == 400
    assert ask(served, "/explain", {"inputs": TEXTS[0]}).status_code == 404, "an exported run has no torch"


def test_the_log_is_json_without_texts(served: Served) -> None:
    ask(served, "/predict", {"inputs": "a secret word"})
    ask(served, "/predict?token=secret", {"inputs": ["secret", "pair"]})
    lines = [line for line in served.log.read_text().splitlines() if line.startswith("{")]
    assert {"method", "path", "status", "ms"} <= set(json.loads(lines[-1]))
    assert "secret" not in served.log.read_text()


def test_there_is_no_cors(served: Served) -> None:
    headers = {"origin": "http://example.org", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/predict"), ("GET", "/info")):
        answer = httpx.request(method, served.url + path, headers=headers)
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_with_a_key_only_the_page_and_health_are_open(serve: Serve) -> None:
    with serve("--api-key-env", "THE_KEY", THE_KEY="s3cret-ключ") as served:
        for path in ("/predict", "/", "/explain"):
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                answer = ask(served, path, {"inputs": "a"}, **given)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        right = {b"authorization": "Bearer s3cret-ключ".encode()}
        assert httpx.post(served.url + "/predict", json={"inputs": "a"}, headers=right).status_code == 200
        assert httpx.get(served.url + "/info", headers=right).status_code == 200
        shut, free = ("/info", "/metrics", "/"), ("/health", "/docs", "/page/docs.html")
        for path in (*shut, *free):
            assert httpx.get(served.url + path).status_code == (401 if path in shut else 200)
        assert httpx.get(served.url + "/", headers={"accept": "text/html"}).status_code == 200
        assert "s3cret" not in served.log.read_text()


def test_below_the_least_confidence_it_abstains_first(serve: Serve) -> None:
    with serve("--min-confidence", "1") as served:
        found = ask(served, "/predict", {"inputs": "zebra"}).json()
        assert found[0]["label"] == "abstain"
        assert found[0]["score"] == found[1]["score"] < 1
        assert len(found) == 3


# --- under load, and when things break


def slow(service: Any, seconds: float) -> None:
    """Let each batch of a service take so long."""
    real = service.score

    def waits(texts: Sequence[Ids]) -> Logits:
        time.sleep(seconds)
        return real(texts)

    service.batcher.engine.score = waits


def test_overload_is_told_at_once_and_what_was_accepted_is_answered(tiny_run: Path) -> None:
    with inside(tiny_run, max_waiting=8) as (url, service):
        slow(service, 0.3)

        async def work() -> list[tuple[int, float, httpx.Headers]]:
            async with httpx.AsyncClient(timeout=20) as client:

                async def one(i: int) -> tuple[int, float, httpx.Headers]:
                    begun = time.perf_counter()
                    answer = await client.post(url + "/predict", json={"inputs": f"a film {i}"})
                    return answer.status_code, time.perf_counter() - begun, answer.headers

                return await asyncio.gather(*map(one, range(40)))

        found = asyncio.run(work())
        assert sum(status == 200 for status, *_ in found) == 8
        refused = [(seconds, headers) for status, seconds, headers in found if status == 429]
        assert len(refused) == 32
        assert all(headers["retry-after"] == "1" for _, headers in refused)
        assert max(seconds for seconds, _ in refused) < min(seconds for status, seconds, _ in found if status == 200)
        assert "headstart_rejected_total 32.0" in httpx.get(url + "/metrics").text


def test_a_request_that_takes_too_long_is_given_up(tiny_run: Path) -> None:
    with inside(tiny_run, timeout=0.2) as (url, service):
        slow(service, 1.0)
        answer = httpx.post(url + "/predict", json={"inputs": "a"}, timeout=20)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Timeout")
        assert service.batcher.admitted == 0


def test_a_client_that_leaves_frees_its_places(tiny_run: Path) -> None:
    with inside(tiny_run) as (url, service):
        scored: list[int] = []
        real = service.score

        def counts(texts: Sequence[Ids]) -> Logits:
            scored.append(len(texts))
            time.sleep(0.5)
            return real(texts)

        service.batcher.engine.score = counts
        first = threading.Thread(target=lambda: httpx.post(url + "/predict", json={"inputs": "a"}, timeout=20))
        first.start()
        while not scored:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/predict", json={"inputs": [["b"], ["c"]]}, timeout=0.2)
        first.join()
        limit = time.monotonic() + 5
        while service.batcher.admitted and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
        assert service.batcher.admitted == 0
        assert scored == [1], "the two of the client that left were never computed"


def test_a_poison_text_fails_alone(tiny_run: Path) -> None:
    with inside(tiny_run) as (url, service):
        real, token = service.score, service.classifier.tokenizer(["zebra"])[0].tolist()

        def fails(texts: Sequence[Ids]) -> Logits:
            time.sleep(0.05)
            if any(text.tolist() == token for text in texts):
                raise ValueError("zebra")
            return real(texts)

        service.batcher.engine.score = fails

        async def work() -> list[int]:
            async with httpx.AsyncClient(timeout=20) as client:
                asks = [client.post(url + "/predict", json={"inputs": text}) for text in [*TEXTS, *TEXTS]]
                return [answer.status_code for answer in await asyncio.gather(*asks)]

        assert asyncio.run(work()) == [422 if text == "zebra" else 200 for text in [*TEXTS, *TEXTS]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_thread_is_killed_health_says_so_and_nothing_hangs(tiny_run: Path) -> None:
    with inside(tiny_run) as (url, service):
        slow(service, 0.3)
        asked: list[int] = []

        def one() -> None:
            asked.append(httpx.post(url + "/predict", json={"inputs": "a"}, timeout=20).status_code)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        number = service.batcher.engine.ident
        assert number is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), ctypes.py_object(SystemExit))
        while service.batcher.engine.is_alive():
            time.sleep(0.01)
        died = time.perf_counter()
        while httpx.get(url + "/health").status_code != 503:
            time.sleep(0.01)
        assert time.perf_counter() - died < 1
        for thread in threads:
            thread.join(5)
        assert time.perf_counter() - died < 2
        assert len(asked) == 4
        assert set(asked) <= {200, 503}
        assert 503 in asked
        answer = httpx.post(url + "/predict", json={"inputs": "a"}, timeout=20)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")


@pytest.mark.parametrize("count", [600, pytest.param(50_000, marks=pytest.mark.slow)])
def test_concurrent_mixed_requests_with_cancellations_get_their_own_answers(tiny_run: Path, count: int) -> None:
    predictor = predict.load(tiny_run, device="cpu", precision="fp32")
    words = (*NOUNS, *GOOD, *BAD, "the", "was", "is", "zebra", "not", "very", "and")
    draw = np.random.default_rng(0)
    pool = [" ".join(draw.choice(words, draw.integers(1, 20))) for _ in range(400)]
    alone = {text: predictor.predict_proba([text])[0] for text in pool}
    with inside(tiny_run) as (url, service):

        async def work() -> dict[str, int]:
            tally = {"answered": 0, "cancelled": 0, "again": 0}
            slots = asyncio.Semaphore(64)
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as client:

                async def one(number: int) -> None:
                    mine = np.random.default_rng(number)
                    texts = [pool[i] for i in mine.integers(0, len(pool), mine.integers(1, 6))]
                    async with slots:
                        asking = client.post(url + "/predict", json={"inputs": [[text] for text in texts]})
                        if mine.random() < 0.1:
                            try:
                                await asyncio.wait_for(asking, float(mine.random() * 0.02))
                            except TimeoutError:
                                tally["cancelled"] += 1
                                return
                            tally["answered"] += 1
                            return
                        answer = await asking
                    assert answer.status_code == 200, answer.text
                    for text, scores in zip(texts, answer.json(), strict=True):
                        got = {score["label"]: score["score"] for score in scores}
                        np.testing.assert_allclose([got["0"], got["1"]], alone[text], atol=1e-3)
                    tally["answered"] += 1

                await asyncio.gather(*map(one, range(count)))
            return tally

        tally = asyncio.run(work())
        assert tally["answered"] + tally["cancelled"] == count
        assert tally["cancelled"] > 0
        limit = time.monotonic() + 5
        while service.batcher.admitted and time.monotonic() < limit:
            time.sleep(0.01)
        assert service.batcher.admitted == 0


def test_every_limit_must_make_sense() -> None:
    from headstart.errors import InputError

    assert ServeConfig(max_waiting=8).most_texts == 8, "more would never find places"
    for wrong in ({"max_batch": 0}, {"timeout": -1.0}, {"port": 70_000}, {"min_confidence": 1.5}):
        with pytest.raises(InputError):
            ServeConfig(**wrong)
