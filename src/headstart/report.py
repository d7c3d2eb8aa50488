"""Numbers to something a person reads, as they are: the terminal, JSON, the model card, the length histogram."""

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
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
    lines = [
        f"Token lengths of {len(advice.lengths):,} texts (special tokens included)",
        "",
        *histogram(advice.lengths),
    ]
    lines += ["", f"Quantiles   {quantiles}", "", "max_length  texts cut  relative cost"]
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


def summary_text(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The one screen after training, from headstart.json, metrics.json and scikit-learn's report on test."""
    features, split, timing, test = metrics["features"], run["split"], metrics["timing"], metrics["test"]
    parts = [f"{name} {seconds:.1f}" for name, seconds in timing.items() if name != "total" and seconds >= 0.05]
    lines = [
        f"Data      {printable(run['settings']['data'])}: {split['train']:,} to train, {split['validation']:,} to "
        f"validate, {split['test']:,} to test; {_some(run['names'])}",
        f"Lengths   max_length {run['max_length']}: {run['max_length_reason']}",
        f"Encoder   {run['settings']['model']} on {run['placement']}",
        f"Features  {features['texts']:,} distinct texts: {features['encoded']:,} encoded, "
        f"{features['reused']:,} from the store ({features['bytes'] / 1e6:,.1f} MB)",
        f"Head      {run['head']['description']}",
        f"\n{report.rstrip()}\n",
        f"Test      accuracy {test['accuracy']:.3f} {_details(test)}",
    ]
    if folds := metrics.get("folds"):
        low, high = min(folds["accuracy"]), max(folds["accuracy"])
        mean = f"{folds['mean']:.3f} ± {folds['std']:.3f} over {folds['k']} folds ({low:.3f} to {high:.3f})"
        lines.append(f"Folds     accuracy {mean}; the head saved was trained on all but the test part")
    lines += [
        f"Compare   {compare_text(metrics)}",
        f"Time      {timing['total']:.1f} s ({', '.join(parts)})",
        f'Saved     {run["out"]}\nNext      headstart predict {run["out"]} "your text"',
    ]
    return "\n".join(lines)


def compare_text(metrics: Mapping[str, Any]) -> str:
    """The accuracy beside both baselines, and plainly whether it beats them."""
    mine = metrics["test"]["accuracy"]
    majority, tfidf = (metrics["baselines"][name]["accuracy"] for name in ("majority", "tfidf_logreg"))
    best, name = max((tfidf, "TF-IDF + logistic regression"), (majority, "the commonest label"), key=itemgetter(0))
    beaten = f"better than both by {100 * (mine - best):.1f} points or more"
    verdict = beaten if mine > best else f"{'NOT' if mine < best else 'no'} better than {name}"
    return f"majority {majority:.3f}, TF-IDF + logistic regression {tfidf:.3f}: {verdict}"


def _details(numbers: Mapping[str, Any]) -> str:
    """What stands behind an accuracy."""
    shown = (*numbers["accuracy_ci95"], numbers["macro_f1"], numbers["log_loss"], numbers["ece"])
    return "(95% interval {:.3f} to {:.3f}), macro F1 {:.3f}, log loss {:.3f}, calibration error {:.3f}".format(*shown)


def _some(names: Sequence[str]) -> str:
    shown = [*map(printable, names[:6]), *(["…"] if len(names) > 6 else [])]
    return f"{len(names)} labels: {', '.join(shown)}"


def evaluation_text(numbers: Mapping[str, Any], report: str) -> str:
    """What `headstart evaluate` prints."""
    return f"{report.rstrip()}\n\nAccuracy {numbers['accuracy']:.3f} on {numbers['n']:,} texts {_details(numbers)}"


def model_card(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The run folder's README.md."""
    test, split, settings = metrics["test"], run["split"], run["settings"]
    low, high = test["accuracy_ci95"]
    data, name = (printable(Path(place).name) for place in (settings["data"], run["out"]))
    pooled = run["head"]["kind"] == "pooled"
    remark = (
        "The head is headstart's own, so transformers asks to run `modeling_headstart.py`, which is in this folder."
    )
    remark, remote = (f"{remark}\n\n", ", trust_remote_code=True") if pooled else ("", "")
    card = f"""---
library_name: {"headstart" if pooled else "transformers"}
pipeline_tag: text-classification
tags: [text-classification, headstart]
---

# {name}

A text classifier for {_some(run["names"])}, made by headstart {run["headstart"]} from
`{data}` ({split["train"]:,} texts to train on, {split["validation"]:,} to
choose on, {split["test"]:,} to test on; seed {settings["seed"]}).

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

{remark}## What it is

Encoder `{settings["model"]}`; {run["head"]["description"]}. Texts are cut after {run["max_length"]} tokens.

## Limits

The numbers hold for texts like those it was trained on. It knows only the labels above and always gives one of them.
"""
    return "\n".join(map(printable, card.split("\n")))
