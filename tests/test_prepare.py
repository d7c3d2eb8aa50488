"""What precedes training: names, splits, lengths, and that each part's features are those of its texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart import config
from headstart.data import text_key
from headstart.errors import DataError
from headstart.features import frozen_features
from headstart.prepare import data_fingerprint, default_name, lengths, prepare, read
from headstart.run import Run
from tests.conftest import NOUNS, QUICK, SMALL_ROWS, write_csv


def test_each_part_has_the_token_ids_and_features_of_its_texts(tiny_bert: Path, small_table: Path) -> None:
    ready = prepare(config.settings(str(small_table), model=str(tiny_bert), max_length=5, **QUICK))
    assert (ready.max_length, set(ready.seconds)) == (5, {"read", "tokenize", "encode"})
    tokenizer = ready.encoder.tokenizer
    for part, index, features in zip(ready.splits[:3], ready.index, ready.featured, strict=True):
        tokens = tokenizer.truncate(tokenizer(part.texts), 5)
        assert ready.tokens.take(index).ids.tolist() == tokens.ids.tolist()
        expected = frozen_features(ready.encoder, tokens).columns(["cls"])
        np.testing.assert_array_equal(features.columns(["cls"]), expected)


def test_the_fingerprint_is_of_texts_and_labels_in_order(small_table: Path, tmp_path: Path) -> None:
    def prints(rows: list[tuple[str, str]]) -> dict[str, str]:
        return data_fingerprint(read(config.settings(str(write_csv(tmp_path / "t.csv", rows))))[0])

    rows = list(SMALL_ROWS)
    same = prints(rows)
    assert same == prints(rows)
    assert set(same) == {"train", "validation", "test"}
    changed = prints([(f"{rows[0][0]} .", rows[0][1]), *rows[1:]])
    assert sum(same[name] != changed[name] for name in same) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("reviews.csv", "reviews"),
        ("some/where/reviews.tsv.gz", "reviews"),
        ("a.b.parquet", "a.b"),
        ("hf://datasets/someone/set/train.jsonl", "train"),
        ("sample", "sample"),
        (".csv", "run"),
        ("Reviews.CSV.GZ", "Reviews"),
        ("a.json.csv", "a.json"),
        ("a.csv.csv", "a.csv"),
        ("csv", "csv"),
    ],
)
def test_a_run_is_named_after_its_data(source: str, name: str) -> None:
    assert default_name(source) == name


def test_by_default_copies_of_a_text_are_on_one_side(tmp_path: Path) -> None:
    rows = [*SMALL_ROWS, *((f"The  {text[4:].upper()}", label) for text, label in SMALL_ROWS[::2])]
    table = str(write_csv(tmp_path / "t.csv", rows))

    def sides(**given: Any) -> tuple[list[set[str]], tuple[str, ...]]:
        splits, _ = read(config.settings(table, **given))
        parts = (splits.train, splits.validation, splits.test)
        assert sum(map(len, parts)) == len(rows)
        return [{text_key(text) for text in part.texts} for part in parts], splits.notices

    (one, two, three), notices = sides()
    assert not one & two
    assert not one & three
    assert not two & three
    assert any("40 rows repeat an earlier row's text" in notice for notice in notices)
    assert any("moved so that copies of a text share one part" in notice for notice in notices)
    (one, two, three), _ = sides(recipe="article")
    assert one & (two | three), "the article leaves them as they fall"


def test_a_name_given_twice_is_refused(train: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--label-names gives the same name twice"):
        train(label_names=("same", "same"))
    assert not (tmp_path / "run").exists()


def test_lengths_are_what_the_models_tokenizer_counts(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [f"the {noun} was {'not ' * i}superb, zebra!" for i, noun in enumerate(NOUNS)] + ["very " * 100]
    table = write_csv(tmp_path / "t.csv", [(text,) for text in [*texts, ""]], "review")
    for family in ("bert", "roberta"):
        advice = lengths(str(table), str(tiny_models(family)))
        counted = AutoTokenizer.from_pretrained(tiny_models(family))(texts)["input_ids"]
        assert advice.lengths.tolist() == [len(ids) for ids in counted]
        assert advice.candidates[-1].max_length == 64, "no more than the model takes"
        assert advice.advised == 64
        assert f"the longest has {len(counted[-1])} tokens" in advice.reason
    with pytest.raises(DataError, match="has no column 'nothing'"):
        lengths(str(table), str(tiny_models("bert")), "nothing")


def test_the_advice_is_read_off_the_training_texts_and_followed(train: Callable[..., Run], tmp_path: Path) -> None:
    table = write_csv(tmp_path / "long.csv", [("the film was great " * 12, "1")] * 5)
    done = train(test=str(table), validation=str(table))
    assert (done.info["max_length"], done.info["max_length_reason"]) == (16, "no text is cut, the longest has 6 tokens")
    asked = train(out="asked", max_length=5)
    assert asked.info["max_length"] == 5
    why = "as asked; 100.0% of the training texts are longer (advised: 16)"
    assert asked.info["max_length_reason"] == f"{why}; 16.67% of all tokens are cut off, see --long"
    assert asked.metrics["features"]["encoded"] > 0, "texts cut elsewhere are other texts to the encoder"
    assert json.loads((asked.folder / "tokenizer_config.json").read_text())["model_max_length"] == 5
