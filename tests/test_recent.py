"""What stays in memory: one encoder however often it is asked for, as long as its files are as they were; bounded."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headstart import recent as room
from headstart.estimator import TextClassifier
from tests.test_estimator import HEAD, LABELS, TEXTS


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Each test begins as a process does."""
    room._KEPT.clear()


@pytest.fixture
def make(tiny_bert: Path) -> Callable[..., Any]:
    """A classifier with a quick head on a tiny encoder, and other parameters as given."""
    return lambda **given: TextClassifier(**{"model": str(tiny_bert), **HEAD, **given})


def test_an_encoder_stays_loaded_until_its_files_change(
    make: Callable[..., Any], tiny_bert: Path, tmp_path: Path
) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(tiny_bert, tmp_path / name)

    def fit(name: str) -> Any:
        return make(model=str(tmp_path / name), epochs=1).fit(TEXTS, LABELS)._scorer.kept

    first = fit("one")
    assert fit("one") is first
    os.utime(tmp_path / "one" / "model.safetensors", (1, 1))
    assert fit("one") is not first
    fit("two")
    fit("three")
    assert len(room._KEPT) == room.MOST_ENCODERS


def test_what_is_kept_in_memory_is_bounded(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RECENT_BYTES", 100 * 4 * 32 * 2)
    monkeypatch.setattr(room, "RECENT_TEXTS", 100)
    clf = make(epochs=1).fit(TEXTS, LABELS)
    kept = clf._scorer.kept
    before = clf.predict_proba(TEXTS)
    assert len(kept.recent[0]) == len(kept.encoder.tokenizer.recent) == 80
    clf.predict([f"{text} {text}" for text in TEXTS])
    assert len(kept.recent[0]) == 80
    assert len(kept.encoder.tokenizer.recent) == 0
    clf.predict([f"{number} {text}" for number in (1, 2) for text in TEXTS])
    assert len(kept.recent[0]) == 80
    assert (clf.predict_proba(TEXTS) == before).all()
