"""The group on Ray: what a second worker gains, and the costs that simulate.py takes."""

import json
import random

from measure import Samples, alternate, note, run_child
from setting import OURS, Bench, Ratio, fresh, headstart, numbered_texts, texts_file, trained_run

DISPATCH = """
import json, sys, time
from headstart import scale
class Nothing:
    def __call__(self, batch): return {"done": batch["part"]}
with scale.connected("local", 2) as cluster:
    from ray import data
    data.DataContext.get_current().enable_progress_bars = False
    def run(count):
        items = data.from_items([{"part": "x" * 500} for _ in range(count)], override_num_blocks=count)
        pool = data.ActorPoolStrategy(min_size=2, max_size=2)
        begun = time.perf_counter()
        assert sum(1 for _ in items.map_batches(Nothing, batch_size=1, compute=pool, num_cpus=1).iter_rows()) == count
        return time.perf_counter() - begun
    few = run(10)
    many = run(int(sys.argv[1]))
print(json.dumps({"each": (many - few) / (int(sys.argv[1]) - 10)}))
"""


def workers(bench: Bench, samples: Samples) -> list[Ratio]:
    """Scoring a file by Ray with one worker and with two, a core each, all of Ray on this machine."""
    part = 4096
    few, many = 2 * part, bench.size(14, 4) * part
    texts = list(numbered_texts())
    random.Random(2021).shuffle(texts)
    run = trained_run(bench, "native")
    files = {rows: texts_file(bench, f"workers-{rows}.csv", texts[:rows]) for rows in (few, many)}
    costs = dict.fromkeys(("read", "score", "write", "rows", "parts"), 0.0)

    def scoring(count: int, rows: int) -> None:
        out = fresh(bench, "bulk")
        more = ("--precision", "bf16", "--ray", "--workers", str(count))
        headstart("predict", run, "--input", files[rows], "--output", out, *more)
        now = json.loads((out / "_summary.json").read_text())["now"]
        samples.add(f"{count} workers, {rows:,} rows", {"seconds": now["seconds"]})
        if rows == many and count == 2:
            for name in ("read", "score", "write", "rows"):
                costs[name] += now[name]
            costs["parts"] += rows / part

    alternate(
        [
            (f"{count} workers, {rows:,} rows", bench.repeats, lambda count=count, rows=rows: scoring(count, rows))
            for count in (1, 2)
            for rows in (few, many)
        ]
    )
    median = {(count, rows): samples.median(f"{count} workers, {rows:,} rows") for count in (1, 2) for rows in files}
    rate = {count: (many - few) / (median[count, many] - median[count, few]) for count in (1, 2)}
    dispatch = run_child([OURS, "-c", DISPATCH, str(bench.size(1000, 50))], limit=600).numbers()["each"]
    start = median[2, few] - few / rate[2]
    note(
        f"  for simulate.py: --row-seconds {costs['score'] / costs['rows']:.6f} "
        f"--part-seconds {(costs['read'] + costs['write']) / costs['parts']:.3f} "
        f"--dispatch-seconds {dispatch:.4f} --start-seconds {start:.1f}"
    )
    what = f"scoring {many:,} texts by Ray with 2 workers, less the time to start"
    return [Ratio(what, "1 worker", rate[2] / rate[1], goal="at least 1.7")]
