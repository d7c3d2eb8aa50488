"""Replicas on a real Ray cluster keep the contract of one server, and listen where they should."""

import itertools
import json
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nodes import Begin, Nodes, ended, free_port, listening


def ask(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def serving(begin: Begin, run: Path, nodes: Nodes | None = None) -> tuple[subprocess.Popen[str], int]:
    """Replicas that answer, with room for four texts each, and their port."""
    port = free_port()
    arguments = ["serve", str(run), "--device", "cpu", "--port", str(port), "--max-waiting", "4"]
    process = begin(*arguments, nodes=nodes)
    assert process.stderr is not None
    said = list(itertools.takewhile(lambda line: not line.startswith("Serving"), process.stderr))
    assert process.poll() is None, said
    return process, port


def test_replicas_answer_as_one_server_and_all_of_ray_listens_on_loopback(begin: Begin, tiny_run: Path) -> None:
    from headstart import predict

    process, port = serving(begin, tiny_run)
    status, answer = ask(port, "/predict", {"inputs": "the film was superb"})
    wanted = predict.load(tiny_run, device="cpu", precision="fp32").predict_proba(["the film was superb"])[0]
    likely = dict(zip("01", wanted, strict=True))
    assert status == 200
    assert {one["label"]: one["score"] for one in answer} == pytest.approx(likely, abs=0.02)
    assert ask(port, "/predict", {"inputs": ["a", "b"]})[0] == 422
    assert ask(port, "/predict", {"inputs": [["a"]] * 5})[:1] == (413,)
    assert ask(port, "/health") == (200, {"status": "ok"})
    with ThreadPoolExecutor(32) as pool:  # against room for eight texts
        four = {"inputs": [["the film was superb " * 20]] * 4}
        answers = list(pool.map(lambda _: ask(port, "/predict", four), range(200)))
    assert {status for status, _ in answers} == {200, 429}
    assert {answer["error_type"] for status, answer in answers if status == 429} == {"Overloaded"}
    assert ask(port, "/predict", {"inputs": "the film was superb"}) == (200, answer)
    family = psutil.Process(process.pid).children(recursive=True)
    family.append(psutil.Process(process.pid))
    addresses = listening(family)
    assert len(addresses) > 8
    assert set(addresses) == {"127.0.0.1"}
    process.terminate()
    ended(process)
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_one_cluster_serves_one_run_after_another(begin: Begin, nodes: Nodes, tiny_run: Path) -> None:
    for _ in range(2):
        process, port = serving(begin, tiny_run, nodes)
        assert ask(port, "/health") == (200, {"status": "ok"})
        family = psutil.Process(nodes.process.pid).children(recursive=True)
        assert set(listening(family)) == {"127.0.0.1"}
        process.terminate()
        ended(process)
        with pytest.raises(urllib.error.URLError):
            ask(port, "/health")
