"""An exported model answers as its run does, behind a gate that can refuse it, and is scored without torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import headstart
from headstart import export as export_module
from headstart import predict
from headstart.errors import DataError, ExportError, RunError
from headstart.export import export
from tests.conftest import FAMILIES, LIGHT, NOUNS, SMALL_ROWS, WORDS, write_csv
from tests.test_runs import vocabulary_only

TEXTS = ["the film was superb", "zebra", "", "the waiter was rude at the end of this story " * 3, "un hotel lovely"]
"""One is longer than max_length, and lengths differ, so that padding is seen."""


QUICK_FAMILIES = ("bert", "roberta", "modernbert")  # the others take as long and differ less


def both(run: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities of TEXTS by torch in fp32 and by the export."""
    torch_said, onnx_said = (predict.load(run, precision=precision) for precision in ("fp32", "auto"))
    assert type(torch_said.classifier).__name__ == "TorchClassifier"
    assert type(onnx_said.classifier).__name__ == "OnnxClassifier"
    return torch_said.predict_proba(TEXTS), onnx_said.predict_proba(TEXTS)


def test_the_export_says_what_torch_says(exported_run: Path) -> None:
    expected, got = both(exported_run)
    np.testing.assert_allclose(got, expected, atol=1e-3)  # features are rounded to half precision on the way
    assert np.ptp(expected[:, 0]) > 0.1, "texts should get answers of their own"


def test_what_the_gate_found_is_kept(exported_run: Path) -> None:
    record = json.loads((exported_run / "onnx" / "export.json").read_text())
    rows = len((exported_run / "predictions.csv").read_text().splitlines()) - 1
    assert record["n"] == rows > 5
    assert (record["agreement"], record["refused"], record["precision"]) == (1.0, None, "fp32")
    assert record["accuracy_after"] == record["accuracy_before"]
    assert record["accuracy_before"] == json.loads((exported_run / "metrics.json").read_text())["test"]["accuracy"]
    assert record["speedup"] > 0
    assert record["bytes"] == (exported_run / "onnx" / record["file"]).stat().st_size


