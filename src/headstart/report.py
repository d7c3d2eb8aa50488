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
    edges = np.arange(lowest, top + width + 1, width)
    counts, _ = np.histogram(np.minimum(lengths, top), edges)
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        label = f"{low}+" if high == edges[-1] else f"{low}-{high - 1}" if width > 1 else f"{low}"
        lines.append(f"  {label:>9} {'█' * round(40 * count / counts.max()):<40} {count:,}")
    return lines


def lengths_text(advice: LengthAdvice) -> str:
    """What `headstart lengths` prints."""
    quantiles = "  ".join(f"{level:.0%} {value:,}" for level, value in advice.quantiles.items())
    lines = [f"Token lengths of {len(advice.lengths):,} texts (special tokens included)", ""]
    lines += [*histogram(advice.lengths), "", f"Quantiles   {quantiles}", "", "max_length  texts cut  relative cost"]
    for one in advice.candidates:
        mark = "  <- advised" if one.max_length == advice.advised else ""
        lines.append(f"{one.max_length:>10,}  {one.cut:>9.2%}  {one.cost:>13.2f}{mark}")
    return "\n".join([*lines, "", f"Advised: --max-length {advice.advised}, {advice.reason}."])


def save_histogram(advice: LengthAdvice, path: Path) -> None:
    """Draw the histogram of token lengths, with the advised max_length, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    shown = np.minimum(advice.lengths, int(np.quantile(advice.lengths, 0.995, method="higher")))
    axes.hist(shown, bins=(np.arange(shown.min(), shown.max() + 2) - 0.5).tolist(), color="#4c78a8")
    axes.axvline(advice.advised, color="#e45756", linestyle="--", label=f"max_length {advice.advised} (advised)")
    axes.set(xlabel="tokens a text, special tokens included", ylabel="texts")
    axes.set_title(f"Token lengths of {len(advice.lengths):,} texts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with disk_errors(path):
        figure.savefig(path, format="png")


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A file of this package with its {fields} filled in."""
    return files("headstart").joinpath(template).read_text(encoding="utf-8").format_map(fields)


def summary_text(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The one screen after training, from headstart.json, metrics.json and scikit-learn's report on test."""
    parts = [(name, seconds) for name, seconds in metrics["timing"].items() if name != "total" and seconds >= 0.05]
    more: dict[str, Any] = {"spent": ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts), "folds": ""}
    more |= {"megabytes": metrics["features"]["bytes"] / 1e6}
    if folds := metrics.get("folds"):
        low, high = min(folds["accuracy"]), max(folds["accuracy"])
        mean = f"{folds['mean']:.3f} ± {folds['std']:.3f} over {folds['k']} folds ({low:.3f} to {high:.3f})"
        more["folds"] = f"Folds     accuracy {mean}; the head saved was trained on all but the test part\n"
    more |= {"data_name": printable(run["settings"]["data"]), "labels": _some(run["names"]), "report": report.rstrip()}
    more |= {"details": _details(metrics["test"]), "compare": compare_text(metrics)}
    return filled("summary.txt", {**run, **metrics, **more}).rstrip()


def costs_text(costs: Sequence[Mapping[str, Any]], budget: float) -> str:
    """What `--dry-run` prints."""
    lines = ["--thaw  predicted time  memory        disk"]
    for cost in costs:
        fits = "" if cost["seconds"] <= budget else f"  over the budget of {budget:,.0f} s"
        sizes = f"{cost['memory'] / 1e9:>4.1f} GB  {cost['disk'] / 1e6:>7,.0f} MB"
        lines.append(f"{cost['depth']:>6}  {cost['seconds']:>12,.0f} s  {sizes}{fits}")
    return "\n".join(lines)


def compare_text(metrics: Mapping[str, Any]) -> str:
    """The accuracy beside both baselines, and plainly whether it beats them."""
    mine = metrics["test"]["accuracy"]
    majority, tfidf = (metrics["baselines"][name]["accuracy"] for name in ("majority", "tfidf_logreg"))
    best, name = (tfidf, "TF-IDF + logistic regression") if tfidf >= majority else (majority, "the commonest label")
    beaten = f"better than both by {100 * (mine - best):.1f} points or more"
    verdict = beaten if mine > best else f"{'NOT' if mine < best else 'no'} better than {name}"
    return f"majority {majority:.3f}, TF-IDF + logistic regression {tfidf:.3f}: {verdict}"


def _details(numbers: Mapping[str, Any]) -> str:
    """What stands behind an accuracy."""
    shown = (*numbers["accuracy_ci95"], numbers["macro_f1"], numbers["log_loss"], numbers["ece"])
    return "(95% interval {:.3f} to {:.3f}), macro F1 {:.3f}, log loss {:.3f}, calibration error {:.3f}".format(*shown)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} labels: {', '.join(map(printable, names[:6]))}{', …' if len(names) > 6 else ''}"


def evaluation_text(numbers: Mapping[str, Any], report: str) -> str:
    """What `headstart evaluate` prints."""
    return f"{report.rstrip()}\n\nAccuracy {numbers['accuracy']:.3f} on {numbers['n']:,} texts {_details(numbers)}"


def model_card(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The run folder's README.md."""
    more = {"library": "transformers", "remark": "", "remote": ""}
    if run["head"]["kind"] == "pooled":
        asks = "transformers asks to run `modeling_headstart.py`, which is in this folder"
        remark = f"The head is headstart's own, so {asks}.\n\n"
        more = {"library": "headstart", "remark": remark, "remote": ", trust_remote_code=True"}
    data, name = (printable(Path(place).name) for place in (run["settings"]["data"], run["out"]))
    more |= {"data_name": data, "name": name, "labels": _some(run["names"])}
    more |= {"compare": compare_text(metrics), "report": report.rstrip()}
    card = filled("card.md", {**run, **metrics, **more})
    return "\n".join(map(printable, card.split("\n")))
