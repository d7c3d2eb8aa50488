"""A run folder's model as ONNX, behind a gate: the person's own test rows decide whether it may be used.

This room knows torch's exporter and onnxruntime's quantiser. It is a face: the command line alone calls it.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch

from headstart.encoder import choose_placement
from headstart.errors import ExportError, InputError, RunError
from headstart.folders import new_folder
from headstart.judge import labelled
from headstart.model import LibraryScorer, load_library, load_run
from headstart.onnx import FOLDER, RECORD, load_onnx, load_runtime
from headstart.predict import Predictor
from headstart.runs import Classifier
from headstart.tables import from_spreadsheets
from headstart.thaw import timed

OPSET = 22  # of 23, whose attention is one node, onnxruntime runs the rotary embeddings wrongly (ModernBERT)
NAMES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}  # as Optimum and transformers.js know them
MOST_LOST = 0.005  # accuracy that int8 may cost
TIMED = 512  # texts on which the speed is measured
Precision = Literal["fp32", "int8"]
Gate = Literal["refuses", "warns"]


@dataclass(frozen=True)
class Exported:
    """What the gate found of an export on n labelled texts.

    `agreement` is the share of them that get the same label as from torch in fp32; `speedup` compares texts a second
    with torch as `predict` uses it on this processor. `refused` says why it should not be used, if it should not.
    """

    file: str
    precision: Precision
    opset: int
    bytes: int
    n: int
    agreement: float
    accuracy_before: float
    accuracy_after: float
    speedup: float
    refused: str | None


def export(run: Path, precision: Precision, gate: Gate, test: str | None = None) -> Exported:
    """Write RUN/onnx/ anew: the model, and what was found of it on the run's test rows, or on the table `test`.

    An `ExportError` has the numbers of one that the gate `refuses`; what was there before then stays. An `InputError`
    if onnx is not installed, a `RunError` or `DataError` if the run, or labelled texts to test on, cannot be read.
    """
    exact = load_run(run, choose_placement("cpu", "fp32"))
    texts, truth = labelled_texts(run, exact, test)
    with new_folder(run / FOLDER, overwrite=True) as folder:
        path = folder / NAMES[precision]
        write_onnx(run, path, precision, exact)
        if not (run / "tokenizer.json").is_file():
            exact.tokenizer.fast.save(str(folder / "tokenizer.json"))
        made = load_onnx(run, path)
        said, says = (np.array(Predictor(one).predict(texts)) for one in (exact, made))
        before, after = (float((one == np.array(truth)).mean()) for one in (said, says))
        refused = None
        if precision == "fp32" and (said != says).any():
            refused = f"{(said != says).sum():,} of {len(texts):,} texts get another label"
        elif after < before - MOST_LOST:
            refused = f"accuracy falls from {before:.3f} to {after:.3f} on {len(texts):,} texts"
        if refused and gate == "refuses":
            raise ExportError(f"{run}: the {precision} export was refused: {refused}. --force keeps it all the same.")
        usual, some = load_run(run, choose_placement("cpu", "auto")), list(dict.fromkeys(texts))[:TIMED]
        speedup = timed(lambda: Predictor(usual).predict_proba(some)) / timed(
            lambda: Predictor(made).predict_proba(some)
        )
        agreement, size = float((said == says).mean()), path.stat().st_size
        found = Exported(path.name, precision, OPSET, size, len(texts), agreement, before, after, speedup, refused)
        (folder / RECORD).write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found


def labelled_texts(run: Path, classifier: Classifier, test: str | None) -> tuple[list[str], list[str]]:
    """Texts and their labels, as names: of a labelled table, or the run's own test rows."""
    if test is not None:
        table = labelled(classifier, test)
        return table.texts, table.written
    path = run / "predictions.csv"
    if not path.is_file():
        raise RunError(f"{run}: has no predictions.csv, so there is nothing to test the export on. Give --test FILE.")
    rows = pl.read_csv(path, infer_schema=False, columns=["text", "label"])
    texts, labels = (from_spreadsheets(rows[name]).fill_null("").to_list() for name in ("text", "label"))
    return texts, labels


def write_onnx(run: Path, path: Path, precision: Precision, about: Classifier) -> None:
    """Write a run folder's model by torch's exporter, then, for int8, with the weights of its products in 8 bits.

    Heads stay fp32: they are small, and what they say is what counts. Batch and length are left open.
    """
    load_runtime()
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise InputError("export needs onnx. Install it with: pip install 'headstart[onnx]'") from error
    model = LibraryScorer(load_library(run, choose_placement("cpu", "fp32")))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)}
    with quiet_exporter():
        program = torch.onnx.export(
            model,
            (ids, torch.tensor([[1, 1, 1], [1, 1, 0]])),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamic_shapes=(free, free),
            dynamo=True,
            verbose=False,
        )
        proto = program.model_proto
        described = {"id2label": dict(enumerate(about.names)), "max_length": about.max_length}
        onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in described.items()})
        onnx.save(proto, path)
        if precision == "int8":
            products = ["MatMul", "Gather"]  # a head's are Gemm
            quantize_dynamic(path, path, op_types_to_quantize=products, per_channel=True, weight_type=QuantType.QInt8)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's remarks on itself; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
