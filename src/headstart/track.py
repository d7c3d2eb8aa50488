"""Experiment trackers, by accelerate's own classes: they are told the settings, each epoch as it ends, and the result.

This room knows what each tracker needs and where its logs lie. Of training it knows an epoch's record, no more.
"""

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.checkpoints import is_unfinished
from headstart.config import PLACES, TrainConfig
from headstart.errors import InputError
from headstart.train import Epoch

PROJECT = "headstart"  # under which trackers keep runs, unless their own variable, as WANDB_PROJECT, says another
COUNTING = ("trackio", "wandb")  # these count what they are told, through all stages, and so get the epoch as a value


class Log(contextlib.ExitStack):
    """The trackers of a run that goes to the folder `out`; what they write is in `logs` beside it.

    It is closed by a `with` block. A tracker that fails is told nothing more, and `announce` is told so: what is being
    learnt matters more. An `InputError` if one is not installed.
    """

    def __init__(self, config: TrainConfig, out: Path, announce: Callable[[str], None]) -> None:
        super().__init__()
        for name in config.report_to:
            if not (importlib.util.find_spec("accelerate") and importlib.util.find_spec(name)):
                command = f"pip install 'headstart[track]' {name}"
                raise InputError(f"--report-to {name} needs accelerate and {name}. Install them with: {command}")
        self.config, self.announce, self.run, self.logs = config, announce, out.name, out.parent / "logs"
        self.resumed = config.resume and is_unfinished(out)
        self.trackers = dict[str, Any]()

    def start(self) -> None:
        """Tell the settings, as hyperparameters, and how to look to `announce`; an `InputError` where that fails."""
        given = {name: one for name, one in asdict(self.config).items() if name == "data" or name not in PLACES}
        plain = {name: ",".join(one) if isinstance(one, tuple) else one for name, one in given.items()}
        settings = {name: one for name, one in plain.items() if one is not None}
        for name in dict.fromkeys(self.config.report_to):
            try:
                look = self._start(name)
                self.trackers[name].store_init_configuration(settings)
            except Exception as error:
                raise InputError(f"--report-to {name}: it cannot be used ({error}).") from error
            self.announce(f"Logs      {look}")

    def _start(self, name: str) -> str:
        """Begin with one tracker; how to look at what it is told."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # trackers ask it whether this is the main process
        self.logs.mkdir(parents=True, exist_ok=True)
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        given: dict[str, Any] = {"name": self.run}
        look = f"trackio show --project {project}"
        if name == "tensorboard":
            earlier = sorted(place.name for place in self.logs.glob(f"{self.run}/20*")) if self.resumed else []
            project = f"{self.run}/{(earlier or [time.strftime('%Y-%m-%dT%H-%M-%S')])[-1]}"
            given, look = {"logging_dir": self.logs}, f"tensorboard --logdir {self.logs}"
        elif name == "mlflow":
            given, look = self._mlflow()
        tracker = self.trackers[name] = LOGGER_TYPE_TO_CLASS[name](project, **given)
        with contextlib.redirect_stdout(sys.stderr):  # results alone go to stdout
            tracker.start()
        if name == "mlflow":  # whose run notes by which error it ended
            self.push(lambda *ended: self._tell(name, tracker.tracker.__exit__, *ended))
        else:
            self.callback(self._tell, name, tracker.finish)
        return tracker.tracker.url if name == "wandb" else look

    def _mlflow(self) -> tuple[dict[str, Any], str]:
        """Where mlflow keeps the run: where it has been told to, or else in a database in `logs`; and how to look."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # both are read when it is imported
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow

        given: dict[str, Any] = {"run_name": self.run}
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{(self.logs / 'mlflow.db').as_posix()}")
            self.callback(mlflow.set_tracking_uri, None)
            given["logging_dir"] = (self.logs / "mlflow").absolute().as_uri()
        return given, f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()}"

    def epoch(self, stage: str, number: int, epoch: Epoch) -> bool:
        """Tell the epoch of a stage that has ended, counted from 0; no tracker asks to stop."""
        for name in list(self.trackers):
            if (self.resumed, stage, name) != (True, "head", "tensorboard"):  # whose log goes on, and has them
                self._log(name, stage, asdict(epoch), number + 1)
        return False

    def result(self, numbers: Mapping[str, Any]) -> None:
        """Tell what is in metrics.json of the test part, and of the time it took."""
        for name in list(self.trackers):
            for part in ("test", "timing"):
                self._log(name, part, numbers[part])

    def _log(self, name: str, part: str, values: Mapping[str, Any], step: int | None = None) -> None:
        named = {f"{part}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        if step is not None and name in COUNTING:
            named[f"{part}/epoch"], step = step, None
        if name in self.trackers:
            self._tell(name, self.trackers[name].log, named, step)

    def _tell(self, name: str, action: Callable[..., object], *said: object) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                action(*said)
        except Exception as error:
            self.trackers.pop(name, None)
            self.announce(f"--report-to {name}: it failed, and is told nothing more ({error}).")
