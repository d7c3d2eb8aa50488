"""What a run folder says beside its weights, and what is said of a folder that is none."""

import json
import shutil
from pathlib import Path

import pytest

from headstart.errors import RunError
from headstart.runs import read_about, read_json


def test_a_run_says_its_labels_in_order_its_tokenizer_and_max_length(tiny_run: Path) -> None:
    found = read_about(tiny_run)
    assert found["names"] == ("0", "1")
    assert found["max_length"] == 16
    assert found["info"]["columns"] == ["sentence", "label"]
    assert found["tokenizer"](["the film was superb"]).lengths.tolist() == [6]


def test_ten_labels_and_more_are_in_the_order_of_their_numbers(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text()) | {"id2label": {str(i): f"l{i}" for i in range(12)}}
    path.write_text(json.dumps(content))
    assert read_about(tmp_path / "run")["names"] == tuple(f"l{i}" for i in range(12))


def test_a_model_without_a_head_is_no_classifier(tiny_bert: Path) -> None:
    with pytest.raises(RunError, match="without a classification head"):
        read_about(tiny_bert)


def test_files_that_are_missing_or_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        read_json(tmp_path / "none", "config.json")
    with pytest.raises(RunError, match=r"has no config\.json"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunError, match="is not a JSON object"):
        read_json(tmp_path, "config.json")
