"""The model code that goes into a run folder: its arithmetic, and that it works with transformers alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headstart
from headstart import modeling_headstart, predict
from headstart.modeling_headstart import HeadstartConfig, HeadstartForSequenceClassification, pool

TEXTS = ["the film was superb", "the waiter was rude and the soup was awful at the end", "zebra!"]


@pytest.fixture
def states() -> list[torch.Tensor]:
    """Three layers' hidden states of two texts, of three tokens and of one, in a batch three wide."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, generator=generator) for _ in range(3)]


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_pool_is_the_mean_over_a_texts_own_tokens(states: list[torch.Tensor]) -> None:
    got = pool(states, MASK, ("mean-0", "cls", "mean-2")).numpy()
    arrays = [state.numpy() for state in states]
    for text, length in enumerate((3, 1)):
        expected = (arrays[0][text, :length].mean(axis=0), arrays[2][text, 0], arrays[2][text, :length].mean(axis=0))
        np.testing.assert_allclose(got[text], np.stack(expected), rtol=2**-11, atol=1e-6)
    assert got.dtype == np.float32


def test_pool_rounds_as_features_are_stored(states: list[torch.Tensor]) -> None:
    got = pool(states, MASK, ("cls", "mean-1"))
    assert torch.equal(got, got.half().float())


def test_pool_stays_within_half_precision() -> None:
    huge = [torch.full((1, 2, 4), 1e30), torch.full((1, 2, 4), -1e30)]
    got = pool(huge, torch.ones(1, 2, dtype=torch.int64), ("mean-0", "cls"))
    assert got[0, 0].tolist() == [65504.0] * 4
    assert got[0, 1].tolist() == [-65504.0] * 4


def test_the_whole_model_gives_a_loss_and_needs_no_mask() -> None:
    shape = {"model_type": "bert", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = HeadstartConfig(encoder=shape, head_features=("mean-1", "cls"), num_labels=3)
    model = HeadstartForSequenceClassification(config).eval()
    ids, labels = torch.tensor([[2, 7, 9, 3], [2, 8, 8, 3]]), torch.tensor([1, 2])
    output = model(input_ids=ids, labels=labels)
    assert torch.equal(output.logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    expected = torch.nn.functional.nll_loss(torch.log_softmax(output.logits, dim=1), labels)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.encoder.pooler is None
    with pytest.raises(ValueError, match="input_ids are needed"):
        model(attention_mask=torch.ones_like(ids))


def test_the_run_folder_holds_this_very_code(tiny_run: Path) -> None:
    source = Path(modeling_headstart.__file__).read_text(encoding="utf-8")
    assert (tiny_run / "modeling_headstart.py").read_text(encoding="utf-8") == source
    assert "import headstart" not in source
    assert "from headstart" not in source


# Runs where headstart cannot be imported: what anyone with transformers alone would do.
PIPELINES = """
import json, sys
sys.modules["headstart"] = None
from transformers import pipeline
pooled, native, texts = json.loads(sys.argv[1])
answers = {}
try:
    pipeline("text-classification", pooled, device="cpu")
except (ValueError, KeyError, OSError) as error:
    answers["refusal"] = str(error)
for name, folder, options in (("pooled", pooled, {"trust_remote_code": True}), ("native", native, {})):
    classify = pipeline("text-classification", folder, device="cpu", top_k=None, **options)
    answers[name] = [classify([text])[0] for text in texts] + classify(texts, batch_size=len(texts))
print()  # transformers leaves its question on the line
print(json.dumps(answers))
"""


def test_transformers_pipelines_agree_with_headstart(
    tiny_run: Path, tiny_bert: Path, small_table: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": str(tiny_bert), "device": "cpu", "epochs": 3, "max_length": 16, "thaw": "0"}
    headstart.train(str(small_table), out=str(tmp_path / "native"), head="native", **given)
    assert not (tmp_path / "native" / "modeling_headstart.py").exists()
    arguments = json.dumps([str(tiny_run), str(tmp_path / "native"), TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", PIPELINES, arguments],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in answers["refusal"], "without leave to run its code it must not load at all"
    for name, folder in (("pooled", tiny_run), ("native", tmp_path / "native")):
        predictor = predict.load(folder, precision="fp32")  # what transformers computes in
        expected = predictor.predict_proba(TEXTS)
        for answer, row in zip(answers[name], [*expected, *expected], strict=True):
            scores = {one["label"]: one["score"] for one in answer}
            assert list(scores) == sorted(scores, key=lambda label: -scores[label])
            np.testing.assert_allclose([scores[label] for label in predictor.names], row, atol=1e-4)


def test_headstart_never_runs_the_code_in_a_run_folder(tiny_run: Path, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(tiny_run, run)
    bomb = f"open({str(mark)!r}, 'w').close()\n"
    exec(bomb)  # the bomb works
    mark.unlink()
    (run / "modeling_headstart.py").write_text(bomb)
    (run / "__init__.py").write_text(bomb)
    assert headstart.load(run).predict(TEXTS) == headstart.load(tiny_run).predict(TEXTS)
    assert not mark.exists()
