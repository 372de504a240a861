"""`tinymim sweep --study`: Optuna chooses the points, and trials that fall behind the others are stopped."""

import concurrent.futures
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tinymim_jax.errors import unknown
from tinymim_jax.metrics import read
from tinymim_jax.resume import MAY_CHANGE
from tinymim_jax.runtime.locks import locked
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import PRUNED, RunState
from tinymim_jax.sweeps.checks import check_points
from tinymim_jax.sweeps.children import Children, note_failure
from tinymim_jax.sweeps.points import Point, format_override, read_stages, state_of
from tinymim_jax.sweeps.running import exit_status, find_function, make_point, write_summary
from tinymim_jax.sweeps.sweep import Settings, overlap
from tinymim_jax.sweeps.tables import default_direction

_OPTUNA_DIRECTIONS = {"max": "maximize", "min": "minimize"}


def run_optuna_study(file: str, name: str, overrides: Mapping[str, Any], settings: Settings, *, trials: int) -> int:
    """Runs trials until `trials` of them have ended, writes the table, and returns the exit status.

    The study is kept in study.journal in the workdir, and resumed from there.

    Args:
      file, name: FILE[:ARGUMENT] and which of its functions, study or study_NAME, chooses the points.
      overrides: hold for all points.

    Raises:
      ImportError: Optuna is missing.
      ValueError: the first trial cannot be built, the metric does not exist, an override is for a key that the study
        chooses, or the study in the workdir compares another metric or was begun with other overrides.
      Busy: another command runs a study in this workdir.
    """
    optuna = _import_optuna()
    choose, _ = find_function(file, "study", name)
    make = _PointMaker(file, choose, settings.workdir, overrides)
    metric = settings.metric or "top1"
    direction = settings.direction or default_direction(metric)
    # A point for checks, drawn from a study that is thrown away.
    first = make.point(0, dict(choose(optuna.create_study().ask())))
    (figures,) = check_points([first], data_dir=settings.data_dir, extend=True).values()
    if figures and metric not in figures:
        raise unknown("--metric", metric, figures)
    settings.workdir.mkdir(parents=True, exist_ok=True)
    with locked(settings.workdir):
        study = _open_study(optuna, settings.workdir, choose.__name__, metric, direction)
        _check_words(study, overrides, settings.workdir)
        return _Trials(optuna, study, make, choose, settings, metric).run(trials)


class _PointMaker:
    def __init__(self, file: str, choose: Callable, workdir: pathlib.Path, overrides: Mapping[str, Any]):
        self._name = f"{choose.__name__}() in {file}"
        self._stages, self._workdir, self._overrides = read_stages(file), workdir, overrides

    def point(self, number: int, chosen: Mapping[str, Any]) -> Point:
        stages = {stage.name for stage in self._stages}
        for word in self._overrides:
            if taken := [key for key in chosen if overlap(word, key, stages)]:
                raise ValueError(f"{self._name} chooses {taken[0]}: leave {word}=... out of the command")
        try:
            return make_point(self._stages, self._workdir, number, chosen, self._overrides, None)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._name}: {error}") from error


class _Trials:
    def __init__(self, optuna, study, make: _PointMaker, choose: Callable, settings: Settings, metric: str):
        self._states = optuna.trial.TrialState
        self._study, self._make, self._choose = study, make, choose
        self._settings, self._metric = settings, metric
        self._one_at_a_time = threading.Lock()

    def run(self, trials: int) -> int:
        settings = self._settings
        ended = self._study.get_trials(deepcopy=False, states=(self._states.COMPLETE, self._states.PRUNED))
        missing = max(trials - len(ended), 0)
        with (
            Children(settings.child_options) as children,
            concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool,
        ):
            lost = [point for point in self._points(self._states.COMPLETE) if state_of(point).result is None]
            states = list(pool.map(lambda point: children.run_point(point, prefix=f"{point.number:03d}"), lost))
            states += pool.map(lambda _: self._run_trial(children), range(missing))
        points = self._points()
        if unique := list({point.name: point for point in points}.values()):
            print_line()
            write_summary(unique, settings.workdir, settings.metric, settings.direction)
        stopped = [RunState("not started")] if children.stopping else []
        return exit_status([state for state in states if state.name != "pruned"] + stopped)

    def _points(self, *states) -> list[Point]:
        """The points of all trials, or of those in one of these states."""
        attributes = [trial.user_attrs for trial in self._study.get_trials(states=states or None)]
        return [self._make.point(each["number"], each["overrides"]) for each in attributes if "overrides" in each]

    def _run_trial(self, children: Children) -> RunState:
        if children.stopping:
            return RunState("not started")
        trial = self._study.ask()
        overrides = dict(self._choose(trial))
        number = trial.user_attrs.get("number", trial.number)
        trial.set_user_attr("number", number)
        trial.set_user_attr("overrides", overrides)
        try:
            with self._one_at_a_time:
                point = self._make.point(number, overrides)
                check_points([point], data_dir=self._settings.data_dir, extend=self._settings.extend)
        except ValueError:
            self._study.tell(trial, state=self._states.FAIL)
            children.stop()
            raise
        watch = _Watch(trial, point, self._metric)
        prefix = f"{number:03d}"
        state = children.run_point(point, prefix=prefix, watch=watch)
        if state.result is not None:
            if self._metric not in state.result:
                raise unknown("--metric", self._metric, state.result)
            self._study.tell(trial, state.result[self._metric])
        elif watch.pruned:
            note_failure(point.runs[-1].workdir, "behind the median of the trials before it", PRUNED)
            state = state_of(point)
            self._study.tell(trial, state=self._states.PRUNED)
        elif state.name in ("failed", "stalled"):
            self._study.tell(trial, state=self._states.FAIL)
        print_line(f"{prefix} | {': '.join(filter(None, (state.name, state.detail)))}")
        return state


