"""Trains all points that a config file yields, or one of them, and writes their table."""

import concurrent.futures
import dataclasses
import inspect
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tinymim_jax.runtime.exits import is_first
from tinymim_jax.runtime.locks import Busy
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import RunState
from tinymim_jax.sweeps.children import EXTEND, Children, note_failure
from tinymim_jax.sweeps.points import Point, Run, read_stages, state_of
from tinymim_jax.sweeps.running import (
    ONE_BY_ONE,
    exit_status,
    find_function,
    make_point,
    require_one_process,
    write_summary,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the points of a sweep or study are run and compared.

    workdir: each point has a folder in it.
    child_options: command-line words for each `tinymim train`.
    jobs: points at a time.
    metric, direction: what the table is sorted by, and whether "max" or "min" is better; None: chosen by what there is.
    """

    workdir: pathlib.Path
    child_options: Sequence[str] = ()
    data_dir: str | None = None
    jobs: int = 1
    metric: str | None = None
    direction: str | None = None

    @property
    def extend(self) -> bool:
        """Whether runs may be trained for longer than their workdirs say."""
        return EXTEND in self.child_options


def read_points(
    spec: str, name: str, workdir: pathlib.Path, words: Mapping[str, Any], seeds: int | None = None
) -> list[Point]:
    """The points of a sweep, those of seed 0 first; `words` apply to all of them.

    Raises ValueError for a key that no config has, with the number of the point.
    """
    stages = read_stages(spec)
    sweep, argument = find_function(spec, "sweep", name)
    yielded = list(sweep(argument) if inspect.signature(sweep).parameters else sweep())
    if not yielded:
        raise ValueError(f"{spec}: {sweep.__name__}() yields no points")
    _check_conflicts(yielded, words, {stage.name for stage in stages})
    points = []
    for seed in range(seeds) if seeds else [None]:
        for number, given in enumerate(yielded):
            try:
                points.append(make_point(stages, workdir, number, given, words, seed))
            except (ValueError, TypeError) as error:
                raise ValueError(f"point {number} of {sweep.__name__}() in {spec}: {error}") from error
    return points


def list_points(points: Sequence[Point], settings: Settings) -> int:
    """Prints the state of each point and, where some are finished, writes and prints their table. Exit status 0."""
    from tinymim_jax.sweeps.checks import check_points

    check_points(points, data_dir=settings.data_dir, need_data=False, extend=settings.extend)
    width = max(len(point.name) for point in points)
    states = [state_of(point) for point in points]
    for index, (point, state) in enumerate(zip(points, states, strict=True)):
        text = state.detail.split("\n")[0]
        if state.result is not None:
            text = ", ".join(f"{key} {value:.4g}" for key, value in state.result.items() if key != "examples")
        print(f"{index:4d}  {point.name:<{width}}  {state.name:<12} {text}".rstrip())
    if any(state.result for state in states):
        print()
        write_summary(points, settings.workdir, settings.metric, settings.direction)
    return 0


def run_index(points: Sequence[Point], index: int, settings: Settings, train: Callable[[Run], int]) -> int:
    """Runs one point and returns the exit status; for job arrays.

    A point of one training runs in this process, or in all processes of the job. A failure is noted in its workdir.

    Args:
      train: runs one training in this process and returns its exit status.
    """
    from tinymim_jax.sweeps.checks import check_overrides, check_points

    if not 0 <= index < len(points):
        raise ValueError(f"--index {index}: there are points 0 to {len(points) - 1}")
    check_overrides(points)
    point = points[index]
    log.info("point %d of %d: %s", index, len(points), point.name)
    only, *others = point.runs
    if others:
        require_one_process("a sweep over a chain", str(settings.workdir), ONE_BY_ONE)
        check_points([point], data_dir=settings.data_dir, extend=settings.extend)
        with Children(settings.child_options) as children:
            return exit_status([children.run_point(point)])
    try:
        return train(only)
    except Busy:
        raise
    except Exception as error:
        if is_first():
            note_failure(only.workdir, str(error))
        raise


def run_all(points: Sequence[Point], settings: Settings) -> int:
    """Checks all points, runs those that are not finished, writes the table, and returns the exit status."""
    from tinymim_jax.sweeps.checks import check_points

    check_points(points, data_dir=settings.data_dir, extend=settings.extend)
    log.info("all %d points can be built; each is trained in its own process, %d at a time", len(points), settings.jobs)
    with (
        Children(settings.child_options) as children,
        concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool,
    ):
        states = list(pool.map(lambda point: _run_point(children, point, settings.extend), points))
    print_line()
    write_summary(points, settings.workdir, settings.metric, settings.direction)
    return exit_status(states)


def _run_point(children: Children, point: Point, extend: bool) -> RunState:
    state = state_of(point)
    if children.stopping or (state.name == "finished" and not extend):
        return state
    prefix = f"{point.number:03d}" + ("" if point.seed is None else f" seed {point.seed}")
    state = children.run_point(point, prefix=prefix)
    print_line(f"{prefix} | {': '.join(filter(None, (state.name, state.detail)))}")
    return state


def _check_conflicts(yielded: Sequence[Any], words: Mapping[str, Any], stages: Collection[str]) -> None:
    """Raises ValueError if an override sets a key that differs between points, or if two points are equal."""
    given = [dict(point) for point in yielded if isinstance(point, Mapping)]
    for i, point in enumerate(given):
        if point in given[:i]:
            raise ValueError(f"points {given.index(point)} and {i} are the same: {point}")
    for key in words:
        for other in dict.fromkeys(name for point in given for name in point if overlap(key, name, stages)):
            if any(point.get(other) != given[0].get(other) for point in given):
                raise ValueError(f"{key} differs from point to point: it cannot be set for all of them")


def overlap(first: str, second: str, stages: Collection[str]) -> bool:
    """Could the two keys, with or without a stage's name, mean the same?"""
    (stage, key), (other_stage, other_key) = (
        name.split(".", 1) if name.split(".")[0] in stages else ("", name) for name in (first, second)
    )
    return key == other_key and (stage == other_stage or not stage or not other_stage)
