"""The training loop. Running the same command again resumes: the step number is the position in the data."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax.analysis.replay import explain_step
from tinymim_jax.checkpoints.format import digest
from tinymim_jax.checkpoints.manager import Checkpoints
from tinymim_jax.checkpoints.params import student_path
from tinymim_jax.evaluation.evaluate import Evaluation, make_evaluation
from tinymim_jax.evaluation.live_probe import LiveProbe
from tinymim_jax.experiment import (
    Experiment,
    batch_shapes,
    build_experiment,
    build_optimizer,
    input_record,
    training_batches,
)
from tinymim_jax.loggers import check_installed
from tinymim_jax.memory import explained, smallest_accumulate
from tinymim_jax.metrics import Averages, no_averages
from tinymim_jax.reports.write import write_at_end
from tinymim_jax.resume import Inputs, accept, as_json, check_inputs, check_same, recorded_micro_batches
from tinymim_jax.run_log import RunLog
from tinymim_jax.runtime.exits import STALL_MINUTES, Interrupted, StopRequest, is_first
from tinymim_jax.runtime.paths import check_output_path
from tinymim_jax.runtime.workdir import RESULT, claimed, read_result, write_json
from tinymim_jax.sharding import make_mesh, place_batch, replicated
from tinymim_jax.state import (
    TrainState,
    evaluated_params,
    init_state,
    make_train_step,
    place_frozen,
    trained_paths,
)
from tinymim_jax.tasks.lineage import lineage_record

log = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    data_dir: str | None = None,
    workers: int = 0,
    fsdp: int = 1,
    stall_minutes: float = STALL_MINUTES,
    extend: bool = False,
    loggers: Sequence[str] = (),
) -> dict[str, float]:
    """Runs the experiment of `config` to its end and returns the metrics of its last evaluation.

    Args:
      config: the experiment; configs/base.py explains every key.
      workdir: holds config.json, model.json, metrics.jsonl, tensorboard/, checkpoints/, status.json and, at the end,
        result.json and report.html; students/NAME has config.json and model.json of each further student. A folder
        that all processes see, or gs://BUCKET/PATH.
      data_dir: folder of the prepared data sets; None: TFDS's default folder.
      workers: number of processes that decode images; 0 decodes in this process.
      fsdp: number of devices over which each large parameter is split.
      stall_minutes: if no step, evaluation batch or checkpoint finishes for this long, the process prints the stacks of
        its threads and ends with exit status 86; 0 disables this.
      extend: a run in this workdir, finished or not, may go on for a longer train.duration; see resume.py.
      loggers: experiment trackers that get the figures too: names of loggers.LOGGERS.

    Raises:
      ValueError: the workdir holds another experiment, or one with another teacher or other data.
      Interrupted: after Ctrl-C or a preemption notice; everything is saved.
      Busy: another process runs in this workdir.
      FloatingPointError: loss or gradient were not finite more than `train.max_skipped` times in a row.
    """
    check_output_path(workdir, "--workdir")
    check_installed(loggers)
    folder = epath.Path(workdir).expanduser()
    changes = check_same(folder, config, extend=extend)
    result = read_result(folder)
    if result is not None and "train.duration" not in changes:
        log.info("%s is finished; delete it or choose another workdir to run again", folder)
        return result
    if result is None and (folder / RESULT).exists():
        log.warning("%s is empty or damaged: the last evaluation is repeated", folder / RESULT)
    try:
        with claimed(folder, as_json(config)), RunLog(folder, stall_minutes=stall_minutes, loggers=loggers) as run_log:
            result = _run(config, folder, run_log, changes, data_dir=data_dir, workers=workers, fsdp=fsdp)
            write_json(folder / RESULT, result)
            run_log.end()
            spent = {"seconds": run_log.seconds(), "images": run_log.images}
    except FloatingPointError:
        if is_first():
            write_at_end(folder)
        raise
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("result written")  # before any process reads it
    if is_first():
        write_at_end(folder, **spent, data_dir=data_dir, workers=workers)
    return result


def _run(
    config: ConfigDict,
    workdir: epath.Path,
    run_log: RunLog,
    changes: Mapping[str, tuple],
    *,
    data_dir: str | None,
    workers: int,
    fsdp: int,
) -> dict[str, float]:
    experiment = build_experiment(config, data_dir=data_dir)  # errors of the data are raised before devices are used
    mesh = make_mesh(fsdp)
    _check_batch(experiment, mesh)
    task = experiment.task
    frozen = place_frozen(task.load_frozen(), mesh)
    names = experiment.train_source.class_names
    inputs = Inputs(digest(frozen), tuple(names), len(experiment.train_source), len(experiment.eval_source))
    check_inputs(workdir, inputs)
    paths = trained_paths(task, frozen, batch_shapes(experiment))
    optimizer = build_optimizer(experiment, paths)
    accumulate = config.train.accumulate
    if accumulate == 0:
        accumulate = recorded_micro_batches(workdir) or smallest_accumulate(experiment, frozen, paths, mesh)
        inputs = dataclasses.replace(inputs, micro_batches=accumulate)
    settings = {"ema": config.train.ema}
    abstract, fresh_state = init_state(task, optimizer, paths, mesh, jax.random.key(config.seed), **settings)
    train_step = make_train_step(task, optimizer, paths, mesh, accumulate=accumulate, **settings)

    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        every_seconds=60 * config.checkpoint.every_minutes,
    )
    with checkpoints, explained(experiment, frozen, paths, mesh, accumulate):
        state = checkpoints.restore(abstract)
        check_inputs(workdir, inputs, frozen_before=checkpoints.extra.get("frozen"))
        accept(workdir, config, inputs, changes)
        state = fresh_state() if state is None else state
        _write_records(experiment, workdir)
        run_log.begin(experiment, state, paths, mesh, workers)

        def explain(state: TrainState, step: int) -> str:
            return explain_step(workdir, experiment, mesh, state, frozen, paths, number=step, accumulate=accumulate)

        return _loop(experiment, mesh, state, frozen, train_step, checkpoints, run_log, workers, inputs.frozen, explain)


def _write_records(experiment: Experiment, workdir: epath.Path) -> None:
    """model.json; of each further student model.json and config.json in a folder, as if it were trained alone."""
    task, config, inputs = experiment.task, experiment.config, {"preprocessing": input_record(experiment)}
    write_json(workdir / "model.json", task.model | task.origin | inputs | lineage_record(config))
    for name, student in task.students.items():
        folder = epath.Path(student_path(workdir, name))
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
        record = student.model | student.origin | inputs | lineage_record(student.config, whose=f"student {name}")
        write_json(folder / "model.json", record)
        write_json(folder / "config.json", as_json(student.config))


def _loop(
    experiment: Experiment,
    mesh: Mesh,
    state: TrainState,
    frozen,
    train_step,
    checkpoints: Checkpoints,
    run_log: RunLog,
    workers: int,
    frozen_digest: str,
    explain: Callable[[TrainState, int], str],
) -> dict[str, float]:
    settings, task, total = experiment.config.train, experiment.task, experiment.total_steps
    evaluation = make_evaluation(experiment, mesh)
    root = jax.random.key(experiment.config.seed)
    names = (*task.names, "gradient_norm")
    start, extra = int(state.step), {"frozen": frozen_digest}
    recorded, skipped_in_a_row = _nothing_recorded(names, mesh), 0
    probe = LiveProbe(experiment, mesh, history=run_log.probed()) if experiment.probe_every else None
    if probe and probe.enough():
        total = start  # killed after the step at which it had ended
    batches = training_batches(experiment, start_step=start, workers=workers)

    with batches, StopRequest() as stop:
        # Empty for a run that was killed between its last update and writing result.json: only the evaluation is left.
        for step in range(start + 1, total + 1):
            with run_log.waiting_for_data():
                batch = next(batches)
            if step == start + 1 and task.remark is not None and is_first():
                log.info("%s", task.remark(batch))
            # The previous step's results are read after this step is dispatched: the device never waits for the host.
            before = skipped_in_a_row
            state, recorded, skipped_in_a_row = train_step(state, recorded, frozen, place_batch(mesh, batch), root)
            run_log.dispatched(skipped_in_a_row)
            _check_finite(before, step - 1, settings.max_skipped, lambda first, now=state: explain(now, first))
            run_log.finished(step - 1)
            if step == start + 1:
                run_log.first_step(step, recorded)
            if step % settings.log_every == 0 or step == total:
                run_log.training(step, recorded, state, batches.substitutions)
                recorded = _nothing_recorded(names, mesh)
            if experiment.eval_every and step % experiment.eval_every == 0 and step < total:
                _evaluate(evaluation, state, frozen, run_log, workers, step)
            if probe and step % experiment.probe_every == 0:
                total = _probe(probe, state, run_log, step, total)
            stopping = stop.requested  # read once: a signal after the save is for the next step
            with run_log.saving():
                checkpoints.save(step, state, force=stopping or step == total, extra=extra)
            if (stopping or checkpoints.preempted) and step < total:
                run_log.finished(step)
                with run_log.saving():
                    checkpoints.wait()
                run_log.account()
                raise Interrupted(
                    f"stopped after step {step}, all saved: run the same command again to resume", by_hand=stop.by_hand
                )
            if step == total:  # as planned, or as the probes have ended it
                break
        _check_finite(skipped_in_a_row, total, settings.max_skipped, lambda first: explain(state, first))
        run_log.finished(total)
        result = _evaluate(evaluation, state, frozen, run_log, workers, total)
        with run_log.saving():
            checkpoints.wait()
    return result


def _evaluate(
    evaluation: Evaluation, state: TrainState, frozen, run_log: RunLog, workers: int, step: int
) -> dict[str, float]:
    with run_log.evaluating():
        result = evaluation(evaluated_params(state), frozen, workers=workers, on_batch=run_log.evaluated_batch)
    run_log.evaluation(step, result)
    return result


def _probe(probe: LiveProbe, state: TrainState, run_log: RunLog, step: int, total: int) -> int:
    """Probes the features, and returns the step at which the training ends: this one, or `total` as before."""
    with run_log.evaluating():
        figures = probe(evaluated_params(state))
    run_log.probe(step, figures)
    if step < total and probe.enough():
        log.info("probe/knn has not risen in train.probe_patience probes: the training ends at step %d", step)
        return step
    return total


def _check_batch(experiment: Experiment, mesh: Mesh) -> None:
    if (limit := experiment.config.train.max_skipped) < 0:
        raise ValueError(f"train.max_skipped={limit} counts updates in a row: 0 stops at the first that is not finite")
    part = experiment.batch_size // max(experiment.config.train.accumulate, 1)
    if part % mesh.size:
        raise ValueError(
            f"{part} images at a time (train.batch_size / train.accumulate) cannot be split over {mesh.size} devices: "
            f"choose a multiple of {mesh.size}" + (f", or at most {part} devices" if part < mesh.size else "")
        )


def _check_finite(skipped_in_a_row: jax.Array | int, step: int, limit: int, explain: Callable[[int], str]) -> None:
    """Raises FloatingPointError after too many skipped steps in a row, with `explain`'s text about the first one."""
    count = int(skipped_in_a_row)
    if count > limit:
        raise FloatingPointError(
            f"loss or gradient were not finite in the {count} step{'s' * (count > 1)} up to step {step}. These updates "
            "were skipped, so the checkpoints are sound. "
            f"Lower optim.base_lr, lengthen optim.warmup or set model.dtype='float32'. {explain(step - count + 1)}"
        )


def _nothing_recorded(names: tuple[str, ...], mesh: Mesh) -> Averages:
    return jax.device_put(no_averages(names), replicated(mesh))
