"""Numbers to something a person reads, as they are: the terminal, JSON, the model card, the length histogram."""

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
from rich.text import Text

from headstart.audit import WRONG, Audit
from headstart.data import Dataset
from headstart.errors import disk_errors, printable
from headstart.explain import Explanation, Neighbour
from headstart.predict import answer_columns
from headstart.tables import for_spreadsheets
from headstart.thaw import Cost, layers_text
from headstart.tokens import LengthAdvice

WORST = 8  # rows or words that a screen shows
TABLE_OPTIONS = ("validation", "test", "text", "label")  # which say what a table is, and where
MORE_HELPS = 0.01  # accuracy gained by twice the texts, from which on more are worth having


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN is refused, since JSON has none."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_predictions(path: Path, test: Dataset, probabilities: NDArray[np.float64]) -> None:
    """`predictions.csv`: the test rows with their label, prediction, confidence and all probabilities."""
    given = {"text": test.texts, "label": [test.names[i] for i in test.labels]}
    for_spreadsheets(pl.DataFrame(given | answer_columns(probabilities, test.names))).write_csv(path, float_precision=6)


def length_bins(lengths: NDArray[np.int64], bins: int = 16) -> tuple[int, int, list[int]]:
    """The shortest length, the width of a bin, and how many texts each bin has; the last has all that are longer."""
    lowest, top = int(lengths.min()), int(np.quantile(lengths, 0.995, method="higher"))
    width = max(1, -(-(top + 1 - lowest) // bins))
    counts, _ = np.histogram(np.minimum(lengths, top), np.arange(lowest, top + width + 1, width))
    return lowest, width, counts.tolist()


def histogram(lengths: NDArray[np.int64]) -> list[str]:
    """A histogram of token lengths in characters, a line a bin."""
    lowest, width, counts = length_bins(lengths)
    *lows, last = (lowest + width * i for i in range(len(counts)))
    labels = [*(f"{low}-{low + width - 1}" if width > 1 else f"{low}" for low in lows), f"{last}+"]
    bars = ["█" * round(40 * count / max(counts)) for count in counts]
    return [f"  {label:>9} {bar:<40} {count:,}" for label, bar, count in zip(labels, bars, counts, strict=True)]


def lengths_text(advice: LengthAdvice) -> str:
    """What `headstart lengths` prints."""
    return filled("lengths.txt", {**advice._asdict(), "histogram": histogram(advice.lengths)})


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
    return templates


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A template with its fields filled in, without the last line's end."""
    return str(_templates().get_template(template).render(fields)).rstrip()


def _told(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> dict[str, Any]:
    """What the one screen, the model card and the page may tell."""
    data, names = run["settings"]["data"], run["names"]
    labels = f"{len(names)} labels: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
    told = {"data_path": data, "data_name": Path(data).name, "name": Path(run["out"]).name, "labels": labels}
    told["place"] = shlex.quote(run["out"])
    told |= {"compare": compare_text(metrics), "trust": trust_text(metrics), "report": report}
    return {**run, "folds": None, **metrics, **told, "limits": limits(metrics), "steps": next_steps(run, metrics)}


def summary_text(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The one screen after training, from headstart.json, metrics.json and scikit-learn's report on test."""
    parts = [(name, seconds) for name, seconds in metrics["timing"].items() if name != "total" and seconds >= 0.05]
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts)
    return filled("summary.txt", {**_told(run, metrics, report), "spent": spent})


def trust_text(metrics: Mapping[str, Any]) -> str:
    """How far its confidence can be believed, and what it comes to to leave the unsure texts to a person."""
    calibration = metrics["calibration"]
    said = "not calibrated"
    if calibration["method"] != "none":
        errors = f"calibration error {calibration['ece_before']:.3f} before, {calibration['ece_after']:.3f} after"
        said = f"{errors} dividing logits by {calibration['temperature']:.2f}"
    rows = [row for row in metrics["coverage"] if row["accuracy"] is not None and row["coverage"] < 1]
    if gains := [row for row in rows if row["coverage"] >= 0.5]:
        row = gains[-1]
        said += (
            f"; with --min-confidence {row['min_confidence']} it answers {row['coverage']:.0%}, {row['accuracy']:.3f}"
        )
        said += " of them right"
    return said


def limits(metrics: Mapping[str, Any]) -> list[str]:
    """What holds the result down: kinds of text that are surely below the rest, and whether more texts would help."""
    accuracy = metrics["test"]["accuracy"]
    worse = [row for row in metrics["slices"] if row["accuracy_ci95"][1] < accuracy]
    said = [f"{row['slice']}: accuracy {row['accuracy']:.3f} on {row['n']:,} test texts" for row in worse[:2]]
    if len(curve := metrics["learning_curve"]) > 1:
        less, whole = curve[-2:]
        gain = whole["validation_accuracy"] - less["validation_accuracy"]
        gain /= math.log2(whole["texts"] / less["texts"])
        there = {name: one["f1"] for name, one in metrics["test"]["per_label"].items() if one["support"]}
        helps = f"more texts would help, above all of {min(there, key=lambda name: there[name])}"
        verdict = helps if gain >= MORE_HELPS else "more texts alone would add little"
        learnt = f"a head on {less['texts']:,} texts was {less['validation_accuracy']:.3f} accurate on validation"
        said.append(f"{learnt}, on all {whole['texts']:,} {whole['validation_accuracy']:.3f}: {verdict}")
    return said


def next_steps(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do for a better result: commands, each with its reason."""
    settings, said = run["settings"], []
    options = (f" --{name} {shlex.quote(settings[name])}" for name in TABLE_OPTIONS if settings[name])
    source = shlex.quote(settings["data"]) + "".join(options)
    if settings["recipe"] == "article":
        said.append((f"headstart train {source}", "the default recipe, which fine-tunes the encoder, too"))
    elif settings["thaw"] == "0":
        said.append((f"headstart train {source} --thaw auto", "fine-tunes the encoder, too"))
    elif longer := [one for one in run["thaw"].get("costs", ()) if one["seconds"] > settings["time_budget"]]:
        minutes, depth = -(-longer[-1]["seconds"] // 60), layers_text(longer[-1]["depth"])
        said.append((f"headstart train {source} --time-budget {minutes:.0f}m", f"lets it fine-tune {depth}"))
    if count := metrics["contradicted"]:
        texts = "a test text" if count == 1 else f"{count:,} test texts"
        said.append((f"headstart audit {source}", f"it is sure against the label of {texts}: some labels may be wrong"))
    return said


def costs_text(costs: Sequence[Cost], budget: float) -> str:
    """What `--dry-run` prints."""
    lines = ["--thaw  predicted time  memory        disk"]
    for cost in costs:
        fits = "" if cost.seconds <= budget else f"  over the budget of {budget:,.0f} s"
        sizes = f"{cost.memory / 1e9:>4.1f} GB  {cost.disk / 1e6:>7,.0f} MB"
        lines.append(f"{cost.depth:>6}  {cost.seconds:>12,.0f} s  {sizes}{fits}")
    return "\n".join(lines)


def compare_text(metrics: Mapping[str, Any]) -> str:
    """The accuracy beside both baselines, and plainly whether it beats them, and whether that may be luck."""
    mine = metrics["test"]["accuracy"]
    majority, tfidf = (metrics["baselines"][name]["accuracy"] for name in ("majority", "tfidf_logreg"))
    best, name = (tfidf, "tfidf_logreg") if tfidf >= majority else (majority, "majority")
    named = "TF-IDF + logistic regression" if name == "tfidf_logreg" else "the commonest label"
    beaten = f"better than both by {100 * (mine - best):.1f} points or more"
    verdict = beaten if mine > best else f"{'NOT' if mine < best else 'no'} better than {named}"
    p = metrics["comparisons"][name]["p_value"]
    maybe = ", which may be luck" if p > 0.05 and mine != best else ""
    luck = "p < 0.001" if p < 0.001 else f"p = {p:.3f}{maybe}"
    return f"majority {majority:.3f}, TF-IDF + logistic regression {tfidf:.3f}: {verdict} ({luck})"


def evaluation_text(numbers: Mapping[str, Any], report: str) -> str:
    """What `headstart evaluate` prints."""
    return filled("evaluation.txt", {**numbers, "report": report})


def audit_text(found: Audit, source: str, out: Path) -> str:
    """What `headstart audit` prints."""
    text, label = found.columns
    worst = found.table.filter(pl.col("issue").str.contains(WRONG, literal=True)).head(WORST)
    shown = worst.select("row", "suggested_label", "score", text=pl.col(text), label=pl.col(label)).to_dicts()
    options = "".join(
        f" --{role} {shlex.quote(name)}" for role, name in zip(("text", "label"), found.columns, strict=True)
    )
    told = {"data": source, "rows": found.table.height, "labels": found.labels, "counts": found.counts}
    usual = found.columns == ("sentence", "label")
    return filled(
        "audit.txt",
        {**told, "worst": shown, "out": str(out), "place": shlex.quote(str(out)), "options": "" if usual else options},
    )


def explanation_fields(explanation: Explanation, nearest: Sequence[Neighbour]) -> dict[str, Any]:
    """An explanation as JSON has it."""
    words = [word._asdict() for word in explanation.words]
    return {**explanation._asdict(), "words": words, "nearest": [one._asdict() for one in nearest]}


def explanation_text(explanation: Explanation, nearest: Sequence[Neighbour]) -> str:
    """What `headstart explain` prints: the strongest words, the strongest first."""
    words = sorted(explanation.words, key=lambda word: -(word.score or 0.0))
    unread = sum(word.score is None for word in words)
    told = {**explanation_fields(explanation, nearest), "words": words, "unread": unread, "most": WORST}
    return filled("explain.txt", told)


def explanation_page(explanation: Explanation, nearest: Sequence[Neighbour]) -> str:
    """What `headstart explain --html` prints: a page with the words coloured."""
    return filled("explain.html", explanation_fields(explanation, nearest))


def coloured_words(explanation: Explanation) -> Text:
    """The text for a terminal: words on green speak for the label, on red against it."""
    text = Text(printable(explanation.text.replace("\n", " ")))
    strongest = max((abs(word.score or 0.0) for word in explanation.words), default=0.0) or 1.0
    for word in explanation.words:
        if word.score is None:
            text.stylize("dim strike", word.start, word.end)
        elif share := round(200 * abs(word.score) / strongest):
            red, green = (0, share) if word.score > 0 else (share, 0)
            text.stylize(f"white on rgb({red},{green},0)", word.start, word.end)
    return text


def model_card(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str) -> str:
    """The run folder's README.md."""
    return filled("card.md", _told(run, metrics, report)) + "\n"


def page(run: Mapping[str, Any], metrics: Mapping[str, Any], report: str, figures: Mapping[str, Any]) -> str:
    """`report.html`: everything on one page that needs no network."""
    return filled("report.html", {**_told(run, metrics, report), **figures}) + "\n"
