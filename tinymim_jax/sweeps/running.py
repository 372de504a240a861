"""What sweeps, chains and Optuna studies share: making points, the final summary, the exit status."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinymim_jax.config import load_file
from tinymim_jax.errors import unknown
from tinymim_jax.runtime.exits import DONE, ERROR, PREEMPTED
from tinymim_jax.runtime.files import is_remote
from tinymim_jax.runtime.hosts import find_job
from tinymim_jax.runtime.paths import check_output_path
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import RunState
from tinymim_jax.sweeps.points import Point, folder_name, make_runs, state_of
from tinymim_jax.sweeps.tables import write_table

ONE_BY_ONE = "train the stages one after another with `tinymim train`, each of them over all processes"

_NOTE = "note."


def make_point(
    stages: Sequence, workdir: pathlib.Path, number: int, given: Any, words: Mapping[str, Any], seed: int | None
) -> Point:
    """A point from what a sweep yields or a study returns.

    Args:
      given: overrides by key; keys that begin with "note." are columns of the table instead.
      words: overrides from the command line, which hold for all points.

    Raises ValueError for keys that no config has.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"yielded {given!r}; a point is a dict of overrides, such as {{'optim.base_lr': 1e-3}}")
    overrides = {key: value for key, value in given.items() if not key.startswith(_NOTE)}
    notes = {key.removeprefix(_NOTE): value for key, value in given.items() if key.startswith(_NOTE)}
    if seed is not None and "seed" in overrides:
        raise ValueError("it sets the seed itself: leave --seeds out")
    name = folder_name(number, overrides, seed)
    seeded = {} if seed is None else {"seed": seed}
    return Point(name, number, seed, overrides, notes, make_runs(stages, workdir / name, overrides, words, seeded))


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


def write_summary(points: Sequence[Point], workdir: pathlib.Path, metric: str | None, direction: str | None) -> None:
    """Writes the table of the finished points and report.html; prints the table, and why points failed."""
    from tinymim_jax.reports.write import write_at_end

    states = {point.name: state_of(point) for point in points}
    print_line(write_table(points, states, workdir, metric=metric, direction=direction))
    write_at_end(workdir)
    for point in points:
        if states[point.name].name in ("failed", "stalled"):
            print_line(f"\n{point.name} {states[point.name].name}: {states[point.name].detail}")


def exit_status(states: Sequence[RunState]) -> int:
    """The exit status of a command that ran all of these: 75 if some can be resumed, else 1 if some failed, else 0."""
    names = {state.name for state in states}
    if names & {"interrupted", "not started", "running"}:
        return PREEMPTED
    return ERROR if names & {"failed", "stalled"} else DONE


def require_one_process(what: str, workdir: str, remedy: str, *, option: str = "--workdir") -> None:
    """Raises ValueError in a job of several processes, for a bucket, or for a folder that cannot hold checkpoints."""
    job = find_job()
    if (job.processes or 1) > 1:
        raise ValueError(f"{what} is for one process, but {job.said_by} says {job.processes}: {remedy}")
    require_folder(what, workdir, option=option)


def require_folder(what: str, workdir: str, *, option: str = "--workdir") -> None:
    """Raises ValueError for a bucket, or for a folder that cannot hold checkpoints."""
    if is_remote(workdir):
        raise ValueError(f"{option} {workdir}: {what} needs a folder; `tinymim train` takes gs:// as well")
    check_output_path(workdir, option)
