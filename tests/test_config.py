"""Defaults, recipes, and the settings that are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from headstart.config import RECIPES, Recipe, TrainConfig, from_file, settings
from headstart.errors import InputError


def test_the_contracts_defaults() -> None:
    config = settings("reviews.csv")
    assert config.data == "reviews.csv"
    assert (config.recipe, config.model, config.seed, config.thaw) == ("headstart", "minilm", 2021, "auto")
    assert config.class_weight == "auto"
    assert (config.max_length, config.epochs) == (None, None), "read off the lengths; of a head and of fine-tuning"
    assert settings("reviews.csv", recipe="article").thaw == "0"


def test_the_article_recipe_is_the_articles() -> None:
    config = settings("reviews.csv", recipe="article")
    assert config.model == "bert-base-uncased"
    assert config.max_length == 17
    assert (config.head_features, config.head_width, config.head_dropout) == (("pooler",), 512, 0.2)
    assert (config.epochs, config.patience) == (10, None)
    assert (config.batch_size, config.lr, config.clip_norm) == (32, 1e-5, 1.0)
    assert config.class_weight == "balanced"


def test_what_is_given_comes_before_the_recipe() -> None:
    config = settings("x.csv", recipe="article", model="minilm", epochs=3, max_length=40)
    assert (config.model, config.epochs, config.max_length) == ("minilm", 3, 40)
    assert config.lr == 1e-5, "what is not given stays the recipe's"


def test_none_counts_as_not_given() -> None:
    assert settings("x.csv", recipe="article", epochs=None) == settings("x.csv", recipe="article")


def test_auto_length_beats_the_recipes() -> None:
    assert settings("x.csv", recipe="article", max_length="auto").max_length is None


def test_every_recipe_makes_a_valid_config_of_known_fields() -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(RECIPES) == set(get_args(Recipe))
    for recipe, changes in RECIPES.items():
        assert set(changes) <= known
        assert settings("x.csv", recipe=recipe).recipe == recipe


def test_a_config_is_frozen_and_goes_through_json() -> None:
    config = settings("x.csv", label_names=("no", "yes"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]  # frozen
    back = json.loads(json.dumps(dataclasses.asdict(config)))
    assert set(back) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert back["label_names"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"epochs": -1}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"clip_norm": -1.0}, "--clip-norm"),
        ({"patience": 0}, "--patience"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"max_length": 3}, "--max-length"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"head": "round"}, "--head"),
        ({"device": "tpu"}, "--device"),
        ({"precision": "int4"}, "--precision"),
        ({"class_weight": "heavy"}, "--class-weight"),
        *(
            ({"thaw": thaw}, "--thaw takes a number of layers, all, auto or 0")
            for thaw in ("-1", "x", "", "1.5", "00", "²")
        ),
        ({"thaw": "2", "folds": 3}, "--thaw 2 does not go with --folds"),
        ({"thaw": "auto", "folds": 3}, "--thaw auto does not go with --folds"),
        ({"thaw": "all", "head": "pooled"}, "--thaw all does not go with --head pooled"),
        ({"time_budget": 0}, "--time-budget"),
        ({"checkpoint_minutes": 0}, "--checkpoint-minutes"),
        ({"overwrite": True, "resume": True}, "--overwrite starts anew and --resume goes on"),
        ({"recipe": "cake"}, "--recipe"),
        ({"recipe": "article", "head": "native"}, "--recipe article"),
    ],
)
def test_values_out_of_range_are_refused_by_their_option(given: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        settings("x.csv", **given)


@pytest.mark.parametrize(
    "given",
    [
        *({"epochs": 1}, {"max_length": 4}, {"seed": 0}, {"seed": 2**32 - 1}, {"lr": 1e-9}),
        *({"thaw": thaw} for thaw in ("0", "1", "2", "24", "all", "auto")),
    ],
)
def test_values_at_the_edge_are_taken(given: dict[str, Any]) -> None:
    config = settings("x.csv", **given)
    assert {name: getattr(config, name) for name in given} == given


def test_an_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'epoch'.*epochs"):
        settings("x.csv", epoch=3)


@pytest.mark.parametrize("given", [{"folds": 3}, {"head": "pooled"}])
def test_what_only_a_frozen_encoder_has_turns_fine_tuning_off(given: dict[str, Any]) -> None:
    assert settings("x.csv", **given).thaw == "0"
    assert settings("x.csv", **given, thaw="0").thaw == "0"


def test_a_number_of_layers_may_be_a_number() -> None:
    assert settings("x.csv", thaw=2) == settings("x.csv", thaw="2")


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('thaw = "2"\nlr = 1e-3\nlabel_names = ["no", "yes"]\nout = "elsewhere"\n')
    assert from_file(str(tmp_path / "a.toml")) == {
        **{"thaw": "2", "lr": 1e-3, "label_names": ("no", "yes"), "out": "elsewhere"}
    }
    made_by = dataclasses.asdict(settings("x.csv", seed=5, label_names=("no", "yes"), out="r"))
    (tmp_path / "r.json").write_text(json.dumps({"settings": made_by, "thaw": {"depth": "2", "kept": "0"}}))
    found = from_file(str(tmp_path / "r.json"))
    assert (found["seed"], found["label_names"], found["thaw"]) == (5, ("no", "yes"), "0"), "at the depth that was kept"
    assert not {"data", "out", "overwrite", "resume", "dry_run"} & set(found)
    assert settings("y.csv", **found).seed == 5


@pytest.mark.parametrize(
    ("name", "content"), [("a.toml", "thaw ="), ("a.json", "{"), ("a.json", "{}"), ("a.json", "[]")]
)
def test_a_file_without_settings_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    for path in (tmp_path / name, tmp_path / f"no-{name}"):
        with pytest.raises(InputError, match="cannot be read as settings"):
            from_file(str(path))
