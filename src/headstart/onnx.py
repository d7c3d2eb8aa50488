"""Scoring by onnxruntime with what `headstart export` made of a run folder: no torch, no transformers."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError, RunError
from headstart.parallel import Given, Made, cores, in_threads
from headstart.runs import Classifier, read_about, read_json
from headstart.tokens import Tokenizer

FOLDER, RECORD = "onnx", "export.json"  # in a run folder, and in that: which file is used, and what the gate found


@dataclass(frozen=True)
class OnnxClassifier(Classifier):
    """A classifier that onnxruntime computes."""

    session: Any

    @property
    def workers(self) -> int:
        """As many as there are cores: each batch is computed on one."""
        return cores()

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch, labels) logits of padded token ids."""
        found: NDArray[np.float32] = self.session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        return found

    def side_by_side(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """As `parallel.in_threads`."""
        return in_threads(function, items, self.workers)


def is_exported(run: str | Path) -> bool:
    """Whether a run folder has a model that was exported and accepted."""
    return (Path(run) / FOLDER / RECORD).is_file()


def load_exported(run: str | Path) -> OnnxClassifier:
    """The exported classifier of a run folder; a `RunError` if it is damaged, an `InputError` without onnxruntime."""
    place = Path(run) / FOLDER
    return load_onnx(run, place / str(read_json(place, RECORD)["file"]))


def load_runtime() -> Any:
    """The onnxruntime package, kept from reporting to its makers, as it does since 1.29; an `InputError` without it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("An exported run needs onnxruntime. Install it with: pip install 'headstart[onnx]'") from error
    return onnxruntime


def load_onnx(run: str | Path, model: Path) -> OnnxClassifier:
    """An ONNX model, of token ids and a mask to logits, as a run folder's classifier."""
    onnxruntime = load_runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # batches are computed side by side instead
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds
        raise RunError(f"{model}: cannot be loaded ({' '.join(str(error).split())[:200]}). Export it again.") from error
    place = model.parent if (model.parent / "tokenizer.json").is_file() else Path(run)  # export adds one if none was
    about = read_about(run, lambda _, pad_id: Tokenizer.from_folder(place, pad_id))
    return OnnxClassifier(**about, session=session)
