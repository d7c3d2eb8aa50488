"""Numbers to something a person reads, as they are: the terminal, JSON, the model card, the length histogram.

What is said, and how, is in the templates.
"""

import functools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.markup import escape

from headstart.audit import WRONG, Audit
from headstart.data import Dataset
from headstart.errors import disk_errors, printable
from headstart.metrics import report_text
from headstart.predict import answer_columns
from headstart.runs import hub_id
from headstart.tables import for_spreadsheets
from headstart.thaw import layers_text
from headstart.tokens import LengthAdvice

WORST = 8  # rows that a screen shows


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN is refused, since JSON has none."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_predictions(
    path: Path, test: Dataset, probabilities: NDArray[np.float64], thresholds: Sequence[float] = ()
) -> None:
    """`predictions.csv`: the test rows with their label, prediction, confidence and all probabilities."""
    given = {"text": test.texts, "label": test.written}
    rows = pl.DataFrame(given | answer_columns(probabilities, test.names, thresholds))
    for_spreadsheets(rows).write_csv(path, float_precision=6)


def length_bins(lengths: NDArray[np.int64], bins: int = 16) -> tuple[int, int, list[int]]:
    """The shortest length, the width of a bin, and how many texts each bin has; the last has all that are longer."""
    lowest, top = int(lengths.min()), int(np.quantile(lengths, 0.995, method="higher"))
    width = max(1, -(-(top + 1 - lowest) // bins))
    counts, _ = np.histogram(np.minimum(lengths, top), np.arange(lowest, top + width + 1, width))
    return lowest, width, counts.tolist()


def lengths_text(advice: LengthAdvice) -> str:
    """What `headstart lengths` prints."""
    return filled("lengths.txt", {**advice._asdict(), "bins": length_bins(advice.lengths)})


def save_histogram(advice: LengthAdvice, path: Path) -> None:
    """Draw the histogram of token lengths, with the advised max_length, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    lowest, width, counts = length_bins(advice.lengths, bins=64)
    axes.bar(lowest + width * np.arange(len(counts)), counts, width, align="edge", color="#4c78a8")
    axes.axvline(advice.advised, color="#e45756", linestyle="--", label=f"max_length {advice.advised} (advised)")
    title = f"Token lengths of {len(advice.lengths):,} texts"
    axes.set(title=title, xlabel="tokens a text, special tokens included", ylabel="texts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with disk_errors(path):
        figure.savefig(path, format="png")


@functools.cache
def _templates() -> Any:
    """The package's templates: what is filled in is printable, and escaped where it goes into a page."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("headstart"),
        autoescape=jinja2.select_autoescape(["html"]),
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"score": "{:.3f}".format, "percent": "{:.0%}".format, "count": "{:,}".format}
    templates.filters |= {"quote": shlex.quote, "basename": lambda path: Path(path).name}
    templates.filters |= {"log2": math.log2, "layers": layers_text, "escape_markup": escape}
    templates.filters |= {"hub_id": hub_id, "json": lambda text: json.dumps(printable(text), ensure_ascii=False)}
    templates.globals["report_lines"] = lambda numbers: report_text(numbers).rstrip().split("\n")
    return templates


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A template with its fields filled in, without the last line's end."""
    return str(_templates().get_template(template).render(fields)).rstrip()


def told(template: str, run: Mapping[str, Any], metrics: Mapping[str, Any], **figures: Any) -> str:
    """A template that tells of a run: from headstart.json, metrics.json and what only report.html shows."""
    fields = {**run, "folds": None, **metrics, **figures}
    steps = lines_of("steps.txt", fields)
    return filled(template, {**fields, "steps": zip(steps[::2], steps[1::2], strict=True)})


def lines_of(template: str, fields: Mapping[str, Any]) -> list[str]:
    """A template's lines, each a value that is escaped as any other where it goes into a page."""
    return list(filter(None, filled(template, fields).split("\n")))


def audit_text(found: Audit, source: str, out: Path) -> str:
    """What `headstart audit` prints."""
    text, label = found.columns
    worst = found.table.filter(pl.col("issue").str.contains(WRONG, literal=True)).head(WORST)
    shown = worst.select("row", "suggested_label", "score", text=pl.col(text), label=pl.col(label)).to_dicts()
    return filled("audit.txt", {**found._asdict(), "data": source, "worst": shown, "out": str(out)})
