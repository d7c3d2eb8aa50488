"""Measure headstart and its peers on the same data, in turns, each as a process of its own.

Writes medians and ratios to benchmarks/results/GROUP.json, from which table.py makes the README's table; prints ratios
only, since bare seconds are of one machine. `make bench` runs all of it, in about an hour on two idle cores.

    python benchmarks/run.py [--only GROUP ...] [--repeats 3] [--quick]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster import workers
from frozen import article, article_base, cold, encode, heads, scale, score, trials
from measure import BenchError, Samples, describe_machine, note, run_child
from serving import serve
from setting import DATA, HEADSTART, HERE, OURS, THEIRS, Bench, Ratio
from thaw import costs, thaw

GROUPS: dict[str, Callable[[Bench, Samples], list[Ratio]]] = {
    "article": article,
    "article-base": article_base,
    "heads": heads,
    "encode": encode,
    "score": score,
    "cold": cold,
    "scale": scale,
    "trials": trials,
    "serve": serve,
    "workers": workers,
    "thaw": thaw,
    "costs": costs,
}


def check_ready() -> None:
    """End with a sentence where something is missing."""
    if not (DATA / "sst2" / "all.csv").is_file():
        raise SystemExit(f"The data to measure on is not there: {DATA}. It is kept beside the checkout, not in it.")
    for path, how in ((HEADSTART, "make demo"), (THEIRS, "make bench")):
        if not path.exists():
            raise SystemExit(f"{path} is not there: run `{how}`, which makes it.")


def warm_up() -> None:
    """Read both environments once, so that no contender pays for a cold disk."""
    note("reading both environments from the disk")
    run_child([OURS, "-c", "import torch, transformers, sklearn, polars, matplotlib"], limit=300)
    run_child([HEADSTART, "--help"], limit=300)
    names = "torch, transformers, sentence_transformers, setfit, onnxruntime, openvino, pandas, sklearn"
    run_child([THEIRS, "-c", f"import {names}"], limit=300)


def run_group(name: str, bench: Bench, results: Path, machine: dict[str, object]) -> None:
    """Measure one group, write its file and print its ratios."""
    note(f"{name}: {GROUPS[name].__doc__}")
    began = time.perf_counter()
    samples = Samples()
    ratios = GROUPS[name](bench, samples)
    if not ratios:
        return
    content = {
        "group": name,
        "about": GROUPS[name].__doc__,
        "measured": time.strftime("%Y-%m-%d"),
        "quick": bench.quick,
        "repeats": bench.repeats,
        "machine": machine,
        "ratios": [vars(ratio) for ratio in ratios],
        "contenders": samples.summary(),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for ratio in ratios:
        value = f"{ratio.value:.2f} times as fast as" if ratio.form == "times" else f"{ratio.value:.0%} of"
        extra = "; ".join(part for part in (ratio.note, f"goal: {ratio.goal}" if ratio.goal else "") if part)
        print(f"{ratio.measure}: {value} {ratio.against}" + (f" ({extra})" if extra else ""), flush=True)
    note(f"  {name} took {(time.perf_counter() - began) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds; contenders that take minutes run a third as often"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, one round, results apart: does everything run?")
    parser.add_argument("--results", type=Path, help="the folder for the JSON files")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    check_ready()
    results = arguments.results or HERE / ("results-quick" if arguments.quick else "results")
    failed = []
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as work:
        bench = Bench(Path(work), 1 if arguments.quick else arguments.repeats, arguments.quick)
        machine = describe_machine({"headstart": OURS, "peers": THEIRS})
        if float(str(machine["load_before"])) > 0.5:
            note(f"This machine is busy (load {machine['load_before']}): the ratios will be unsteady.")
        warm_up()
        for name in arguments.only:
            try:
                run_group(name, bench, results, machine)
            except BenchError as error:
                note(f"  {name} failed: {error}")
                failed.append(name)
    if failed:
        sys.exit(f"Not measured: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
