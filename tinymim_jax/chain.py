"""`tinymim chain`: several trainings in a row, each with the checkpoint of an earlier one."""

import argparse
import logging
import pathlib

from tinymim_jax.points import Point, State, from_words, plan, read_stages, run_state
from tinymim_jax.sweep import ONE_BY_ONE, child_options, exit_status, require_one_process

log = logging.getLogger(__name__)

_EPILOG = """\
A chain is a list in a config file. Each stage has a name, a config file (relative to this one) and overrides, in which
"{b}" stands for the workdir of stage b:

  def get_chain():
      return [
          ("b", "distill_b.py", {}),
          ("s", "distill_s.py", {"distill.teacher.name": "", "distill.teacher.path": "{b}"}),
          ("classifier", "finetune_s.py", {"init": "{s}"}),
      ]

Each stage is trained in DIR/NAME. A word KEY=VALUE holds for every stage that has the key, except where it takes the
value from an earlier stage; STAGE.KEY=VALUE for one stage alone:

  tinymim chain configs/chain.py --workdir runs/chain distill.teacher.path=teachers/mae_vit_large b.optim.base_lr=1e-4

All stages are checked before the first starts. Run the same command again to go on at the right stage and step. Exit
status: 0 done, 1 a stage failed, 75 stopped with all saved. A sweep over a chain: tinymim sweep --help.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `chain` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument("file", metavar="FILE[:ARGUMENT]", help="config file with get_chain(), as configs/chain.py")
    command.add_argument("--workdir", required=True, metavar="DIR", help="each stage has a folder here")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    from tinymim_jax.checks import check_points
    from tinymim_jax.children import Children

    stages = read_stages(options.file)
    if stages[0].name == "":
        raise ValueError(f"{options.file} has no function get_chain(); `tinymim chain --help` shows one")
    require_one_process("a chain", options.workdir, ONE_BY_ONE)
    workdir = pathlib.Path(options.workdir)
    point = Point("", 0, None, {}, {}, plan(stages, workdir, from_words(options.overrides)))
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
