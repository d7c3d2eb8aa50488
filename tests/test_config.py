"""Defaults, recipes, and the settings that are refused."""

import dataclasses
import datetime
import json
import tomllib
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import tomli_w
from hypothesis import HealthCheck, assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from headstart import config
from headstart.config import (
    HUGGING_FACE,
    LIMITS,
    PLACES,
    RECIPES,
    Recipe,
    TrainConfig,
    as_toml,
    from_file,
    kinds,
    settings,
)
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


UNKNOWN = [
    ("epoch", r"There is no setting 'epoch'\. Did you mean 'epochs'\?"),
    ("batch-size", "Did you mean 'batch_size'"),
    ("no_store", "Did you mean 'store'"),
    ("xyz", "There is no setting 'xyz'. The settings are: batch_size, calibration, "),
]


@pytest.mark.parametrize(("name", "said"), [*UNKNOWN, ("learning_rate", "Did you mean 'lr'")])
def test_an_unknown_setting_names_the_closest_one_or_all(name: str, said: str) -> None:
    given: Any
    for given in ({name: 3}, {name: None}):
        with pytest.raises(InputError, match=said):
            settings("x.csv", **given)


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


# --- what a value may be

WRONG: list[tuple[str, Any, str]] = [
    ("epochs", "3", "--epochs takes a whole number, not '3'."),
    ("epochs", 3.5, "--epochs takes a whole number, not 3.5."),
    ("epochs", True, "--epochs takes a whole number, not True."),
    ("epochs", [3], "--epochs takes a whole number, not [3]."),
    ("lr", "1e-3", "--lr takes a number, not '1e-3'."),
    ("lr", True, "--lr takes a number, not True."),
    ("seed", datetime.date(2021, 1, 2), "--seed takes a whole number, not 2021-01-02."),
    ("store", 1, "--store takes true or false, not 1."),
    ("store", "no", "--store takes true or false, not 'no'."),
    ("model", ["minilm"], "--model takes a string, not ['minilm']."),
    ("head", 1, "--head takes auto, native, pooled, not 1."),
    ("head", ["auto"], "--head takes auto, native, pooled, not ['auto']."),
    ("recipe", ["article"], "--recipe takes headstart, article, not ['article']."),
    ("label_names", 2, "--label-names takes a list of strings, not 2."),
    ("label_names", ["no", 2], "--label-names takes a string, not 2."),
    ("report_to", 1, "--report-to takes a list of tensorboard, mlflow, trackio, wandb, not 1."),
    ("report_to", "mlflow,comet", "--report-to takes tensorboard, mlflow, trackio, wandb, not 'comet'."),
    ("max_length", "long", "--max-length takes auto or a whole number, not 'long'."),
    ("max_length", True, "--max-length takes auto or a whole number, not True."),
    ("thaw", True, "--thaw takes a whole number or a string, not True."),
    ("thaw", "two", "--thaw takes a number of layers, all, auto or 0, not 'two'."),
    ("time_budget", [], "--time-budget takes a string or a number, not []."),
    ("time_budget", "soon", "--time-budget takes seconds, or a number with s, m or h, not 'soon'."),
    ("epochs", 0, "--epochs must be more than 0, and 0 was given."),
    ("folds", 1, "--folds must be at least 2, and 1 was given."),
    ("seed", 2**32, "--seed must be at most 4294967295, and 4294967296 was given."),
    ("head_dropout", 1.5, "--head-dropout must be at most 1, and 1.5 was given."),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG)
def test_a_wrong_value_gets_one_sentence_wherever_it_comes_from(
    name: str, value: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        settings("x.csv", **{name: value})
    assert str(refused.value) == said
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({name: value}))
    with pytest.raises(InputError) as refused:
        from_file(str(file))
    assert str(refused.value) == f"--config {file}: {said}"


