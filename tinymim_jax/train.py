"""The loop. Rerunning the same command resumes: the step number is the position in the data."""

import json
import logging
import os
import pathlib
import signal
import threading
import time

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax import optim
from tinymim_jax.checkpoint_format import digest
from tinymim_jax.checkpoints import Checkpoints
from tinymim_jax.evaluate import evaluate
from tinymim_jax.experiment import (
    Experiment,
    batch_shapes,
    build_experiment,
    build_optimizer,
    evaluation_batches,
    preprocessing,
    training_batches,
)
from tinymim_jax.metrics import Averages, Writer, compute, no_averages
from tinymim_jax.progress import DATA_WAIT_LIMIT, Progress, input_advice, span
from tinymim_jax.sharding import make_mesh, place_batch, replicated
from tinymim_jax.state import (
    TrainState,
    evaluated_params,
    init_state,
    make_eval_step,
    make_train_step,
    place_frozen,
    trained_paths,
)

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop, has saved its state, and goes on when the same command is run again."""


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    data_dir: str | None = None,
    workers: int = 0,
    fsdp: int = 1,
) -> dict[str, float]:
    """Runs the experiment of `config` to its end and returns the figures of its last evaluation.

    Args:
      config: the experiment; configs/base.py explains every key.
      workdir: holds config.json, model.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, result.json.
      data_dir: where prepared data sets lie; None is where TFDS looks.
      workers: processes that decode images; 0 decodes in this one.
      fsdp: over how many devices each large parameter is split.

    Raises:
      Interrupted: after Ctrl-C or a preemption notice; everything is saved.
      FloatingPointError: loss or gradient were not finite `train.max_skipped` times in a row.
    """
    workdir = pathlib.Path(workdir)
    _claim(workdir, config)
    finished = workdir / "result.json"
    if finished.exists():
        log.info("%s is finished; delete it or choose another workdir to run again", workdir)
        return json.loads(finished.read_text())

    experiment = build_experiment(config, data_dir=data_dir)  # whatever the data lacks is said before devices are taken
    mesh = make_mesh(fsdp)
    _check_batch(experiment, mesh)
    task = experiment.task
    frozen = place_frozen(task.load_frozen(), mesh)
    paths = trained_paths(task, frozen, batch_shapes(experiment))
    optimizer = build_optimizer(experiment, paths)
    settings = {"ema": config.train.ema}
    abstract, fresh_state = init_state(task, optimizer, paths, mesh, jax.random.key(config.seed), **settings)
    train_step = make_train_step(task, optimizer, paths, mesh, accumulate=config.train.accumulate, **settings)

    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        every_seconds=60 * config.checkpoint.every_minutes,
    )
    with checkpoints:
        state = checkpoints.restore(abstract)
        state = fresh_state() if state is None else state
        _write_json(
            workdir / "model.json",
            task.model | {"preprocessing": preprocessing(config, experiment.train_source.class_names)},
        )
        _announce(experiment, state, paths, mesh)
        result = _loop(experiment, mesh, state, frozen, train_step, checkpoints, workdir, workers)
    _write_json(finished, result)
    return result


def _loop(
    experiment: Experiment, mesh: Mesh, state: TrainState, frozen, train_step, checkpoints, workdir, workers
) -> dict[str, float]:
    settings, task, total = experiment.config.train, experiment.task, experiment.total_steps
    eval_step = make_eval_step(task)
    root = jax.random.key(experiment.config.seed)
    names = (*task.names, "gradient_norm")
    start, extra, result = int(state.step), {"frozen": digest(frozen)}, {}
    recorded, skipped_in_a_row = _nothing_recorded(names, mesh), 0
    batches = training_batches(experiment, start_step=start, workers=workers)
    report = _Report(experiment, workdir, start, workers)
    with batches, report, _StopRequest() as stop:
        # A run that was killed between its last update and its result has only the evaluation left to do.
        for step in range(start + 1, total + 1):
            with report.waiting_for_data():
                batch = next(batches)
            # The step before this one is looked at once this one is under way: the device never waits for the host.
            before = skipped_in_a_row
            state, recorded, skipped_in_a_row = train_step(state, recorded, frozen, place_batch(mesh, batch), root)
            _check_finite(before, step - 1, settings.max_skipped)
            if step == start + 1:
                report.first_step(step, recorded)
            if step % settings.log_every == 0 or step == total:
                report.training(step, recorded, state, batches.substitutions)
                recorded = _nothing_recorded(names, mesh)
            if experiment.eval_every and step % experiment.eval_every == 0 and step < total:
                report.evaluation(step, _evaluate(experiment, eval_step, state, frozen, mesh, workers))
            checkpoints.save(step, state, force=stop.requested or step == total, extra=extra)
            if (stop.requested or checkpoints.preempted) and step < total:
                checkpoints.wait()
                raise Interrupted(f"stopped after step {step}, all saved: run the same command again to go on")
        _check_finite(skipped_in_a_row, total, settings.max_skipped)
        result = _evaluate(experiment, eval_step, state, frozen, mesh, workers)
        report.evaluation(total, result)
        checkpoints.wait()
    return result


def _evaluate(experiment: Experiment, eval_step, state: TrainState, frozen, mesh: Mesh, workers: int):
    return evaluate(
        eval_step,
        experiment.task.names,
        evaluated_params(state),
        frozen,
        evaluation_batches(experiment, workers=workers),
        mesh,
        examples=len(experiment.eval_source),
        seed=experiment.config.seed,
    )


class _Report:
    """What a run says of itself: to the log, to metrics.jsonl and to TensorBoard."""

    def __init__(self, experiment: Experiment, workdir: pathlib.Path, start: int, workers: int):
        self._experiment = experiment
        self._workers = workers
        self._input_was_slow = False
        self._progress = Progress(experiment.total_steps, experiment.batch_size, start)
        self._writer = Writer(workdir, start_step=start, active=jax.process_index() == 0)
        self._began = time.perf_counter()
        self.waiting_for_data = self._progress.waiting_for_data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writer.close()

    def first_step(self, step: int, recorded: Averages) -> None:
        jax.block_until_ready(recorded)
        log.info("first step after %s, most of it compiling", span(time.perf_counter() - self._began))
        self._progress.restart(step)

    def training(self, step: int, recorded: Averages, state: TrainState, substituted: int) -> None:
        figures = {f"train/{name}": value for name, value in compute(recorded).items()}
        speed, text = self._progress.report(step)
        lr, skipped = float(np.asarray(self._experiment.schedule(step - 1))), int(state.skipped)
        self._writer.write(step, figures | speed | {"lr": lr, "skipped": skipped, "substituted": substituted})
        loss = figures["train/loss"]
        log.info("step %d/%d | loss %.4f | lr %.2e | %s", step, self._experiment.total_steps, loss, lr, text)
        slow = speed["data_wait"] > DATA_WAIT_LIMIT
        if slow and not self._input_was_slow:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            log.warning("%s", input_advice(speed["data_wait"], workers=self._workers, cores=cores))
        self._input_was_slow = slow

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        self._writer.write(step, {f"eval/{name}": value for name, value in result.items()})
        log.info(
            "step %d | evaluation | %s",
            step,
            ", ".join(f"{name} {value:.4g}" for name, value in result.items()),
        )
        self._progress.restart(step)


class _StopRequest:
    """Turns the first Ctrl-C into a request that the loop honours after the step; the second one acts at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, signum, frame) -> None:
        del frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("stopping after this step; press Ctrl-C again to stop at once, without saving")
        if jax.process_count() > 1:
            # All processes must stop after the same step: jax's preemption notice agrees on one.
            signal.raise_signal(signal.SIGTERM)
            self.requested = False


