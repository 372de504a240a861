"""`tinymim train`: runs an experiment, or resumes it."""

import argparse
import logging

from tinymim_jax.cli.options import add_training, start_jax
from tinymim_jax.runtime import exits

HELP = "run an experiment; run the same command again to resume it"

_EPILOG = """\
The same command again resumes the run. Its config must not have changed, nor the teacher, the class names and the
number of images. But train.log_every, train.eval_every, checkpoint.* and the like may change, the data may have moved,
and with --extend the training may become longer (tinymim_jax/resume.py lists the keys).

Ctrl-C, SIGTERM and SIGHUP: it saves after the current step and stops. Exit status: 0 finished, 1 error, 75 stopped with
everything saved, 86 stalled, 130 ended by a second Ctrl-C.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `train` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="experiment: a file or a shipped name, such as distill_b",
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="folder of this run, or gs://BUCKET/PATH")
    add_training(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 finished, 75 stopped with everything saved."""
    from tinymim_jax.config import load_config

    config = load_config(options.config, options.overrides)
    start_jax(options, resumable=True)
    from tinymim_jax.train import train

    where = {"data_dir": options.data_dir, "workers": options.workers, "fsdp": options.fsdp, "extend": options.extend}
    try:
        train(config, options.workdir, stall_minutes=options.stall_minutes, loggers=options.log, **where)
    except exits.Interrupted as stop:
        if exits.is_first():
            logging.getLogger("tinymim_jax").warning("%s", stop)
        return exits.PREEMPTED
    return exits.DONE