def test_the_model_names_its_inputs_and_labels_and_leaves_batch_and_length_open(exported_run: Path) -> None:
    model = onnx.load(exported_run / "onnx" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    shapes = {one.name: [size.dim_param for size in one.type.tensor_type.shape.dim] for one in model.graph.input}
    assert shapes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert [one.name for one in model.graph.output] == ["logits"]
    assert {one.domain: one.version for one in model.opset_import}[""] >= 20
    assert json.loads({one.key: one.value for one in model.metadata_props}["id2label"]) == {"0": "0", "1": "1"}


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *((family, "pooled") for family in QUICK_FAMILIES),
        *(
            pytest.param(family, "pooled", marks=pytest.mark.slow)
            for family in FAMILIES
            if family not in QUICK_FAMILIES
        ),
        *(("bert", "native"), ("roberta", "native")),
    ],
)
def test_every_family_is_exported(family: str, head: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    table = write_csv(tmp_path / "small.csv", SMALL_ROWS)
    settings: dict[str, Any] = {"model": str(tiny_models(family)), "epochs": 5, "head": head, "thaw": "0"}
    run = headstart.train(str(table), out=str(tmp_path / "run"), **settings).folder
    export(run, "fp32", "refuses")
    expected, got = both(run)
    np.testing.assert_allclose(got, expected, atol=2e-3)


# --- the gate


def knife_edge(run: Path, path: Path) -> Path:
    """Texts of which the run is least sure, labelled as it labels them: whatever says otherwise is wrong."""
    predictor = predict.load(run, precision="fp32")
    texts = [f"the {noun} {verb} {word}" for noun in NOUNS for verb in ("is", "was", "a") for word in WORDS]
    unsure = np.argsort(predictor.predict_proba(texts).max(axis=1))[:60]
    some = [texts[i] for i in unsure]
    return write_csv(path, list(zip(some, predictor.predict(some), strict=True)))


def test_int8_that_loses_accuracy_is_refused_and_what_was_there_stays(exported_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported_run, run)
    table = str(knife_edge(run, tmp_path / "unsure.csv"))
    before = {path.name: path.read_bytes() for path in (run / "onnx").iterdir()}
    with pytest.raises(ExportError, match=r"accuracy falls from 1\.000 to 0\.\d+ on 60 texts.*--force"):
        export(run, "int8", "refuses", table)
    assert {path.name: path.read_bytes() for path in (run / "onnx").iterdir()} == before
    found = export(run, "int8", "warns", table)
    assert found.refused is not None
    assert found.accuracy_before == 1.0 > found.accuracy_after
    assert [path.name for path in sorted((run / "onnx").iterdir())] == ["export.json", "model_quantized.onnx"]
    assert found.bytes < len(before["model.onnx"])
    assert predict.load(run).predict(["the film was superb"]) == predict.load(exported_run).predict(
        ["the film was superb"]
    )


def test_an_fp32_export_with_another_label_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    write, other = export_module.write_onnx, tmp_path / "other"
    shutil.copytree(tiny_run, other)
    weights = load_file(other / "model.safetensors")
    weights["head.layers.0.bias" if "head.layers.3.bias" not in weights else "head.layers.3.bias"] += torch.tensor(
        [9.0, 0]
    )
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(export_module, "write_onnx", lambda run, *rest: write(other, *rest))  # the exporter errs
    with pytest.raises(ExportError, match=r"\d of \d+ texts get another label"):
        export(run, "fp32", "refuses")
    assert not (run / "onnx").exists()


def test_without_labelled_texts_there_is_no_gate(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "predictions.csv").unlink()
    with pytest.raises(RunError, match="Give --test FILE"):
        export(run, "fp32", "refuses")
    with pytest.raises(DataError, match="not one of those trained on"):
        export(run, "fp32", "refuses", str(write_csv(tmp_path / "strange.csv", [("a", "x")])))
    assert not (run / "onnx").exists()
    with pytest.raises(RunError, match="no such run folder"):
        export(tmp_path / "nowhere", "fp32", "refuses")


# --- scoring it


@pytest.mark.parametrize("many", [False, True])
def test_an_exported_run_is_scored_without_torch_or_transformers(
    exported_run: Path, tmp_path: Path, many: bool
) -> None:
    table, out = write_csv(tmp_path / "in.csv", [(text, "0") for text in TEXTS]), tmp_path / "out.csv"
    arguments = ["--input", str(table), "--output", str(out)] if many else TEXTS[:2]
    command = [sys.executable, "-c", LIGHT, "predict", str(exported_run), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"
    said = out.read_text() if many else done.stdout
    expected = predict.load(exported_run, precision="fp32").predict(TEXTS[:2])
    for text, label in zip(TEXTS, expected, strict=False):
        assert any(text in line and (f",{label}," in line or line.startswith(label)) for line in said.splitlines())


def test_a_run_that_is_not_exported_needs_torch(tiny_run: Path) -> None:
    command = [sys.executable, "-c", LIGHT, "predict", str(tiny_run), "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "loaded: torch" in done.stderr, "or else the test above sees nothing"


def test_where_torch_is_not_installed_it_says_so(tiny_run: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from headstart.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "predict", str(tiny_run), "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "headstart: this needs torch, which is not installed here. pip install headstart brings it.\n"


def test_a_damaged_export_is_said_to_be(exported_run: Path, tmp_path: Path) -> None:
    shutil.copytree(exported_run, tmp_path / "run")
    model = tmp_path / "run" / "onnx" / "model.onnx"
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"cannot be loaded.*Export it again"):
        predict.load(tmp_path / "run")
    assert predict.load(tmp_path / "run", precision="fp32").predict(["a"]), "torch's own files are whole"


# --- a classifier that transformers has made elsewhere


def own_answers(run: Path, path: Path) -> str:
    """A table that the classifier is right on, with labels by number."""
    predictor = predict.load(run, precision="fp32")
    numbers = [str(predictor.names.index(name)) for name in predictor.predict(TEXTS)]
    return str(write_csv(path, [row for row in zip(TEXTS, numbers, strict=True) if row[0]]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("bert", "roberta")])
def test_a_classifier_made_elsewhere_is_exported(family: str, elsewhere: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(elsewhere(family), run)
    found = export(run, "fp32", "refuses", own_answers(run, tmp_path / "t.csv"))
    assert (found.agreement, found.accuracy_before, found.n) == (1.0, 1.0, len(TEXTS) - 1)
    expected, got = both(run)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_an_export_of_what_has_but_a_vocabulary_brings_its_tokenizer(
    elsewhere: Callable[..., Path], tmp_path: Path
) -> None:
    run = vocabulary_only(elsewhere("bert"), tmp_path / "run")
    with pytest.raises(RunError, match="Give --test FILE"):
        export(run, "fp32", "refuses")
    export(run, "fp32", "refuses", own_answers(run, tmp_path / "t.csv"))
    command = [sys.executable, "-c", LIGHT, "predict", str(run), TEXTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "loaded:"), done.stderr
    assert done.stdout.split("\t")[0] == predict.load(run, precision="fp32").predict(TEXTS[:1])[0]
