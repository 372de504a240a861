"""`tinymim replay`: one step of a run again, with its images, their losses, and the gradient of each layer."""

import argparse

from tinymim_jax.cli.options import add_runtime, start_jax

HELP = "compute one step of a run again: its images, the loss of each, the gradient norm of each layer"

_EPILOG = """\
A step is a function of the weights and its number, so it can be computed again: from the newest checkpoint before it,
or from the initial weights where there is none, with the steps in between. Nothing in the workdir is changed but its
folder replay/, which gets step_N.html and step_N.json. A run that stops because its loss is not finite does this by
itself for the first step that was not.

  tinymim replay runs/b --step 12000
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `replay`."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("workdir", metavar="RUN", help="workdir of a run")
    command.add_argument("--step", type=int, required=True, metavar="N", help="step of the run, counted from 1")
    command.add_argument("--output", metavar="DIR", help="folder for the results (default: RUN/replay)")
    add_runtime(command)


def run(options: argparse.Namespace) -> int:
    """Prints what the step was like and where its page is."""
    start_jax(options)
    import jax
    from etils import epath

    from tinymim_jax.analysis.replay import replay
    from tinymim_jax.analysis.steps import describe_step, write_step
    from tinymim_jax.runtime.workdir import REPLAY

    if jax.process_count() > 1:
        raise ValueError("a step is replayed in one process: start `tinymim replay` once, on one host")
    step = replay(options.workdir, options.step, data_dir=options.data_dir, workers=options.workers)
    folder = epath.Path(options.workdir).expanduser()
    path = write_step(step, epath.Path(options.output or folder / REPLAY).expanduser(), folder.name)
    print(f"{describe_step(step)}\n{path}")
    return 0
