"""Groups on fine-tuning: each measures into `samples` and says what the ratios are."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from measure import Numbers, Samples, alternate
from setting import DATA, Bench, Ratio, faster, fresh, headstart, minilm, peer, read_rows, some_rows, train

SEEDS = (2021, 7, 42, 1, 2)


def thaw(bench: Bench, samples: Samples) -> list[Ratio]:
    """Fine-tuning all of MiniLM on SST-2, the same epochs, batch and learning rate, another seed each round."""
    table, epochs = some_rows(bench, "sst2/train.csv", bench.size(10**9, 600)), str(bench.size(3, 2))
    validation, test = DATA / "sst2" / "dev.csv", DATA / "sst2" / "test.csv"

    def ours(depth: str) -> Callable[[], None]:
        def measure() -> None:
            name = f"headstart, {depth}"
            words = ("--thaw", depth, "--epochs", epochs, "--seed", str(SEEDS[len(samples.of.get(name, []))]))
            given, out = ("--validation", validation, "--test", test), fresh(bench, "run")
            numbers = train(table, out, *given, *words, cache=fresh(bench, "cache"))
            samples.add(name, {**numbers, "fit_seconds": fitting(out), "epoch_seconds": epoch_seconds(out)})

        return measure

    def trainer(name: str, epochs: str, *flags: str) -> Callable[[], None]:
        def measure() -> None:
            words = ("--epochs", epochs, "--seed", str(SEEDS[len(samples.of.get(name, []))]))
            samples.add(name, peer("trainer_thaw.py", minilm(), table, test, *words, *flags))

        return measure

    fast, plain = "Trainer, bf16 and length groups", "Trainer, defaults, one epoch"
    alternate(
        [
            ("headstart, all", bench.repeats, ours("all")),
            (fast, bench.repeats, trainer(fast, epochs, "--fast")),
            ("headstart, 2", bench.few, ours("2")),
            (plain, bench.repeats, trainer(plain, "1")),
        ]
    )
    what = f"fine-tuning the whole encoder, {epochs} epochs, {len(read_rows(table)):,} texts, MiniLM"
    rival = "Hugging Face Trainer, bf16, dynamic padding, length groups"
    one = samples.median("headstart, all", "epoch_seconds")  # with its validation, which Trainer's is without
    return [
        faster(samples, "headstart, all", fast, f"{what}; whole process", rival, "at least 1.25"),
        Ratio("an epoch of it", rival, samples.median(fast, "fit_seconds") / int(epochs) / one, goal="at least 1.25"),
        Ratio(
            "an epoch of it",
            "Hugging Face Trainer, its defaults and dynamic padding",
            samples.median(plain, "fit_seconds") / one,
            goal="at least 4",
        ),
        Ratio(
            "an epoch of --thaw 2",
            "an epoch of --thaw all",
            samples.median("headstart, 2", "epoch_seconds") / samples.median("headstart, all", "epoch_seconds"),
            "share",
            f"accuracy {samples.median('headstart, 2', 'accuracy'):.3f}",
            "at most 45%",
        ),
    ]


def costs(bench: Bench, samples: Samples) -> list[Ratio]:
    """What `--thaw auto` predicts that fine-tuning to a depth takes, against what it then took."""
    ratios = []
    for name in ("sst2/all.csv", "customer-reviews.csv", "trec/train.csv"):
        table, cache = some_rows(bench, name, bench.size(3000, 200)), fresh(bench, "cache")
        took: dict[str, float] = {}
        for depth in ("auto", "1", "3", "6"):
            out = fresh(bench, "run")
            numbers: Numbers = headstart(
                "train", table, "--thaw", depth, "--epochs", "3", "--out", out, "--overwrite", cache=cache
            )
            took["all" if depth == "auto" else depth] = fitting(out)
            if depth == "auto":
                listed = json.loads((out / "headstart.json").read_text())["thaw"]["costs"]
                predicted = {str(cost["depth"]): float(cost["seconds"]) for cost in listed}
            samples.add(f"{name}, --thaw {depth}", numbers)
        shares = {depth: predicted[depth] / seconds for depth, seconds in took.items()}
        said = ", ".join(f"{depth}: {share:.0%}" for depth, share in shares.items())
        worst = max(shares.values(), key=lambda share: abs(share - 1))
        what = f"time predicted for a depth, the worst one, {len(read_rows(table)):,} texts of {name}"
        ratios.append(Ratio(what, "the time it took", worst, "share", said, "70% to 130%"))
    return ratios


def fitting(out: Path) -> float:
    """Seconds that fine-tuning took in a run: the frozen prefix, all epochs with their validation, and the test."""
    return float(json.loads((out / "headstart.json").read_text())["thaw"]["seconds"])


def epoch_seconds(out: Path) -> float:
    """The median over a run's epochs."""
    return statistics.median(one["seconds"] for one in json.loads((out / "headstart.json").read_text())["history"])
