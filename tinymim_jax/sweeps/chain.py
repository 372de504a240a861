"""Several trainings in a row, each with the checkpoint of an earlier one."""

import argparse
import logging
import pathlib

from tinymim_jax.sweeps.points import Point, State, make_runs, parse_overrides, read_stages, run_state
from tinymim_jax.sweeps.running import ONE_BY_ONE, child_options, exit_status, require_one_process

log = logging.getLogger(__name__)


def run_chain(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    from tinymim_jax.sweeps.checks import check_points
    from tinymim_jax.sweeps.children import Children

    stages = read_stages(options.file)
    if stages[0].name == "":
        raise ValueError(f"{options.file} has no function get_chain(); `tinymim chain --help` shows one")
    require_one_process("a chain", options.workdir, ONE_BY_ONE)
    workdir = pathlib.Path(options.workdir)
    point = Point("", 0, None, {}, {}, make_runs(stages, workdir, parse_overrides(options.overrides)))
    check_points([point], data_dir=options.data_dir)
    log.info("%d stages are sound: %s", len(stages), ", ".join(stage.name for stage in stages))
    with Children(child_options(options)) as children:
        state = children.run_point(point)
    text = table([(run.name, run_state(run)) for run in point.runs])
    (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    if state.name == "failed":
        print(f"\n{state.detail}")
    return exit_status([state])


def table(states: list[tuple[str, State]]) -> str:
    """Markdown: stage, state, and the figures of its last evaluation."""
    lines = ["| stage | state | result |", "|---|---|---|"]
    for name, state in states:
        figures = {key: value for key, value in (state.result or {}).items() if key != "examples"}
        said = ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) or state.detail.split("\n")[0]
        lines.append(f"| {name} | {state.name} | {said.replace('|', '/')} |")
    return "\n".join(lines)
