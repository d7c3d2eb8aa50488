"""Numbers to something a person reads, as they are: the terminal, JSON, the model card, the length histogram."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headstart.errors import disk_errors, printable
from headstart.predict import answer_columns
from headstart.thaw import Cost
from headstart.tokens import LengthAdvice


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN is refused, since JSON has none."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_predictions(
    path: Path, texts: Sequence[str], truth: NDArray[np.int64], probabilities: NDArray[np.float64], names: Sequence[str]
) -> None:
    """`predictions.csv`: the test rows with their label, prediction, confidence and all probabilities."""
    given = {"text": texts, "label": [names[i] for i in truth]}
    pl.DataFrame(given | answer_columns(probabilities, names)).write_csv(path, float_precision=6)


def histogram(lengths: NDArray[np.int64], bins: int = 16) -> list[str]:
    """A histogram of token lengths in characters, a line a bin."""
    lowest, top = int(lengths.min()), int(np.quantile(lengths, 0.995, method="higher"))
    width = max(1, -(-(top + 1 - lowest) // bins))
    *lows, last, end = range(lowest, top + width + 1, width)
    counts, _ = np.histogram(np.minimum(lengths, top), [*lows, last, end])
    labels = [*(f"{low}-{low + width - 1}" if width > 1 else f"{low}" for low in lows), f"{last}+"]
    bars = ["█" * round(40 * count / counts.max()) for count in counts]
    return [f"  {label:>9} {bar:<40} {count:,}" for label, bar, count in zip(labels, bars, counts, strict=True)]


def lengths_text(advice: LengthAdvice) -> str:
    """What `headstart lengths` prints."""
    quantiles = "  ".join(f"{level:.0%} {value:,}" for level, value in advice.quantiles.items())
    row = "{max_length:>10,}  {cut:>9.2%}  {cost:>13.2f}".format_map
    rows = [row(one._asdict()) + "  <- advised" * (one.max_length == advice.advised) for one in advice.candidates]
    shown = {"histogram": "\n".join(histogram(advice.lengths)), "rows": "\n".join(rows), "quantiles": quantiles}
    return filled("lengths.txt", {**advice._asdict(), **shown, "texts": len(advice.lengths)}).rstrip()


def save_histogram(advice: LengthAdvice, path: Path) -> None:
    """Draw the histogram of token lengths, with the advised max_length, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    shown = np.minimum(advice.lengths, int(np.quantile(advice.lengths, 0.995, method="higher")))
    axes.hist(shown, bins=(np.arange(shown.min(), shown.max() + 2) - 0.5).tolist(), color="#4c78a8")
    axes.axvline(advice.advised, color="#e45756", linestyle="--", label=f"max_length {advice.advised} (advised)")
    title = f"Token lengths of {len(shown):,} texts"
    axes.set(title=title, xlabel="tokens a text, special tokens included", ylabel="texts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with disk_errors(path):
        figure.savefig(path, format="png")


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A file of this package with its {fields} filled in."""
    return files("headstart").joinpath(template).read_text(encoding="utf-8").format_map(fields)


def _told(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> dict[str, Any]:
    """What the one screen and the model card may tell; each name is on one line, and harmless there."""
    data, name = printable(run["settings"]["data"]), printable(Path(run["out"]).name)
    labels = f"{len(run['names'])} labels: {', '.join(map(printable, run['names'][:6]))}"
    told = {"data_path": data, "data_name": Path(data).name, "name": name, "report": report.rstrip()}
    told |= {"labels": labels + (", …" if len(run["names"]) > 6 else ""), "compare": compare_text(metrics)}
    return {**run, **metrics, **told}


def summary_text(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The one screen after training, from headstart.json, metrics.json and scikit-learn's report on test."""
    parts = [(name, seconds) for name, seconds in metrics["timing"].items() if name != "total" and seconds >= 0.05]
    more = {"spent": ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts), "folds": ""}
    if folds := metrics.get("folds"):
        more["folds"] = filled("folds.txt", {**folds, "low": min(folds["accuracy"]), "high": max(folds["accuracy"])})
    megabytes = metrics["features"]["bytes"] / 1e6
    return filled("summary.txt", {**_told(run, metrics, report), **more, "megabytes": megabytes}).rstrip()


def costs_text(costs: Sequence[Cost], budget: float) -> str:
    """What `--dry-run` prints."""
    lines = ["--thaw  predicted time  memory        disk"]
    for cost in costs:
        fits = "" if cost.seconds <= budget else f"  over the budget of {budget:,.0f} s"
        sizes = f"{cost.memory / 1e9:>4.1f} GB  {cost.disk / 1e6:>7,.0f} MB"
        lines.append(f"{cost.depth:>6}  {cost.seconds:>12,.0f} s  {sizes}{fits}")
    return "\n".join(lines)


def compare_text(metrics: Mapping[str, Any]) -> str:
    """The accuracy beside both baselines, and plainly whether it beats them."""
    mine = metrics["test"]["accuracy"]
    majority, tfidf = (metrics["baselines"][name]["accuracy"] for name in ("majority", "tfidf_logreg"))
    best, name = (tfidf, "TF-IDF + logistic regression") if tfidf >= majority else (majority, "the commonest label")
    beaten = f"better than both by {100 * (mine - best):.1f} points or more"
    verdict = beaten if mine > best else f"{'NOT' if mine < best else 'no'} better than {name}"
    return f"majority {majority:.3f}, TF-IDF + logistic regression {tfidf:.3f}: {verdict}"


def evaluation_text(numbers: Mapping[str, Any], report: str) -> str:
    """What `headstart evaluate` prints."""
    return filled("evaluation.txt", {**numbers, "report": report.rstrip()}).rstrip()


def model_card(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The run folder's README.md."""
    more = {"library": "transformers", "remark": "", "remote": ""}
    if run["head"]["kind"] == "pooled":
        remark = filled("remark.md", {}) + "\n"
        more = {"library": "headstart", "remark": remark, "remote": ", trust_remote_code=True"}
    card = filled("card.md", _told(run, metrics, report) | more)
    return "\n".join(map(printable, card.split("\n")))