def test_a_settings_object_cannot_hold_a_wrong_value() -> None:
    wrong: dict[str, Any] = {"epochs": "3", "report_to": ["mlflow"], "seed": None, "max_length": "auto"}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} takes "):
            TrainConfig(data="x.csv", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("epochs", np.int64(3), 3),
        ("lr", np.float32(0.5), 0.5),
        ("lr", 1, 1),
        ("store", np.bool_(False), False),
        ("model", Path("a") / "b", str(Path("a") / "b")),
        ("label_names", "no,yes", ("no", "yes")),
        ("label_names", ["no", "yes"], ("no", "yes")),
        ("report_to", "tensorboard,mlflow", ("tensorboard", "mlflow")),
        ("report_to", "none", ()),
        ("time_budget", "10m", 600.0),
        ("max_length", "auto", None),
        ("thaw", 2, "2"),
    ],
)
def test_a_value_may_come_in_other_forms(name: str, value: Any, taken: Any) -> None:
    found = getattr(settings("x.csv", **{name: value}), name)
    assert found == taken
    assert type(found) is type(taken)


def test_data_may_be_a_path() -> None:
    assert settings(Path("x.csv")) == settings("x.csv")  # type: ignore[arg-type]  # what people give


# --- files


def written(folder: Path, content: str) -> str:
    (folder / "run.toml").write_text(content, encoding="utf-8")
    return str(folder / "run.toml")


@pytest.mark.parametrize(("name", "said"), UNKNOWN)
def test_an_unknown_key_of_a_file_is_refused_with_the_closest_one(name: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"{name} = 3")
    with pytest.raises(InputError, match=said) as refused:
        from_file(file)
    assert str(refused.value).startswith(f"--config {file}: ")


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, 'epoch = 3\nlr = "fast"\nseed = 1\n[train]\nhead = "native"\n')
    with pytest.raises(InputError) as refused:
        from_file(file)
    first, second, third = str(refused.value).splitlines()
    assert first == f"--config {file}: There is no setting 'epoch'. Did you mean 'epochs'?"
    assert second == f"--config {file}: --lr takes a number, not 'fast'."
    assert third.startswith(f"--config {file}: There is no setting 'train'.")


def test_hugging_faces_names_are_known_in_a_file(tmp_path: Path) -> None:
    assert from_file(written(tmp_path, "learning_rate = 0.5\nnum_train_epochs = 2")) == {"lr": 0.5, "epochs": 2}
    with pytest.raises(InputError, match="learning_rate is lr by another name: give one of them"):
        from_file(written(tmp_path, "lr = 0.5\nlearning_rate = 0.5"))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    assert from_file(written(tmp_path, "\ufeffseed = 3")) == {"seed": 3}


def test_who_is_told_is_not_repeated_with_a_run_but_is_from_a_file(tmp_path: Path) -> None:
    made_by = dataclasses.asdict(settings("x.csv", report_to="mlflow", thaw="0"))
    (tmp_path / "r.json").write_text(json.dumps({"settings": made_by, "thaw": {"kept": "0"}}))
    assert "report_to" not in from_file(str(tmp_path / "r.json"))
    assert from_file(written(tmp_path, 'report_to = "mlflow"')) == {"report_to": "mlflow"}


@pytest.mark.parametrize(
    ("asked", "taken", "repeated"), [(40, None, 40), (None, 150, 150), (150, 90, 90), (None, None, None)]
)
def test_a_run_is_repeated_with_the_steps_that_it_took(
    asked: int | None, taken: int | None, repeated: int | None, tmp_path: Path
) -> None:
    made_by = dataclasses.asdict(settings("x.csv", max_steps=asked, thaw="all"))
    (tmp_path / "r.json").write_text(json.dumps({"settings": made_by, "thaw": {"kept": "all", "steps": taken}}))
    assert from_file(str(tmp_path / "r.json"))["max_steps"] == repeated


