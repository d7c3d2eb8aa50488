"""Loading what an export left: which file is used, and what is said when something is amiss."""

import json
import sys
from pathlib import Path

import pytest

from headstart import onnx
from headstart.errors import InputError, RunError


def test_a_run_is_exported_when_the_gate_has_left_its_record(tiny_run: Path, tmp_path: Path) -> None:
    assert not onnx.is_exported(tiny_run)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"of another tool")
    assert not onnx.is_exported(tmp_path)
    (tmp_path / "onnx" / "export.json").write_text(json.dumps({"file": "model.onnx"}))
    assert onnx.is_exported(tmp_path)


def test_what_is_no_model_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(RunError, match=r"model\.onnx: cannot be loaded"):
        onnx.load_onnx(tiny_run, tmp_path / "model.onnx")


def test_without_onnxruntime_it_says_what_to_install(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'headstart\[onnx\]'"):
        onnx.load_onnx(tiny_run, tiny_run / "onnx" / "model.onnx")
