"""Numbers to something a person reads: the terminal, JSON, the model card, the length histogram.

This room draws and words; it computes nothing that it shows.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.errors import disk_errors, printable
from headstart.tokens import LengthAdvice

BAR = 40


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN is refused, since JSON has none."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_predictions(
    path: Path, texts: Sequence[str], truth: NDArray[np.int64], probabilities: NDArray[np.float64], names: Sequence[str]
) -> None:
    """`predictions.csv`: the test rows with their label, prediction, confidence and all probabilities."""
    predicted = probabilities.argmax(axis=1)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "prediction", "confidence", *(f"p_{name}" for name in names)])
        for text, label, best, row in zip(texts, truth, predicted, probabilities, strict=True):
            shares = [f"{value:.6f}" for value in row]
            writer.writerow([text, names[label], names[best], shares[best], *shares])


# --- lengths


def histogram(lengths: NDArray[np.int64], bins: int = 16) -> list[str]:
    """A histogram of token lengths in characters, a line a bin."""
    lowest, top = int(lengths.min()), int(np.quantile(lengths, 0.995, method="higher"))
    width = max(1, -(-(top + 1 - lowest) // bins))
    edges = np.arange(lowest, top + width + 1, width)
    counts, _ = np.histogram(np.minimum(lengths, top), edges)
    tallest = max(1, int(counts.max()))
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        label = f"{low}+" if high == edges[-1] else f"{low}-{high - 1}" if width > 1 else f"{low}"
        lines.append(f"  {label:>9} {'█' * round(BAR * int(count) / tallest):<{BAR}} {count:,}")
    return lines


def lengths_text(advice: LengthAdvice) -> str:
    """What `headstart lengths` prints."""
    quantiles = "  ".join(f"{level:.0%} {value:,}" for level, value in advice.quantiles.items())
    lines = [
        f"Token lengths of {len(advice.lengths):,} texts (special tokens included)",
        "",
        *histogram(advice.lengths),
    ]
    lines += ["", f"Quantiles   {quantiles}", "", "max_length  texts cut  relative cost"]
    for one in advice.candidates:
        mark = "  <- advised" if one.max_length == advice.advised else ""
        lines.append(f"{one.max_length:>10,}  {one.cut:>9.2%}  {one.cost:>13.2f}{mark}")
    lines += ["", f"Advised: --max-length {advice.advised}, {advice.reason}."]
    return "\n".join(lines)


def save_histogram(advice: LengthAdvice, path: Path) -> None:
    """Draw the histogram of token lengths, with the advised max_length, as a PNG.

    Raises:
        DiskError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = np.minimum(advice.lengths, int(np.quantile(advice.lengths, 0.995, method="higher")))
    axes.hist(shown, bins=(np.arange(shown.min(), shown.max() + 2) - 0.5).tolist(), color="#4c78a8")
    axes.axvline(advice.advised, color="#e45756", linestyle="--", label=f"max_length {advice.advised} (advised)")
    axes.set_xlabel("tokens a text, special tokens included")
    axes.set_ylabel("texts")
    axes.set_title(f"Token lengths of {len(advice.lengths):,} texts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with disk_errors(path):
        figure.savefig(path, format="png")


# --- a run


def summary_text(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The one screen after training: what was done, what came out, where it is, what to do next.

    Args:
        run: the content of headstart.json.
        metrics: the content of metrics.json.
        report: scikit-learn's classification report on test.
    """
    test, features, split = metrics["test"], metrics["features"], run["split"]
    low, high = test["accuracy_ci95"]
    lines = [
        f"Data      {printable(run['settings']['data'])}: {split['train']:,} to train, {split['validation']:,} to "
        f"validate, {split['test']:,} to test; {_some(run['names'])}",
        f"Lengths   max_length {run['max_length']}: {run['max_length_reason']}",
        f"Encoder   {run['settings']['model']} on {run['placement']}",
        f"Features  {features['texts']:,} distinct texts: {features['encoded']:,} encoded, "
        f"{features['reused']:,} from the store ({features['bytes'] / 1e6:,.1f} MB)",
        f"Head      {run['head']['description']}",
        "",
        report.rstrip(),
        "",
        f"Test      accuracy {test['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}), macro F1 "
        f"{test['macro_f1']:.3f}, log loss {test['log_loss']:.3f}, calibration error {test['ece']:.3f}",
        f"Compare   {compare_text(metrics)}",
        f"Time      {metrics['timing']['total']:.1f} s ({', '.join(_times(metrics['timing']))})",
        f"Saved     {run['out']}",
        f'Next      headstart predict {run["out"]} "your text"',
    ]
    return "\n".join(lines)


def compare_text(metrics: Mapping[str, Any]) -> str:
    """The accuracy beside both baselines, and plainly whether it beats them."""
    mine = metrics["test"]["accuracy"]
    majority = metrics["baselines"]["majority"]["accuracy"]
    tfidf = metrics["baselines"]["tfidf_logreg"]["accuracy"]
    best = max(majority, tfidf)
    if mine > best:
        verdict = f"better than both by {100 * (mine - best):.1f} points or more"
    else:
        name = "TF-IDF + logistic regression" if tfidf >= majority else "the commonest label"
        verdict = f"NOT better than {name}" if mine < best else f"no better than {name}"
    return f"majority {majority:.3f}, TF-IDF + logistic regression {tfidf:.3f}: {verdict}"


def _times(timing: Mapping[str, float]) -> list[str]:
    return [f"{name} {seconds:.1f}" for name, seconds in timing.items() if name != "total" and seconds >= 0.05]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:6])
    return f"{len(names)} labels: {shown}{', …' if len(names) > 6 else ''}"


def evaluation_text(numbers: Mapping[str, Any], report: str) -> str:
    """What `headstart evaluate` prints."""
    low, high = numbers["accuracy_ci95"]
    return (
        f"{report.rstrip()}\n\nAccuracy {numbers['accuracy']:.3f} on {numbers['n']:,} texts (95% interval {low:.3f} to "
        f"{high:.3f}), macro F1 {numbers['macro_f1']:.3f}, log loss {numbers['log_loss']:.3f}, "
        f"calibration error {numbers['ece']:.3f}"
    )


def model_card(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The run folder's README.md."""
    test = metrics["test"]
    low, high = test["accuracy_ci95"]
    pooled = run["head"]["kind"] == "pooled"
    remote = ", trust_remote_code=True" if pooled else ""
    remark = (
        "The head is headstart's own, so transformers asks to run `modeling_headstart.py`, which is in this folder.\n\n"
    )
    return f"""---
library_name: {"headstart" if pooled else "transformers"}
pipeline_tag: text-classification
tags: [text-classification, headstart]
---

# {Path(run["out"]).name}

A text classifier for {_some(run["names"])}, made by headstart {run["headstart"]} from
`{Path(run["settings"]["data"]).name}` ({run["split"]["train"]:,} texts to train on, {run["split"]["validation"]:,} to
choose on, {run["split"]["test"]:,} to test on; seed {run["settings"]["seed"]}).

## Result on the test part

Accuracy **{test["accuracy"]:.3f}** (95% interval {low:.3f} to {high:.3f}); {compare_text(metrics)}.

```
{report.rstrip()}
```

## How to use it

```
headstart predict . "your text"
```

```python
from transformers import pipeline

pipeline("text-classification", "."{remote})("your text")
```

{remark if pooled else ""}## What it is

Encoder `{run["settings"]["model"]}`; {run["head"]["description"]}. Texts are cut after {run["max_length"]} tokens.

## Limits

The numbers hold for texts like those it was trained on. It knows only the labels above and always gives one of them.
"""
