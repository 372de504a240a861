"""`tinymim sweep --study`: Optuna chooses the points; trials that fall behind are stopped."""

import argparse
import concurrent.futures
import logging
import pathlib
import threading
from typing import Any

from tinymim_jax.errors import unknown
from tinymim_jax.metrics import read
from tinymim_jax.sweeps.children import note_failure
from tinymim_jax.sweeps.points import PRUNED, Point, State, parse_overrides, read_stages, state_of
from tinymim_jax.sweeps.running import child_options, exit_status, find_function, make_point, write_summary

log = logging.getLogger(__name__)


def run_study(options: argparse.Namespace, workdir: pathlib.Path) -> int:
    """Runs trials until there are --trials of them; returns the exit status. The study is kept in study.journal.

    Raises ImportError without Optuna, and ValueError where the first trial's overrides do not fit the config.
    """
    optuna = _optuna()
    if options.seeds:
        raise ValueError("--study draws its points once each: leave --seeds out, or yield the best of them in a sweep")
    choose, _ = find_function(options.file, "study", options.study)
    metric = options.metric or "top1"
    direction = options.direction or ("min" if "loss" in metric else "max")
    workdir.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(workdir / "study.journal"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=choose.__name__,
        load_if_exists=True,
        direction={"max": "maximize", "min": "minimize"}[direction],
        pruner=optuna.pruners.MedianPruner(),
    )
    _take_up(study, optuna.trial.TrialState)
    trials = _Trials(options, workdir, choose, study, metric)
    return trials.run(optuna)


class _Trials:
    def __init__(self, options: argparse.Namespace, workdir: pathlib.Path, choose, study, metric: str):
        self._options, self._workdir, self._metric = options, workdir, metric
        self._choose, self._study = choose, study
        self._stages, self._words = read_stages(options.file), parse_overrides(options.overrides)
        self._one_at_a_time = threading.Lock()

    def run(self, optuna) -> int:
        from tinymim_jax.sweeps.children import Children

        ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        missing = self._options.trials - len(self._study.get_trials(deepcopy=False, states=ended))
        with (
            Children(child_options(self._options)) as children,
            concurrent.futures.ThreadPoolExecutor(self._options.jobs) as pool,
        ):
            states = list(pool.map(lambda _: self._trial(children, optuna), range(max(missing, 0))))
        points = [
            self._point(trial, trial.user_attrs)
            for trial in self._study.get_trials()
            if "overrides" in trial.user_attrs
        ]
        unique = list({point.name: point for point in points}.values())
        if unique:
            print()
            write_summary(unique, self._workdir, self._options.metric, self._options.direction)
        stopped = [State("not started")] if children.stopping else []
        return exit_status([state for state in states if state.name != "pruned"] + stopped)

    def _trial(self, children, optuna) -> State:
        if children.stopping:
            return State("not started")
        from tinymim_jax.sweeps.checks import check_points

        trial = self._study.ask()
        overrides = dict(self._choose(trial))
        number = trial.user_attrs.get("number", trial.number)
        trial.set_user_attr("number", number)
        trial.set_user_attr("overrides", overrides)
        try:
            with self._one_at_a_time:
                point = self._point(trial, trial.user_attrs)
                check_points([point], data_dir=self._options.data_dir)
        except ValueError:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
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
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif state.name == "failed":
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        print(f"{prefix} | {state.name} {state.detail}".rstrip(), flush=True)
        return state

    def _point(self, trial, attributes: dict[str, Any]) -> Point:
        try:
            return make_point(
                self._stages, self._workdir, attributes["number"], attributes["overrides"], self._words, None
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._choose.__name__}() in {self._options.file}: {error}") from error


class _Watch:
    """Hands the evaluations of a running point to Optuna; calling it says whether to stop."""

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


def _take_up(study, states) -> None:
    """Trials that were running when the study was stopped are queued again, with their numbers and folders."""
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        number = trial.user_attrs.get("number", trial.number)
        study.enqueue_trial(trial.params, user_attrs={"number": number})
        study.tell(trial.number, state=states.FAIL)


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ImportError("--study needs Optuna: pip install 'tinymim-jax[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
