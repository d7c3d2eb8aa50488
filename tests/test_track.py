"""Trackers are told of a run while it goes on; what they were told is read back as their own programs read it."""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart import config, run
from headstart.errors import InputError, TerminatedError
from headstart.run import Run
from headstart.track import Log
from headstart.train import Epoch

Train = Callable[..., Run]
Steps = list[tuple[int, Any]]  # and the value at each

EPOCHS = tuple(field.name for field in dataclasses.fields(Epoch))

of_mlflow = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(autouse=True)
def _no_settings_of_the_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("MLFLOW_", "TRACKIO_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def scalars(folder: Path) -> dict[str, Steps]:
    """What tensorboard shows of the one log in `folder`: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = folder.iterdir()
    found = EventAccumulator(str(log))
    found.Reload()
    return {name: sorted((one.step, one.value) for one in found.Scalars(name)) for name in found.Tags()["scalars"]}


def mlflow_runs(database: Path) -> Iterator[tuple[Any, Callable[[str], Steps]]]:
    """Each run in a database of mlflow, and how a number of it went."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    (experiment,) = client.search_experiments(filter_string="name = 'headstart'")
    for one in client.search_runs([experiment.experiment_id]):

        def history(name: str, number: str = one.info.run_id) -> Steps:
            return [(at.step, at.value) for at in client.get_metric_history(number, name)]

        yield one, history


def test_tensorboard_has_every_epoch_of_each_stage_and_the_result(train: Train, tmp_path: Path) -> None:
    done = train(report_to="tensorboard", thaw="1", epochs=3)
    found = scalars(tmp_path / "logs" / "run")
    head, tuned = done.metrics["stages"]
    for stage in (head, tuned):
        for name in EPOCHS:
            assert [step for step, _ in found[f"{stage['name']}/{name}"]] == list(range(1, stage["epochs"] + 1))
    for name in EPOCHS:
        values = [value for _, value in found[f"thaw-1/{name}"]]
        assert values == pytest.approx([epoch[name] for epoch in done.info["history"]], rel=1e-5)
    rates = [value for _, value in found["thaw-1/lr"]]
    assert rates == sorted(rates, reverse=True), "it falls after the warm-up"
    assert 0 < rates[-1] < rates[0] < done.info["head"]["lr"]
    for name in ("accuracy", "macro_f1", "log_loss", "ece"):
        assert found[f"test/{name}"] == [(0, pytest.approx(done.metrics["test"][name]))]
    assert found["timing/total"] == [(0, pytest.approx(done.metrics["timing"]["total"]))]
    (hyperparameters,) = (tmp_path / "logs").rglob("hparams.yml")
    said = hyperparameters.read_text().splitlines()
    assert {"seed: 2021", "thaw: '1'", f"data: {tmp_path / 'run.csv'}", "report_to: tensorboard"} <= set(said)
    assert not any(line.startswith(("resume", "overwrite", "label_names")) for line in said)
    assert not [path for path in done.folder.rglob("*") if "tfevents" in path.name], "the log is beside the run"


def test_of_many_heads_only_the_one_chosen_is_told(train: Train, tmp_path: Path) -> None:
    done = train(report_to="tensorboard", head_features=None, head_width=None)
    assert done.info["head"]["tried"] > 1
    found = scalars(tmp_path / "logs" / "run")["head/validation_loss"]
    assert [value for _, value in found] == pytest.approx([epoch["validation_loss"] for epoch in done.info["history"]])


def test_an_epoch_can_be_looked_at_as_soon_as_it_has_ended(tmp_path: Path) -> None:
    said: list[str] = []
    with Log(config.settings("x.csv", report_to="tensorboard"), tmp_path / "run", said.append) as log:
        log.start()
        assert said == [f"Logs      tensorboard --logdir {tmp_path / 'logs'}"]
        assert log.epoch("head", 0, Epoch(0.5, 0.4, 0.8, 1.0, 1e-3)) is False
        assert scalars(tmp_path / "logs" / "run")["head/validation_accuracy"] == [(1, pytest.approx(0.8))]
    assert len(said) == 1


@of_mlflow
def test_mlflow_and_another_are_told_the_same(train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = train(report_to="tensorboard,mlflow")
    import mlflow  # not before: it is told to be quiet

    ((one, history),) = mlflow_runs(tmp_path / "logs" / "mlflow.db")
    assert (one.info.run_name, one.info.status) == ("run", "FINISHED")
    assert (one.data.params["seed"], one.data.params["head_features"]) == ("2021", "mean-2")
    assert one.data.metrics["test/accuracy"] == done.metrics["test"]["accuracy"]
    losses = [(number, epoch["validation_loss"]) for number, epoch in enumerate(done.info["history"], 1)]
    assert history("head/validation_loss") == losses
    assert scalars(tmp_path / "logs" / "run")["head/validation_loss"] == [
        (at, pytest.approx(loss)) for at, loss in losses
    ]
    assert not mlflow.is_tracking_uri_set(), "what the person logs afterwards goes where it would have gone"
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "run", "run.csv"]


@of_mlflow
def test_mlflow_goes_where_it_is_told_to_and_notes_that_a_run_failed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'own.db'}")
    monkeypatch.setattr("headstart.run.judge", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train(report_to="mlflow")
    ((one, history),) = mlflow_runs(tmp_path / "own.db")
    assert one.info.status == "FAILED"
    assert len(history("head/train_loss")) == 4
    assert not (tmp_path / "logs" / "mlflow.db").exists()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_in_its_log(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Log.epoch

    def killed(log: Log, stage: str, number: int, epoch: Epoch) -> bool:
        tell(log, stage, number, epoch)
        if (stage, number) == ("thaw-1", 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    given: dict[str, Any] = {"report_to": "tensorboard", "thaw": "1", "epochs": 4, "patience": 4}
    with monkeypatch.context() as patch:
        patch.setattr(Log, "epoch", killed)
        with pytest.raises(TerminatedError):
            train(**given)
    done = train(**given, resume=True)
    found = scalars(tmp_path / "logs" / "run")
    for stage, name in itertools.product(done.metrics["stages"], EPOCHS):
        assert [step for step, _ in found[f"{stage['name']}/{name}"]] == list(range(1, stage["epochs"] + 1))
    assert [value for _, value in found["thaw-1/lr"]] == pytest.approx([epoch["lr"] for epoch in done.info["history"]])


def test_another_run_of_the_same_name_has_a_log_of_its_own(train: Train, tmp_path: Path) -> None:
    (tmp_path / "logs" / "run" / "2020-01-01T00-00-00").mkdir(parents=True)
    train(report_to="tensorboard")
    assert len(list((tmp_path / "logs" / "run").iterdir())) == 2


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_what_is_not_installed_is_told_before_anything_is_done(
    name: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda one, *more: None if one == name else find(one, *more))
    monkeypatch.delattr("headstart.run.prepare")
    with pytest.raises(InputError) as refused:
        train(report_to=name)
    command = f"pip install 'headstart[track]' {name}"
    assert str(refused.value) == f"--report-to {name} needs accelerate and {name}. Install them with: {command}"
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]


def test_bad_data_leaves_no_log(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        run.train(config.settings("gone.csv", model=str(tiny_bert), out="r", report_to="tensorboard"))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_be_used_is_told_in_a_sentence(train: Train, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(InputError, match=r"^--report-to tensorboard: it cannot be used \(.*logs"):
        train(report_to="tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tiny_bert: Path,
    small_table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*given: object, **more: object) -> None:
        print("Logging to a place of mine.")  # noqa: T201  # as some do
        raise OSError("no room")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", full)
    said: list[str] = []
    given: dict[str, Any] = {"model": str(tiny_bert), "out": "r", "thaw": "0", "epochs": 2, "device": "cpu"}
    run.train(config.settings(str(small_table), **given, report_to="tensorboard"), announce=said.append)
    assert said[1:] == ["--report-to tensorboard: it failed, and is told nothing more (no room)."]
    assert capsys.readouterr() == ("", "Logging to a place of mine.\n")
    assert json.loads((tmp_path / "r" / "headstart.json").read_text())["settings"]["report_to"] == ["tensorboard"]


def test_those_that_count_steps_themselves_get_the_epoch_as_a_value(tmp_path: Path) -> None:
    class Recorder:
        """In place of wandb's, which cannot run without its servers."""

        def __init__(self) -> None:
            self.told: list[tuple[dict[str, float], int | None]] = []

        def log(self, values: dict[str, float], step: int | None) -> None:
            self.told.append((values, step))

    log, recorder = Log(config.settings("x.csv"), tmp_path / "run", print), Recorder()
    log.trackers = {"wandb": recorder}
    log.epoch("thaw-2", 0, Epoch(0.5, 0.4, 0.8, 1.0, 1e-3))
    log.result({"test": {"accuracy": 0.8, "labels": ["a"], "accuracy_ci95": [0.7, 0.9]}, "timing": {"total": 2.0}})
    assert [step for _, step in recorder.told] == [None] * 3
    assert recorder.told[0][0]["thaw-2/epoch"] == 1
    assert [values for values, _ in recorder.told[1:]] == [{"test/accuracy": 0.8}, {"timing/total": 2.0}]


def test_without_a_tracker_nothing_of_one_is_loaded_or_written(train: Train, tmp_path: Path) -> None:
    train(report_to="none")
    assert not (tmp_path / "logs").exists()