def values(name: str) -> st.SearchStrategy[Any]:
    """What a setting may be."""

    def of(kind: Any) -> st.SearchStrategy[Any]:
        if get_origin(kind) is Literal:
            return st.sampled_from(get_args(kind))
        if get_origin(kind) is tuple:
            return st.lists(of(get_args(kind)[0]), max_size=3).map(tuple)
        limits = LIMITS.get(name, {})
        least, most = limits.get("minimum", limits.get("exclusiveMinimum")), limits.get("maximum")
        if kind is int:
            return st.integers(least if "minimum" in limits else 1, most if most is not None else 10**9)
        if kind is float:
            return st.floats(least, most, allow_nan=False, exclude_min="exclusiveMinimum" in limits)
        return {str: st.text(), bool: st.booleans(), NoneType: st.none()}[kind]

    return st.sampled_from(["0", "2", "all", "auto"]) if name == "thaw" else st.one_of(*map(of, kinds(name)))


NAMES = [name for name in config.FIELDS if name not in PLACES]
of_one_folder = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
)


@of_one_folder
@given(st.fixed_dictionaries({}, optional={name: values(name) for name in NAMES}))
@example({"recipe": "article", "max_length": "auto"})
@example({"model": 'a "b" \\ \x7f\x00\n\u2028\U0001f600', "time_budget": float("inf")})
def test_saved_settings_read_back_as_the_same(tmp_path: Path, chosen: dict[str, Any]) -> None:
    try:
        saved = settings("x.csv", **chosen)
    except InputError:
        assume(False)
    file = written(tmp_path, as_toml(saved, tmp_path / "run.toml"))
    assert settings("x.csv", **from_file(file)) == saved


def test_a_saved_file_explains_itself_and_names_its_schema(tmp_path: Path) -> None:
    saved = settings("my reviews.csv", seed=7, out="r", overwrite=True)
    text = as_toml(saved, tmp_path / "run.toml")
    first, second, *lines = text.splitlines()
    schema = (tmp_path / first.removeprefix("#:schema ")).resolve()
    assert schema == Path(config.__file__).with_name("train.schema.json")
    assert second == "# headstart train 'my reviews.csv' --config run.toml"
    assert lines[lines.index("seed = 7") - 1] == "# Decides the split, the first weights and the order of batches."
    assert lines[lines.index("# lr =") - 1] == "# AdamW's learning rate; left out: picked on validation data."
    found = tomllib.loads(text)
    assert not set(PLACES) & set(found)
    Draft7Validator(json.loads(schema.read_text())).validate(found)


# --- the schema

SCHEMA = Draft7Validator(json.loads(Path(config.__file__).with_name("train.schema.json").read_text(encoding="utf-8")))
anything = st.one_of(
    *(st.booleans(), st.integers(-2, 5), st.sampled_from([-0.5, 0.5, 1.5])),
    st.sampled_from(["", "auto", "none", "0", "3", "all", "mlflow", "mlflow,wandb", "10m", "90", "soon", "native"]),
    *(st.lists(st.sampled_from(["mlflow", "x", 3]), max_size=2), st.just({"a": 1})),
)


def test_the_schema_is_one_and_has_every_setting_explained() -> None:
    Draft7Validator.check_schema(SCHEMA.schema)
    properties = SCHEMA.schema["properties"]
    assert set(properties) == {*config.FIELDS, *HUGGING_FACE.values()}
    assert all(properties[name]["description"] for name in config.FIELDS)


@hypothesis_settings(parent=of_one_folder, max_examples=400)
@given(
    st.dictionaries(st.sampled_from([*config.FIELDS, *HUGGING_FACE.values(), "epoch"]), anything, max_size=3),
    st.sampled_from(NAMES).flatmap(lambda name: st.fixed_dictionaries({name: values(name)})),
)
@example({}, {"time_budget": "10m"})
@example({"time_budget": "10x"}, {})
@example({"seed": 2**32}, {})
def test_the_schema_takes_what_is_taken_and_refuses_what_is_refused(
    tmp_path: Path, some: dict[str, Any], right: dict[str, Any]
) -> None:
    found = {name: value for name, value in {**right, **some}.items() if value is not None}
    assume(not any({name, other} <= set(found) for name, other in HUGGING_FACE.items()))  # refused, for another reason
    file = written(tmp_path, tomli_w.dumps(found))
    try:
        from_file(file)
        taken = True
    except InputError:
        taken = False
    assert SCHEMA.is_valid(tomllib.loads(Path(file).read_text(encoding="utf-8"))) == taken
