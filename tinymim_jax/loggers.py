"""Experiment trackers that a run also reports to, beside its own files: Weights & Biases and MLflow, by `--log`."""

import hashlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from tinymim_jax.errors import unknown

_log = logging.getLogger(__name__)

_PROJECT = "tinymim-jax"


class Logger(Protocol):
    """Something that figures of a run are sent to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records figures by name at a step."""

    def close(self, *, failed: bool) -> None:
        """Sends what is left. failed: the run ended with an error, not by finishing or being interrupted."""


class Wandb:
    """A run of Weights & Biases. Its own environment variables say where to (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE).

    A resumed run continues the same one: its id follows from the workdir. WANDB_MODE=offline writes to WORKDIR/wandb,
    which `wandb sync` uploads later.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        import wandb  # type: ignore

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=workdir.name,
            id=run_id(workdir),
            resume="allow",
            dir=None if "://" in str(workdir) else str(workdir),
            config=dict(config),
        )
        # With a step of its own, figures of repeated steps are accepted; wandb's counter never goes back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names, or MLflow's default; a resumed run continues it."""

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        import mlflow  # type: ignore

        self._client = mlflow.MlflowClient()
        name, tag = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT), {"tinymim.run": run_id(workdir)}
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`tinymim.run` = '{tag['tinymim.run']}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=workdir.name, tags=tag).info.run_id
            rows = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
            for start in range(0, len(rows), 100):  # as many as MLflow takes at a time
                self._client.log_batch(self._id, params=rows[start : start + 100])
        self._metric = mlflow.entities.Metric

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # One request for all figures: the training waits for it. Names of classes may hold other characters.
        now = int(1000 * time.time())
        names = {name: re.sub(r"[^\w\-. :/]", "_", name) for name in values}
        rows = [self._metric(names[name], value, now, step) for name, value in values.items()]
        for start in range(0, len(rows), 1000):
            self._client.log_batch(self._id, metrics=rows[start : start + 1000])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


LOGGERS: dict[str, Any] = {"wandb": Wandb, "mlflow": Mlflow}  # each by the name of its package


class Loggers:
    """Several loggers as one. One that fails is reported once and then no longer used; it never stops the run."""

    def __init__(self, loggers: Mapping[str, Logger]):
        self._loggers = dict(loggers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name in list(self._loggers):
            self._try(name, lambda logger: logger.write(step, values))

    def close(self, *, failed: bool) -> None:
        for name in list(self._loggers):
            self._try(name, lambda logger: logger.close(failed=failed))
        self._loggers = {}

    def _try(self, name: str, action: Any) -> None:
        try:
            action(self._loggers[name])
        except Exception as error:
            del self._loggers[name]
            _log.error("--log %s failed and gets no more figures of this attempt: %r", name, error)


def parse(text: str) -> tuple[str, ...]:
    """Names of LOGGERS in a list such as "wandb,mlflow"; () for ""."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in LOGGERS:
            raise unknown("--log", name, LOGGERS)
    return names


def check_installed(names: Sequence[str]) -> None:
    """Raises ImportError that says what to install, before a run begins."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--log {name} needs the package {name}: pip install 'tinymim-jax[{name}]'")


def open_loggers(names: Sequence[str], workdir: epath.Path, config: Mapping[str, Any]) -> Loggers:
    """Starts the loggers of these names; `config` is a dict without nesting.

    Raises RuntimeError if one cannot start, such as without a login: this is known before the first step.
    """
    opened = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name](workdir, config)
        except Exception as error:
            Loggers(opened).close(failed=True)
            raise RuntimeError(
                f"--log {name} cannot start: {error}. Log in, work offline (WANDB_MODE=offline, or MLFLOW_TRACKING_URI "
                "with a local path), or leave it out of --log"
            ) from error
    return Loggers(opened)


def run_id(workdir: epath.Path) -> str:
    """An id that is the same for all attempts in one workdir."""
    return hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
