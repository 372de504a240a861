"""Several trainings in a row, each of which may start from a checkpoint of an earlier one."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tinymim_jax.markdown import markdown_table
from tinymim_jax.runtime.files import write_text
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import RunState, read_state
from tinymim_jax.sweeps.children import EXTEND, Children
from tinymim_jax.sweeps.points import Point, make_runs, read_stages
from tinymim_jax.sweeps.running import ONE_BY_ONE, exit_status, require_one_process

log = logging.getLogger(__name__)


def run_chain(
    file: str,
    workdir: str,
    overrides: Mapping[str, Any],
    *,
    child_options: Sequence[str] = (),
    data_dir: str | None = None,
) -> int:
    """Checks all stages of FILE[:ARGUMENT], trains those that are not finished, and writes table.md and report.html.

    Args:
      workdir: stage NAME is trained in workdir/NAME. A folder, `~` allowed.
      overrides: by key, or by STAGE.KEY.
      child_options: command-line arguments for each `tinymim train`.

    Returns the exit status. Raises ValueError for a stage that cannot be built.
    """
    from tinymim_jax.reports.write import write_at_end
    from tinymim_jax.sweeps.checks import check_points

    stages = read_stages(file)
    if stages[0].name == "":
        raise ValueError(f"{file} has no function get_chain(); `tinymim chain --help` shows one")
    require_one_process("a chain", workdir, ONE_BY_ONE)
    folder = pathlib.Path(workdir).expanduser()
    point = Point("", 0, None, {}, {}, make_runs(stages, folder, overrides))
    check_points([point], data_dir=data_dir, extend=EXTEND in child_options)
    log.info("all %d stages can be built: %s", len(stages), ", ".join(stage.name for stage in stages))
    with Children(child_options) as children:
        state = children.run_point(point)
    text = table([(run.name, read_state(run.workdir)) for run in point.runs])
    write_text(folder / "table.md", text + "\n")
    print_line(f"\n{text}")
    write_at_end(folder)
    if state.name in ("failed", "stalled"):
        print_line(f"\n{state.detail}")
    return exit_status([state])


def table(states: Sequence[tuple[str, RunState]]) -> str:
    """Markdown: stage, state, and the figures of its last evaluation."""
    rows = []
    for name, state in states:
        figures = {key: value for key, value in (state.result or {}).items() if key != "examples"}
        text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) or state.detail.split("\n")[0]
        rows.append([name, state.name, text])
    return markdown_table(["stage", "state", "result"], rows)
