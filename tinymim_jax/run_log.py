"""What a training writes down: to the log, to metrics.jsonl and TensorBoard, and to status.json."""

import contextlib
import logging
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from tinymim_jax import optim
from tinymim_jax.data.sources.labels import class_summary
from tinymim_jax.experiment import Experiment
from tinymim_jax.loggers import open_loggers
from tinymim_jax.metrics import LINES, Averages, Writer, compute, read
from tinymim_jax.resume import as_json, flat
from tinymim_jax.runtime.exits import Interrupted, is_first, joined_processes
from tinymim_jax.runtime.goodput import Goodput, describe, shares
from tinymim_jax.runtime.heartbeat import Heartbeat, read_status
from tinymim_jax.runtime.progress import DATA_WAIT_LIMIT, Progress, format_seconds, input_advice
from tinymim_jax.runtime.terminal import Bar
from tinymim_jax.state import TrainState

log = logging.getLogger(__name__)


class RunLog:
    """A context manager around a run, called by the training loop. Process 0 writes; the others only watch for stalls.

    stall_minutes: without a finished step, evaluation batch or checkpoint for so long, the process exits with 86; 0:
      never.
    loggers: names of loggers.LOGGERS, to which process 0 sends its figures as well.
    """

    def __init__(self, workdir: epath.Path, *, stall_minutes: float, loggers: Sequence[str] = ()):
        active = is_first()
        self._workdir, self._active = workdir, active
        self._logger_names, self._loggers = tuple(loggers) if active else (), None
        self._before = read_status(workdir) if active else {}
        self._goodput = Goodput(self._before.get("seconds"))
        if self._before and not self._before.get("by_hand"):
            self._goodput.charge("downtime", time.time() - self._before["time"])
        self._step = 0
        self._heart = Heartbeat(
            workdir if active else None,
            stall_seconds=60 * stall_minutes,
            sample=lambda: {"step": self._step, "seconds": self._goodput.seconds()},
        )
        attempts = self._before.get("attempts", 0) + 1
        self._heart.note(stage="starting", attempts=attempts, processes=joined_processes() or 1, began=time.time())
        self._heart.note(first_began=self._before.get("first_began", time.time()), command=_command())

    def __enter__(self) -> "RunLog":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._heart)
        self._stack.callback(self._goodput.close)
        self._starting = self._stack.enter_context(contextlib.ExitStack())
        self._starting.enter_context(self._goodput.lost_to("start"))  # until the first batch is asked for
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if isinstance(error, Interrupted):
            self._heart.note(stage="interrupted", error=str(error), by_hand=error.by_hand)
        elif isinstance(error, KeyboardInterrupt):
            self._heart.note(stage="interrupted", error="Ctrl-C, at once", by_hand=True)
        elif error is not None:
            self._heart.note(stage="failed", error=f"{kind.__name__}: {error}")
        self._stack.close()
        if self._loggers:
            self._loggers.close(failed=error is not None and not isinstance(error, Interrupted | KeyboardInterrupt))

    def begin(self, experiment: Experiment, state: TrainState, paths: frozenset, mesh: Mesh, workers: int) -> None:
        """Call it before the loop, with the state that it starts from."""
        self._experiment, self._workers, self._input_was_slow = experiment, workers, False
        self._schedule = jax.jit(experiment.schedule)
        start = self._step = int(state.step)
        ahead = max(0, self._before.get("step", 0) - start)
        self._goodput.charge("redone", ahead * self._before.get("seconds_per_step", 0.0))
        _announce(experiment, state, paths, mesh)
        if ahead:
            log.info("the last %d steps of the previous attempt are repeated: they were not saved", ahead)
        self._progress = Progress(experiment.total_steps, experiment.batch_size, start)
        self._bar = Bar(experiment.total_steps, experiment.batch_size) if self._active else None
        self._loggers = open_loggers(self._logger_names, self._workdir, flat(as_json(experiment.config)))
        self._writer = self._stack.enter_context(
            Writer(self._workdir, start_step=start, active=self._active, others=self._loggers.write)
        )
        self._began = time.perf_counter()
        device = mesh.devices.flat[0].device_kind
        self._heart.note(stage="compiling", total_steps=experiment.total_steps, saved=start)
        self._heart.note(devices=f"{mesh.size} x {device}", versions=_versions())
        self._heart.watch()

    @property
    def images(self) -> int:
        """Examples of all steps so far."""
        return self._step * self._experiment.batch_size

    def seconds(self) -> float:
        """Time of all attempts together."""
        return sum(self._goodput.seconds().values())

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A context around waiting for the next batch."""
        self._starting.close()
        with self._progress.waiting_for_data(), self._goodput.lost_if_idle("input"):
            yield
        self._waited_until = time.perf_counter()

    def dispatched(self, result: jax.Array) -> None:
        """Call it when a step was dispatched, with one of its results that is not donated to the next."""
        self._goodput.dispatched(result)

    def finished(self, step: int) -> None:
        """Call it when the device has finished this step."""
        self._step = step
        self._heart.beat()
        if self._bar:
            self._bar.update(step)

    def first_step(self, step: int, recorded: Averages) -> None:
        jax.block_until_ready(recorded)
        log.info("first step after %s, most of it compiling", format_seconds(time.perf_counter() - self._began))
        self._goodput.add_lost("compile", time.perf_counter() - self._waited_until)
        self._progress.restart(step)
        self._heart.note(stage="training")
        self._heart.compiled()

    def training(self, step: int, recorded: Averages, state: TrainState, substituted: int) -> None:
        """Logs and records the means since the last call."""
        figures = {f"train/{name}": value for name, value in compute(recorded).items()}
        speed, text = self._progress.report(step)
        lr, skipped = float(self._schedule(step - 1)), int(state.skipped)
        counts = {"skipped": skipped, "substituted": substituted}
        self._writer.write(step, figures | speed | {"lr": lr} | counts | shares(self._goodput.seconds()))
        known = {name: speed[name] for name in ("images_per_second", "eta_seconds", "data_wait") if name in speed}
        if "images_per_second" in known:
            known["seconds_per_step"] = self._experiment.batch_size / known["images_per_second"]
        self._heart.note(
            stage="training",
            reported=time.time(),
            **known,
            **counts,
            train=_finite(figures),
        )
        loss = figures["train/loss"]
        log.info("step %d/%d | loss %.4f | lr %.2e | %s", step, self._experiment.total_steps, loss, lr, text)
        slow = speed["data_wait"] > DATA_WAIT_LIMIT
        if slow and not self._input_was_slow:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            log.warning("%s", input_advice(speed["data_wait"], workers=self._workers, cores=cores))
        self._input_was_slow = slow

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A context around what may save a checkpoint."""
        with self._goodput.lost_if_idle("checkpoint"):
            yield
        self._heart.beat()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context around an evaluation; its time does not count as training."""
        if self._bar:
            self._bar.restart()
        self._heart.note(stage="evaluating")
        with self._goodput.lost_to("evaluation"):
            yield

    def evaluated_batch(self) -> None:
        """Call it after each batch of an evaluation: it counts as progress for the stall limit."""
        self._heart.beat()

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Logs and records the figures of an evaluation after `step`."""
        figures = {f"eval/{name}": value for name, value in result.items()}
        self._writer.write(step, figures | shares(self._goodput.seconds()))
        log.info(
            "step %d | evaluation | %s",
            step,
            # A slash marks figures such as those of each class, which may be hundreds.
            ", ".join(f"{name} {value:.4g}" for name, value in result.items() if "/" not in name),
        )
        self._heart.note(stage="training", eval=_finite(figures))
        self._progress.restart(step)

    def probe(self, step: int, figures: dict[str, float]) -> None:
        """Logs and records what a probe of the features after `step` has found."""
        self._writer.write(step, {f"probe/{name}": value for name, value in figures.items()})
        log.info("step %d | probe | %s", step, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        self._heart.note(stage="training", probe=_finite({f"probe/{name}": v for name, v in figures.items()}))
        self._progress.restart(step)

    def probed(self) -> list[float]:
        """The k-NN accuracies of the probes up to the step that the run starts from; call it after `begin`."""
        path = self._workdir / LINES
        return [row["probe/knn"] for row in read(path) if row.get("probe/knn") is not None] if path.exists() else []

    def end(self) -> None:
        """Call it when the result is written."""
        self._heart.note(stage="finished", eta_seconds=0.0)
        self.account()

    def account(self) -> None:
        """Logs how the time was spent."""
        log.info("%s", describe(self._goodput.seconds()))
        if restarts := self._before.get("attempts", 0):
            log.info("restarts: %d", restarts)


def _command() -> str:
    """The command line of this process."""
    program = pathlib.Path(sys.argv[0])
    module = program.name in ("__main__.py", "tinymim")
    return shlex.join(["tinymim" if module else str(program), *sys.argv[1:]])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("tinymim-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
            found[name] = metadata.version(name)
    return found


def _announce(experiment: Experiment, state: TrainState, paths: frozenset, mesh: Mesh) -> None:
    total = parameter_overview.count_parameters(state.params)
    trained = parameter_overview.count_parameters(optim.split(state.params, paths)[0])
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    log.info(
        "%s: %.2f M parameters, %.2f M of them trained; %d training and %d evaluation images; mesh %s on %s%s",
        experiment.config.task,
        total / 1e6,
        trained / 1e6,
        len(experiment.train_source),
        len(experiment.eval_source),
        dict(mesh.shape),
        mesh.devices.flat[0].device_kind,
        processes,
    )
    log.info("training images: %s", class_summary(experiment.train_source))
    if (crops := experiment.config.data.crops) > 1:
        images = experiment.batch_size // crops
        log.info("a batch of %d examples holds %d images, %d views of each", images * crops, images, crops)
    for phase in experiment.task.phases:
        log.info("from step %d on: %s", phase.span.start + 1 if phase.span else 0, phase.label)
    step = int(state.step)
    log.info("%s at step %d of %d", "resuming" if step else "starting", step, experiment.total_steps)


def _finite(figures: dict[str, float]) -> dict[str, Any]:
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}