class _Watch:
    """Reports the evaluations of a running point to Optuna; calling it says whether to stop the point."""

    def __init__(self, trial, point: Point, metric: str):
        self._trial, self._path, self._key = trial, point.runs[-1].workdir / "metrics.jsonl", f"eval/{metric}"
        self._reported = -1
        self.pruned = False

    def __call__(self) -> bool:
        rows = read(self._path) if self._path.exists() else []
        for row in rows:
            if row["step"] > self._reported and row.get(self._key) is not None:
                self._reported = row["step"]
                self._trial.report(row[self._key], row["step"])
                self.pruned = self.pruned or self._trial.should_prune()
        return self.pruned


def _open_study(optuna, workdir: pathlib.Path, name: str, metric: str, direction: str) -> Any:
    """The study in `workdir`, which is created if it does not exist.

    Raises ValueError if it compares another metric, or in another direction: its values so far would mean nothing; and
    if the journal is damaged, or missing where there are trials.
    """
    journal = workdir / "study.journal"
    if not (journal.exists() and journal.stat().st_size) and (trials := sorted(workdir.glob("[0-9][0-9][0-9]_*"))):
        raise ValueError(
            f"{journal} is {'empty' if journal.exists() else 'missing'}, but {trials[0].name} is a trial of that "
            "study: put back a copy, or choose another --workdir"
        )
    try:
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal))),
            study_name=name,
            load_if_exists=True,
            direction=_OPTUNA_DIRECTIONS[direction],
            pruner=optuna.pruners.MedianPruner(),
        )
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{journal} is damaged: {error!r}. Put back a copy, or choose another --workdir") from error
    kept = study.user_attrs.get("metric", metric)  # journals of earlier versions do not name it
    kept_direction = next(short for short, long in _OPTUNA_DIRECTIONS.items() if long == study.direction.name.lower())
    if (kept, kept_direction) != (metric, direction):
        raise ValueError(
            f"the study in {workdir} compares {kept!r} ({kept_direction} is better), but --metric {metric} --direction "
            f"{direction} was asked for: leave them as they were, or choose another --workdir"
        )
    study.set_user_attr("metric", metric)
    _requeue_running(study, optuna.trial.TrialState)
    return study


def _check_words(study, overrides: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Raises ValueError if the study was begun with other overrides: its trials would not be comparable."""
    words = sorted(format_override(key, value) for key, value in overrides.items() if not _may_change(key))
    kept = study.user_attrs.get("overrides", words)  # journals of earlier versions do not name them
    if kept != words:
        raise ValueError(
            f"the study in {workdir} was begun with {' '.join(kept) or 'no overrides'}, not with "
            f"{' '.join(words) or 'none'}: its trials would not be comparable. Give the same ones, or choose another "
            "--workdir"
        )
    study.set_user_attr("overrides", words)


def _may_change(key: str) -> bool:
    """Whether a key, with or without the name of a stage, says how or where a training runs, not what is trained."""
    return key.endswith((".path", "data.source", *MAY_CHANGE))


def _requeue_running(study, states) -> None:
    """Queues trials again, with their numbers and folders, that were running when the study was stopped."""
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        number = trial.user_attrs.get("number", trial.number)
        study.enqueue_trial(trial.params, user_attrs={"number": number})
        study.tell(trial.number, state=states.FAIL)


def _import_optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ImportError("--study needs Optuna: pip install 'tinymim-jax[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
