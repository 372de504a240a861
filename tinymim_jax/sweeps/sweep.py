"""Trains the points that a config file yields, here or one by one elsewhere, and writes their table."""

import argparse
import concurrent.futures
import inspect
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tinymim_jax.runtime.exits import is_first
from tinymim_jax.runtime.locks import Busy
from tinymim_jax.sweeps.points import Point, State, parse_overrides, read_stages, state_of
from tinymim_jax.sweeps.running import (
    ONE_BY_ONE,
    child_options,
    exit_status,
    find_function,
    make_point,
    require_one_process,
    write_summary,
)

log = logging.getLogger(__name__)


def run_sweep(options: argparse.Namespace, train: Callable[[argparse.Namespace], int]) -> int:
    """Returns the exit status; `train` is the `train` command, which --index becomes."""
    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        raise ValueError("--jobs and --seeds are counted from 1")
    workdir = pathlib.Path(options.workdir)
    if options.index is None and not options.list:
        remedy = "run its points one by one with --index N, each of them over all processes"
        require_one_process("--study" if options.study is not None else "--run local", options.workdir, remedy)
    if options.study is not None:
        from tinymim_jax.sweeps.optuna_study import run_study

        return run_study(options, workdir)
    points = read_points(options.file, options.sweep, workdir, parse_overrides(options.overrides), options.seeds)
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


def _list(points: list[Point], options: argparse.Namespace, workdir: pathlib.Path) -> int:
    from tinymim_jax.sweeps.checks import check_points

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
        write_summary(points, workdir, options.metric, options.direction)
    return 0


def _run_one(points: list[Point], options: argparse.Namespace, train: Callable[[argparse.Namespace], int]) -> int:
    from tinymim_jax.sweeps.checks import check_points, check_words
    from tinymim_jax.sweeps.children import Children, note_failure

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
    options.config, options.overrides, options.workdir = only.config, only.overrides, str(only.workdir)
    try:
        return train(options)
    except Busy:
        raise
    except Exception as error:
        if is_first():
            note_failure(only.workdir, str(error))
        raise


def _run_all(points: list[Point], options: argparse.Namespace, workdir: pathlib.Path) -> int:
    from tinymim_jax.sweeps.checks import check_points
    from tinymim_jax.sweeps.children import Children

    check_points(points, data_dir=options.data_dir)
    log.info("%d points are sound; each is trained in a process of its own, %d at a time", len(points), options.jobs)
    with (
        Children(child_options(options)) as children,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        states = list(pool.map(lambda point: _run_point(children, point), points))
    print()
    write_summary(points, workdir, options.metric, options.direction)
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
