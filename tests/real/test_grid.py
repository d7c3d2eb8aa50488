"""The estimator on the embedded MiniLM and SST-2: a search over heads makes one pass of the encoder."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from headstart import Encoder, TextClassifier, features
from headstart import recent as room

pytestmark = pytest.mark.real
HEADS = {"head_width": [0, 64, 128, 256], "lr": [3e-4, 1e-3]}


@pytest.fixture
def sst2(shared_data: Path) -> tuple[list[str], list[int]]:
    table = pl.read_csv(shared_data / "sst2" / "train.csv").head(1200)
    return table["sentence"].to_list(), table["label"].to_list()


def test_a_grid_search_over_heads_encodes_each_text_once(
    sst2: tuple[list[str], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, labels = sst2
    encoded = list[int]()

    def counted(*given: Any) -> features.Features:
        found = features.frozen_features(*given)
        encoded.append(found.encoded)
        return found

    monkeypatch.setattr(room, "frozen_features", counted)
    room._KEPT.clear()
    clf = TextClassifier(thaw=0, head_features=("mean-4", "mean-5", "mean-6"), weight_decay=0.01, epochs=10)
    search = GridSearchCV(clf, HEADS, cv=3).fit(texts, labels)
    assert sum(encoded) == len(set(texts))
    assert [some for some in encoded if not some] == [], "what was encoded before did not come from the disk, either"
    assert search.best_score_ > 0.75
    assert search.best_estimator_.features_["reused"] == len(set(texts))

    encoded.clear()
    vectors = make_pipeline(Encoder(), LogisticRegression(max_iter=1000)).fit(texts, labels)
    assert vectors.score(texts, labels) > 0.8
    assert sum(encoded) == 0
