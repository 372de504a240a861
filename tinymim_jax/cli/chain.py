"""`tinymim chain`: several trainings in a row, each with the checkpoint of an earlier one."""

import argparse

from tinymim_jax.cli.options import add_training, training_words

HELP = "train several stages in a row; run the same command again to resume"

_EPILOG = """\
A chain is a list in a config file. Each stage has a name, a config file (relative to this one) and overrides, in which
"{b}" is replaced by the workdir of stage b:

  def get_chain():
      return [
          ("b", "distill_b.py", {}),
          ("s", "distill_s.py", {"distill.teacher.name": "", "distill.teacher.path": "{b}"}),
          ("classifier", "finetune_s.py", {"init": "{s}"}),
      ]

Each stage is trained in DIR/NAME. KEY=VALUE applies to every stage that has the key, except where it takes the value
from an earlier stage; STAGE.KEY=VALUE applies to one stage only:

  tinymim chain configs/chain.py --workdir runs/chain distill.teacher.path=teachers/mae_vit_large b.optim.base_lr=1e-4

All stages are checked before the first one starts. The same command again resumes at the right stage and step.
Exit status: 0 done, 1 error or a stage failed, 75 stopped with everything saved. A sweep over a chain: tinymim sweep
--help.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `chain` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument(
        "file", metavar="FILE[:ARGUMENT]", help="file with get_chain(), or a shipped name, such as chain"
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="each stage has a folder here")
    add_training(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 done, 1 a stage failed, 75 stopped with everything saved."""
    from tinymim_jax.sweeps.chain import run_chain
    from tinymim_jax.sweeps.points import parse_overrides

    return run_chain(
        options.file,
        options.workdir,
        parse_overrides(options.overrides),
        child_options=training_words(options),
        data_dir=options.data_dir,
    )