def differences(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    """A line for each key in which the experiment in `workdir` differs from `config`; none where there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return []
    found, wanted = _flat(json.loads(path.read_text())), _flat(_as_json(config))
    changes = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
    return [f"  {key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in changes]


def _claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json, or makes sure that the one there is the same experiment."""
    if rows := differences(workdir, config):
        raise ValueError(
            f"{workdir} holds another experiment:\n" + "\n".join(rows) + "\nChoose another --workdir, or delete it"
        )
    path = workdir / "config.json"
    if path.exists():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write_json(path, _as_json(config))
    except OSError as error:
        raise OSError(
            f"cannot write to --workdir {workdir}: {error.strerror}; choose a folder you may write to"
        ) from error


def _as_json(config: ConfigDict) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def _check_batch(experiment: Experiment, mesh: Mesh) -> None:
    part = experiment.batch_size // experiment.config.train.accumulate
    if part % mesh.size:
        raise ValueError(
            f"{part} images at a time (train.batch_size / train.accumulate) cannot be split over {mesh.size} devices: "
            f"choose a multiple of {mesh.size}"
        )


def _check_finite(skipped_in_a_row: jax.Array | int, step: int, limit: int) -> None:
    count = int(skipped_in_a_row)
    if count >= limit:
        raise FloatingPointError(
            f"loss or gradient were not finite in the {count} steps up to step {step}. These updates were left out, so "
            "the checkpoints are sound. Lower optim.base_lr, lengthen optim.warmup or set model.dtype='float32'"
        )


def _announce(experiment: Experiment, state: TrainState, paths: frozenset, mesh: Mesh) -> None:
    total = parameter_overview.count_parameters(state.params)
    trained = parameter_overview.count_parameters(optim.split(state.params, paths)[0])
    log.info(
        "%s: %.2f M parameters, %.2f M of them trained; %d training and %d evaluation images; mesh %s on %s",
        experiment.config.task,
        total / 1e6,
        trained / 1e6,
        len(experiment.train_source),
        len(experiment.eval_source),
        dict(mesh.shape),
        mesh.devices.flat[0].device_kind,
    )
    if (crops := experiment.config.data.crops) > 1:
        images = experiment.batch_size // crops
        log.info("a batch of %d holds %d images, %d views of each; all are counted", images * crops, images, crops)
    step = int(state.step)
    log.info("%s at step %d of %d", "resuming" if step else "starting", step, experiment.total_steps)


def _nothing_recorded(names: tuple[str, ...], mesh: Mesh) -> Averages:
    return jax.device_put(no_averages(names), replicated(mesh))


def _flat(tree: dict, prefix: str = "") -> dict:
    rows = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def _write_json(path: pathlib.Path, value: dict) -> None:
    """Whole or not at all; by process 0 only."""
    if jax.process_index():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
