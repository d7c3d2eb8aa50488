"""Probabilities that can be believed, for a classifier that is finished: a calibration from labelled texts.

This room knows the order of the steps and what is honest to say of them. It is a face: the command line alone calls it.
"""

import importlib.metadata
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from headstart import metrics, report
from headstart.checkpoints import check_out
from headstart.config import MIN_ROWS, Device, Problem
from headstart.encoder import choose_placement, load_tokenizer, quiet_transformers
from headstart.errors import RunError
from headstart.folders import new_folder
from headstart.judge import labelled
from headstart.metrics import Calibration, Labels, Shares
from headstart.model import load_library, load_run, rescale
from headstart.predict import Predictor, probabilities_of

Json = dict[str, Any]
FOLDS = 5
CLOSE = 1e-3  # a probability that was computed may be so far from the one expected
CODE = "modeling_headstart.py"


def calibrate(
    folder: Path,
    source: str,
    out: Path,
    text: str | None = None,
    label: str | None = None,
    device: Device = "auto",
    *,
    overwrite: bool = False,
) -> Json:
    """Fit a calibration on a labelled table, and write a run folder whose last layer holds it; decisions stay.

    `folder` is a run folder or another classifier's. Returns its headstart.json, and under `before` and `test` the
    numbers on the table (see `metrics.evaluate`); the latter are cross-fitted. An `InputError` says what is amiss.
    """
    check_out(out, overwrite=overwrite)
    placement = choose_placement(device, "fp32")
    classifier = load_run(folder, placement)
    names, problem = classifier.names, classifier.problem
    table = labelled(classifier, source, text, label, MIN_ROWS)
    said = Predictor(classifier).score(table.texts, progress="scoring").probabilities
    logits = logits_of(said, problem)
    fitted, crossed = cross_fitted(logits, table.labels, problem)
    thresholds = classifier.thresholds
    if thresholds:  # where they were before
        moved = probabilities_of(fitted(logits_of(np.array(thresholds), problem)), problem)
        thresholds = tuple(moved.tolist())
    before = metrics.evaluate(said, table.labels, names, problem, classifier.thresholds)
    after = metrics.evaluate(crossed, table.labels, names, problem, thresholds)
    found: Json = {"method": "temperature", **fitted.described(), "data": source, "texts": len(table), "folds": FOLDS}
    for name in ("ece", "log_loss"):
        found |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    info = {"names": list(names), "columns": list(table.columns), "head": {"kind": "native"}, **classifier.info}
    info |= {"headstart": importlib.metadata.version("headstart"), "max_length": classifier.max_length}
    info |= {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "calibration": found, "out": str(out)}
    info |= {"problem": problem, "thresholds": list(thresholds), "long": classifier.long}
    with new_folder(out, overwrite=overwrite) as made:
        model, tokenizer = load_library(folder, choose_placement("cpu", "fp32")), load_tokenizer(folder)[0]
        rescale(model, *fitted)
        tokenizer.model_max_length = classifier.max_length
        with quiet_transformers():
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        if (folder / CODE).is_file():
            shutil.copyfile(folder / CODE, made / CODE)
        some, expected = table.texts[:FOLDS], probabilities_of(fitted(logits[:FOLDS]), problem)
        if np.abs(Predictor(load_run(made, placement)).predict_proba(some) - expected).max() > CLOSE:
            raise RunError(f"{folder}: its logits do not come from a last layer that could be calibrated.")
        report.write_predictions(made / "predictions.csv", table, crossed, thresholds)
        report.write_json(made / "headstart.json", info)
        report.write_json(made / "metrics.json", {"test": after, "calibration": found})
        card = report.filled("calibrated.md", {**info, "test": after})
        (made / "README.md").write_text(card + "\n", encoding="utf-8")
    notices = list(table.notices)
    if classifier.info.get("settings", {}).get("data") == source:
        notices.append(f"{source}: is what it was trained on, so these numbers flatter. Give a table of its own.")
    return {**info, "before": before, "test": after, "notices": notices}


def logits_of(probabilities: Shares, problem: Problem) -> Shares:
    """Logits with these probabilities; where a text has one label, but for a constant that changes nothing."""
    sure = probabilities.clip(np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).eps)
    return np.log(sure) - (np.log1p(-sure) if problem == "multi" else 0.0)


def cross_fitted(logits: Shares, truth: Labels, problem: Problem) -> tuple[Calibration, Shares]:
    """What calibrates (n, labels) logits, and their probabilities, each by what fits the folds without that text."""
    from sklearn.model_selection import KFold

    crossed = np.empty_like(logits)
    for rest, fold in KFold(FOLDS, shuffle=True, random_state=0).split(logits):
        crossed[fold] = probabilities_of(metrics.calibrate(logits[rest], truth[rest])(logits[fold]), problem)
    return metrics.calibrate(logits, truth), crossed
