"""Loading what an export left: which file is used, and what is said when something is amiss."""

import json
import os
import subprocess
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


TELEMETRY = """
import os, sys
from headstart import predict
predict.load(sys.argv[1])
print(os.environ["ORT_DISABLE_TELEMETRY"], "onnxruntime" in sys.modules)
"""


def test_onnxruntime_reports_to_nobody(exported_run: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    command = [sys.executable, "-c", TELEMETRY, str(exported_run)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=bare).stdout.split() == ["1", "True"]
