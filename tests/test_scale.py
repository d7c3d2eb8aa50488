"""Real nodes of a real Ray cluster on this machine: the same bytes as one process gives, whoever is killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from headstart.errors import InputError
from tests.conftest import BAD, GOOD, NOUNS, write_csv
from tests.nodes import HEADSTART, Begin, Nodes, ended, free_port, listening

TEXTS = [f"the {noun} was {word}" for noun in NOUNS for word in (*GOOD, *BAD)]


@pytest.mark.slow
def test_an_error_of_ours_comes_back_as_it_was(begin: Begin, tiny_run: Path, tmp_path: Path) -> None:
    source = write_tables(tmp_path / "in", 8, 2)
    (source / "t9.csv").write_text("id,words\n1,so\n")
    arguments = ["predict", str(tiny_run), "--device", "cpu", "--input", str(source), "--output", str(tmp_path / "out")]
    _, err = ended(begin(*arguments), 2)
    assert err.startswith(f"headstart: {source / 't9.csv'}: has no text column")
    assert "ray::" not in err


@pytest.mark.parametrize(
    ("workers", "cores", "each"), [(2, [1, 1, 1], 1), (2, [3, 3, 3], 3), (3, [4, 2], 2), (1, [8], 8)]
)
def test_workers_get_what_one_node_has(workers: int, cores: list[int], each: int) -> None:
    from headstart.scale import threads_each

    assert threads_each(workers, cores) == each
    with pytest.raises(InputError, match="give fewer"):
        threads_each(sum(cores) + 1, cores)


def run(*arguments: str, **more: str) -> None:
    subprocess.run([*HEADSTART, *arguments], env={**os.environ, **more}, check=True, capture_output=True)


def wait_until(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.002)
    raise AssertionError(f"waited in vain for {what}")


@pytest.mark.slow
def test_an_error_of_ours_while_parts_are_scored_comes_back_as_it_was(
    begin: Begin, small_disk: Path, tiny_run: Path, tmp_path: Path
) -> None:
    source = write_tables(tmp_path / "in", 20_000, 4)
    _, err = ended(begin(*scoring(tiny_run, source, small_disk / "out")), 2)
    assert err.splitlines()[-1].startswith(f"headstart: {small_disk / 'out'}: the disk is full")
    assert "Traceback" not in err


@pytest.mark.slow
def test_sigterm_while_workers_train(begin: Begin, tiny_bert: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "noise.csv", [(f"{text} {i}", "ab"[i % 2]) for i, text in enumerate(TEXTS * 30)])
    arguments = [*fine_tuning(table, tiny_bert, out := tmp_path / "out"), "--workers", "2"]
    process = begin(*arguments)
    wait_until(lambda: process.poll() is not None or any(out.glob("checkpoint-*/")), "a checkpoint")
    process.terminate()
    _, err = ended(process, 143)
    assert "--resume" in err.splitlines()[-1]
    assert not (out / "metrics.json").exists()
    ended(begin(*arguments, "--resume"))
    assert (out / "metrics.json").is_file()


def write_tables(folder: Path, rows: int, tables: int) -> Path:
    """Tables with so many rows in all, whose ids count them; the last is CSV."""
    folder.mkdir()
    each = rows // tables
    for i in range(tables):
        ids = range(i * each, (i + 1) * each)
        part = pl.DataFrame({"id": ids, "sentence": [f"{TEXTS[k % len(TEXTS)]} {k}" for k in ids]})
        if i < tables - 1:
            part.write_parquet(folder / f"t{i:04}.parquet")
        else:
            part.write_csv(folder / f"t{i:04}.csv")
    return folder


def parts_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*")}


def test_scoring_gives_the_bytes_of_one_process(begin: Begin, tiny_run: Path, tmp_path: Path) -> None:
    source = write_tables(tmp_path / "in", 20_000, 4)
    arguments = ["predict", str(tiny_run), "--device", "cpu", "--input", str(source), "--output"]
    run(*arguments, str(tmp_path / "here"))
    out, err = ended(begin(*arguments, str(tmp_path / "there")))
    assert "20,000 of 20,000 rows labelled" in out
    assert "Traceback" not in err
    assert len(parts_of(tmp_path / "here")) == 6
    assert parts_of(tmp_path / "there") == parts_of(tmp_path / "here")


def node_of(nodes: Nodes, out: Path) -> int:
    """The node of a worker that has begun a part."""
    for path in out.glob("_begun/*/*"):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError, ValueError):
            parent = psutil.Process(int(path.read_text().split()[1])).ppid()
            if parent in nodes.raylets:
                return parent
    return 0


def moment(nodes: Nodes, out: Path, phase: str) -> int:
    """Wait for a phase of a job; the node to kill then."""
    if phase == "listing":
        wait_until(lambda: (out / "_mended").exists() or (out / "_plan.json").exists(), phase)
        return random.choice(nodes.raylets)
    if phase == "writing":
        wait_until(lambda: any(out.glob(".part-*.tmp")) or any(out.glob("part-*")), phase)
        return node_of(nodes, out) or random.choice(nodes.raylets)
    node: int = wait_until(lambda: node_of(nodes, out), phase)
    if phase == "scoring":
        time.sleep(random.random() / 2)
    return node


def scoring(run: Path, source: Path, out: Path) -> list[str]:
    return ["predict", str(run), "--device", "cpu", "--input", str(source), "--output", str(out)]


def lose_a_node(nodes: Nodes, process: subprocess.Popen[str], out: Path, phase: str, rows: int) -> dict[str, Any]:
    """Kill a node in a phase of scoring by all; then every row must be there once, whatever was scored again."""
    killed = moment(nodes, out, phase)
    for one in (psutil.Process(killed), *psutil.Process(killed).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()  # at once, as with a machine: workers by themselves would end their part
    nodes.raylets.remove(killed)
    said, _ = ended(process)
    nodes.add()
    ids = pl.concat([pl.read_parquet(path)["id"].cast(pl.Int64) for path in sorted(out.glob("part-*"))])
    assert ids.to_list() == list(range(rows))
    assert f"{rows:,} of {rows + (phase == 'listing'):,} rows labelled" in said
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    summary: dict[str, Any] = json.loads((out / "_summary.json").read_text())
    return summary


@pytest.mark.slow
def test_a_node_killed_while_it_scores_loses_no_row(begin: Begin, nodes: Nodes, tiny_run: Path, tmp_path: Path) -> None:
    source, out = write_tables(tmp_path / "in", 60_000, 6), tmp_path / "out"
    process = begin(*scoring(tiny_run, source, out), nodes=nodes)
    summary = lose_a_node(nodes, process, out, "reading", 60_000)
    assert summary["rows_begun_again"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default::RuntimeWarning")
@pytest.mark.parametrize("phase", ["listing", "reading", "scoring", "writing"])
def test_100_000_rows_with_a_node_killed_in_each_phase(
    begin: Begin, nodes: Nodes, tiny_run: Path, tmp_path: Path, phase: str
) -> None:
    source, out = write_tables(tmp_path / "in", 100_000, 200 if phase == "listing" else 10), tmp_path / "out"
    if phase == "listing":
        (source / "t0000.csv").write_bytes(b"id,sentence\n0,a,b\n")  # its copy shows that listing has begun
    summary = lose_a_node(nodes, begin(*scoring(tiny_run, source, out), nodes=nodes), out, phase, 100_000)
    assert summary["set_aside"] == (phase == "listing")
    again = f"{phase}: {summary['rows_begun_again'] / summary['rows']:.1%} of the rows were begun again"
    warnings.warn(again, RuntimeWarning, stacklevel=1)  # so that a run of pytest says it


@pytest.mark.slow
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_driver_killed_five_times_scores_every_row_once(
    begin: Begin, nodes: Nodes, tiny_run: Path, tmp_path: Path
) -> None:
    source, out = write_tables(tmp_path / "in", 100_000, 10), tmp_path / "out"
    arguments = scoring(tiny_run, source, out)
    for _ in range(5):
        there = len(list(out.glob("part-*")))
        process = begin(*arguments, nodes=nodes)
        wait_until(lambda: len(list(out.glob("part-*"))) > there or process.poll() is not None, "a part")  # noqa: B023
        assert process.poll() is None
        time.sleep(random.random() / 4)
        process.kill()
        process.communicate()
    said, err = ended(begin(*arguments, nodes=nodes))
    assert "Resumed" in err
    ids = pl.concat([pl.read_parquet(path)["id"].cast(pl.Int64) for path in sorted(out.glob("part-*"))])
    assert ids.to_list() == list(range(100_000))
    again = next(line for line in said.splitlines() if line.startswith("Again"))
    warnings.warn(again, RuntimeWarning, stacklevel=1)


def fine_tuning(table: Path, model: Path, out: Path) -> list[str]:
    exact = ["--device", "cpu", "--precision", "fp32", "--seed", "7", "--checkpoint-minutes", "0.0001"]
    return ["train", str(table), "--model", str(model), "--thaw", "all", "--epochs", "2", "--out", str(out), *exact]


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_train_the_bytes_of_one_process(
    begin: Begin, nodes: Nodes, tiny_bert: Path, tmp_path: Path
) -> None:
    chance = random.Random(1)
    rows = [(f"{chance.choice(TEXTS)} {i}", chance.choice("ab")) for i in range(3000)]
    table = write_csv(tmp_path / "noise.csv", rows)
    run(*fine_tuning(table, tiny_bert, tmp_path / "one"), OMP_NUM_THREADS="2", HEADSTART_CACHE_DIR=str(tmp_path / "c1"))
    out = tmp_path / "two"
    given = {"HEADSTART_CACHE_DIR": str(tmp_path / "c2"), "OMP_NUM_THREADS": "2"}
    process = begin(*fine_tuning(table, tiny_bert, out), "--workers", "2", nodes=nodes, **given)
    wait_until(lambda: process.poll() is not None or len(list(out.glob("checkpoint-*/"))) > 1, "checkpoints")
    family = [*psutil.Process(nodes.process.pid).children(recursive=True), psutil.Process(process.pid)]
    assert set(listening(family)) == {"127.0.0.1"}
    last = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*/"))
    workers = [one for one in psutil.process_iter(["name"]) if one.info["name"].startswith("ray::RayTrain")]
    ours = [one for one in workers if one.ppid() in nodes.raylets]
    assert len(ours) == 2
    chance.choice(ours).kill()
    _, err = ended(process)
    resumed = [line for line in err.splitlines() if line.startswith("Resumed from")]
    assert len(resumed) == 1
    assert int(resumed[0].split("checkpoint-")[1].split()[0]) >= last
    for name in ("model.safetensors", "predictions.csv"):
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    # What the encoder said of each text is the same, too: a segment's name ends in the sum of its bytes.
    segments = [sorted(path.name[9:] for path in (tmp_path / one).rglob("*.safetensors")) for one in ("c1", "c2")]
    assert segments[0] == segments[1]
    assert segments[0]
    assert not (out / "ray").exists()


@pytest.mark.slow
def test_ctrl_c_while_workers_train(begin: Begin, nodes: Nodes, tiny_bert: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "noise.csv", [(f"{text} {i}", "ab"[i % 2]) for i, text in enumerate(TEXTS * 30)])
    out = tmp_path / "out"
    arguments = [*fine_tuning(table, tiny_bert, out), "--workers", "2"]
    process = begin(*arguments, nodes=nodes)
    wait_until(lambda: process.poll() is not None or any(out.glob("checkpoint-*/")), "a checkpoint")
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 130)
    assert "--resume" in err.splitlines()[-1]
    _, err = ended(begin(*arguments, "--resume", nodes=nodes))
    assert "Resumed from" in err
    assert (out / "metrics.json").is_file()


def test_what_an_earlier_run_said_is_not_said_again(tmp_path: Path) -> None:
    from headstart.scale import told
    from headstart.workers import TOLD

    (tmp_path / TOLD).write_text("an epoch of another run\n")
    said: list[str] = []
    with told(tmp_path, said.append), open(tmp_path / TOLD, "a", encoding="utf-8") as file:
        file.write("an epoch\n")
    assert said == ["an epoch"]


@pytest.mark.slow
def test_workers_whose_disk_is_full_do_not_try_again(
    begin: Begin, small_disk: Path, tiny_bert: Path, small_table: Path
) -> None:
    _, err = ended(begin(*fine_tuning(small_table, tiny_bert, small_disk / "out")), 2, seconds=90)  # 20 times take more
    assert "Thaw      all layers" in err
    assert "the disk is full" in err
    assert "Traceback" not in err


def test_nothing_of_ray_is_imported_unless_asked_for(tiny_run: Path, tmp_path: Path) -> None:
    source = write_tables(tmp_path / "in", 8, 2)
    program = (
        "import sys; from headstart.cli import main\ntry: main(sys.argv[1:])\nfinally: print('ray' in sys.modules)"
    )
    for arguments in (["--input", str(source), "--output", str(tmp_path / "out")], ["the film was superb"]):
        command = [sys.executable, "-c", program, "predict", str(tiny_run), "--device", "cpu", *arguments]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "sample", "--workers", "2"], "goes with --thaw K"),
        (["train", "sample", "--workers", "2", "--thaw", "all"], "--workers N goes with --ray"),
        (["train", "sample", "--ray", "--dry-run"], "about this machine"),
        (["train", "sample", "--workers", "2", "--thaw", "all", "--dry-run"], "--workers N goes with --ray"),
        (["predict", "RUN", "so", "--workers", "2"], "--workers N goes with --ray"),
        (["predict", "RUN", "--input", "sample", "--output", "o.csv", "--ray"], "--output DIR"),
        (["serve", "RUN", "--ray", "--read-timeout", "3"], "goes without --ray"),
        (["predict", "RUN", "so", "--ray=local"], "--ray goes with --input"),
        (["predict", "RUN", "--input", "sample", "--ray"], "--output DIR"),
        (["predict", "RUN", "--input", "sample", "--output", "o", "--ray", "--workers", "0"], "more than 0"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], said: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from headstart.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([str(tiny_run) if one == "RUN" else one for one in arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_an_address_where_nothing_answers(tiny_run: Path, tmp_path: Path) -> None:
    command = [*HEADSTART, "predict", str(tiny_run), "--input", "sample", "--output", str(tmp_path / "out")]
    command += ["--ray", f"127.0.0.1:{free_port()}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert "no cluster answers there" in process.stderr
