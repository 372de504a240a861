"""`tinymim sweep`: the points that a config file yields, trained here or one by one elsewhere, and their table."""

import argparse
import concurrent.futures
import inspect
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tinymim_jax.config import load_file
from tinymim_jax.errors import unknown
from tinymim_jax.exits import DONE, ERROR, PREEMPTED, is_first
from tinymim_jax.heartbeat import is_remote
from tinymim_jax.hosts import find_job
from tinymim_jax.locks import Busy
from tinymim_jax.points import Point, State, folder_name, from_words, plan, read_stages, state_of

log = logging.getLogger(__name__)

ONE_BY_ONE = "train the stages one after another with `tinymim train`, each of them over all processes"

_NOTE = "note."

_EPILOG = """\
A sweep is a generator in a config file, beside its get_config() (or get_chain(), see `tinymim chain --help`):

  def sweep():
      for lr in (1e-3, 2e-3):
          for drop_path in (0.0, 0.1):
              yield {"optim.base_lr": lr, "model.drop_path": drop_path}

Others are named sweep_<NAME> and chosen with --sweep NAME. One with a parameter is given FILE's ARGUMENT. A key that
begins with "note." is no override but a column of the table: {"model.depth": 12, "note.paper": 83.0}.
Words KEY=VALUE hold for all points. In a chain, STAGE.KEY is meant for one stage.

  tinymim sweep configs/my.py --workdir runs/my --list
  tinymim sweep configs/my.py --workdir runs/my --run local --seeds 3 --jobs 2
  sbatch --array=0-11 launch/slurm.sbatch sweep configs/my.py --workdir runs/my --seeds 3

All points are checked before anything starts. Run the same command again to go on: finished points are left alone,
interrupted ones resume, failed ones are tried again. The table (table.md, .csv, .json and .png in --workdir) is written
at the end of --run and by --list. Exit status: 0 all finished, 1 some failed, 75 stopped with all saved.

With Optuna (pip install 'tinymim-jax[optuna]') the file has `def study(trial): return {"optim.base_lr":
trial.suggest_float("lr", 1e-4, 1e-2, log=True)}`, others named study_<NAME>:

  tinymim sweep configs/my.py --workdir runs/my_study --study study --trials 20

Trials that fall behind the median of the others, by the evaluations that they make on the way (train.eval_every), are
stopped.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `sweep` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument("file", metavar="FILE[:ARGUMENT]", help="config file with get_config() or get_chain()")
    command.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the file (default: sweep)")
    command.add_argument("--workdir", required=True, metavar="DIR", help="each point has a folder here")
    mode = command.add_mutually_exclusive_group(required=True)
    mode.add_argument("--list", action="store_true", help="points, their states and results; writes the table too")
    mode.add_argument("--run", dest="where", choices=("local",), help="run all points on this machine")
    mode.add_argument("--index", type=int, metavar="N", help="run one point: for job arrays. Exit status as of train")
    mode.add_argument("--study", metavar="NAME", help="let Optuna choose the points")
    command.add_argument("--trials", type=int, default=20, metavar="N", help="of --study, in all (default 20)")
    command.add_argument("--seeds", type=int, metavar="N", help="run each point with seed=0 to N-1")
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="points at a time, on the same CPUs or GPU (default 1)"
    )
    command.add_argument("--metric", metavar="NAME", help="figure to sort by (default top1, or else loss)")
    command.add_argument(
        "--direction", choices=("max", "min"), help="which is better (default: min for losses, max for others)"
    )


def run(options: argparse.Namespace, train: Callable[[argparse.Namespace], int]) -> int:
    """Returns the exit status; `train` is the `train` command, which --index becomes."""
    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        raise ValueError("--jobs and --seeds are counted from 1")
    workdir = pathlib.Path(options.workdir)
    if options.index is None and not options.list:
        remedy = "run its points one by one with --index N, each of them over all processes"
        require_one_process("--study" if options.study is not None else "--run local", options.workdir, remedy)
    if options.study is not None:
        from tinymim_jax.study import run_study

        return run_study(options, workdir)
    points = read_points(options.file, options.sweep, workdir, from_words(options.overrides), options.seeds)
    if options.list:
        return _list(points, options, workdir)
    if options.index is not None:
        return _run_one(points, options, train)
    return _run_all(points, options, workdir)


def read_points(
    spec: str, name: str, workdir: pathlib.Path, words: Mapping[str, Any], seeds: int | None = None
) -> list[Point]:
    """The points of a sweep, those of seed 0 first; `words` hold for all of them.

    Raises ValueError for a key that no config has, with the number of the point.
    """
    stages = read_stages(spec)
    sweep, argument = find_function(spec, "sweep", name)
    yielded = list(sweep(argument) if inspect.signature(sweep).parameters else sweep())
    if not yielded:
        raise ValueError(f"{spec}: {sweep.__name__}() yields no points")
    _check_words(yielded, words, {stage.name for stage in stages})
    points = []
    for seed in range(seeds) if seeds else [None]:
        for number, given in enumerate(yielded):
            try:
                points.append(make_point(stages, workdir, number, given, words, seed))
            except (ValueError, TypeError) as error:
                raise ValueError(f"point {number} of {sweep.__name__}() in {spec}: {error}") from error
    return points


def make_point(
    stages: Sequence, workdir: pathlib.Path, number: int, given: Any, words: Mapping[str, Any], seed: int | None
) -> Point:
    """One point from what a sweep yields or a study returns. Raises ValueError for keys that no config has."""
    if not isinstance(given, Mapping):
        raise TypeError(f"yielded {given!r}; a point is a dict of overrides, such as {{'optim.base_lr': 1e-3}}")
    overrides = {key: value for key, value in given.items() if not key.startswith(_NOTE)}
    notes = {key.removeprefix(_NOTE): value for key, value in given.items() if key.startswith(_NOTE)}
    if seed is not None and "seed" in overrides:
        raise ValueError("it sets the seed itself: leave --seeds out")
    name = folder_name(number, overrides, seed)
    seeded = {} if seed is None else {"seed": seed}
    return Point(name, number, seed, overrides, notes, plan(stages, workdir / name, overrides, words, seeded))


def find_function(spec: str, kind: str, name: str) -> tuple[Callable, str]:
    """The function KIND, or KIND_NAME, of FILE[:ARGUMENT], and the argument."""
    module, argument = load_file(spec)
    functions = [f for f in dir(module) if (f == kind or f.startswith(f"{kind}_")) and callable(getattr(module, f))]
    for function in (name, f"{kind}_{name}"):
        if function in functions:
            return getattr(module, function), argument
    if not functions:
        raise ValueError(f"{spec} has no function {kind}(); `tinymim sweep --help` shows one")
    raise unknown(f"--{kind}", name, functions)


def report(points: Sequence[Point], workdir: pathlib.Path, metric: str | None, direction: str | None) -> None:
    """Writes the table of what is finished, and prints it with the reasons of what failed."""
    from tinymim_jax.tables import write_table

    states = {point.name: state_of(point) for point in points}
    print(write_table(points, states, workdir, metric=metric, direction=direction))
    for point in points:
        if states[point.name].name == "failed":
            print(f"\n{point.name} failed: {states[point.name].detail}")


def exit_status(states: Sequence[State]) -> int:
    """Of a command that ran them all."""
    names = {state.name for state in states}
    if names & {"interrupted", "not started", "running"}:
        return PREEMPTED
    return ERROR if "failed" in names else DONE


def require_one_process(what: str, workdir: str, remedy: str) -> None:
    """Raises ValueError for a job of several processes, or a bucket."""
    job = find_job()
    if (job.processes or 1) > 1:
        raise ValueError(f"{what} is for one process, but {job.said_by} says {job.processes}: {remedy}")
    if is_remote(workdir):
        raise ValueError(f"--workdir {workdir}: {what} needs a folder; `tinymim train` takes gs:// as well")


def child_options(options: argparse.Namespace) -> list[str]:
    """The words with which options that say where a run happens are handed to `tinymim train`."""
    words = ["--workers", str(options.workers), "--fsdp", str(options.fsdp), "--compile_cache", options.compile_cache]
    words += ["--stall_minutes", str(options.stall_minutes)]
    return words + (["--data_dir", options.data_dir] if options.data_dir else [])


def _list(points: list[Point], options: argparse.Namespace, workdir: pathlib.Path) -> int:
    from tinymim_jax.checks import check_points

    check_points(points, data_dir=options.data_dir, need_data=False)
    width = max(len(point.name) for point in points)
    for index, point in enumerate(points):
        state = state_of(point)
        said = state.detail.split("\n")[0]
        if state.result is not None:
            said = ", ".join(f"{key} {value:.4g}" for key, value in state.result.items() if key != "examples")
        print(f"{index:4d}  {point.name:<{width}}  {state.name:<12} {said}".rstrip())
    if any(state_of(point).result for point in points):
        print()
        report(points, workdir, options.metric, options.direction)
    return 0


def _run_one(points: list[Point], options: argparse.Namespace, train: Callable[[argparse.Namespace], int]) -> int:
    from tinymim_jax.checks import check_points, check_words
    from tinymim_jax.children import Children, record

    if not 0 <= options.index < len(points):
        raise ValueError(f"--index {options.index}: there are points 0 to {len(points) - 1}")
    check_words(points)
    point = points[options.index]
    log.info("point %d of %d: %s", options.index, len(points), point.name)
    if len(point.runs) > 1:
        require_one_process("a sweep over a chain", options.workdir, ONE_BY_ONE)
        check_points([point], data_dir=options.data_dir)
        with Children(child_options(options)) as children:
            return exit_status([children.run_point(point)])
    (only,) = point.runs
    options.config, options.overrides, options.workdir = only.config, only.words, str(only.workdir)
    try:
        return train(options)
    except Busy:
        raise
    except Exception as error:
        if is_first():
            record(only.workdir, str(error))
        raise


def _run_all(points: list[Point], options: argparse.Namespace, workdir: pathlib.Path) -> int:
    from tinymim_jax.checks import check_points
    from tinymim_jax.children import Children

    check_points(points, data_dir=options.data_dir)
    log.info("%d points are sound; each is trained in a process of its own, %d at a time", len(points), options.jobs)
    with (
        Children(child_options(options)) as children,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        states = list(pool.map(lambda point: _run_point(children, point), points))
    print()
    report(points, workdir, options.metric, options.direction)
    return exit_status(states)


def _run_point(children, point: Point) -> State:
    if children.stopping or state_of(point).name == "finished":
        return state_of(point)
    prefix = f"{point.number:03d}" + ("" if point.seed is None else f" seed {point.seed}")
    state = children.run_point(point, prefix=prefix)
    print(f"{prefix} | {state.name} {state.detail}".rstrip(), flush=True)
    return state


def _check_words(yielded: Sequence[Any], words: Mapping[str, Any], stages: Collection[str]) -> None:
    """Words behind the command win over what points set, which must not undo the sweep; and no two points are equal."""
    given = [dict(point) for point in yielded if isinstance(point, Mapping)]
    for i, point in enumerate(given):
        if point in given[:i]:
            raise ValueError(f"points {given.index(point)} and {i} are the same: {point}")
    for key in words:
        for other in dict.fromkeys(name for point in given for name in point if _overlap(key, name, stages)):
            if any(point.get(other) != given[0].get(other) for point in given):
                raise ValueError(f"{key} differs from point to point: it cannot be set for all of them")


def _overlap(first: str, second: str, stages: Collection[str]) -> bool:
    """Could the two keys, with or without a stage's name, mean the same?"""
    (stage, key), (other_stage, other_key) = (
        name.split(".", 1) if name.split(".")[0] in stages else ("", name) for name in (first, second)
    )
    return key == other_key and (stage == other_stage or not stage or not other_stage)
