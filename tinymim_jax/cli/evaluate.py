"""`tinymim evaluate`: losses and accuracies of a checkpoint, on the data of its run or on test suites."""

import argparse

from tinymim_jax.cli import suites
from tinymim_jax.cli.options import add_checkpoint, config_of, print_result, start_jax

HELP = "evaluate a checkpoint on its run's data or on test suites"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate`."""
    add_checkpoint(command)
    suites.add_arguments(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    suites.check(options)
    if options.suite:
        start_jax(options)
        return suites.run(options)
    config = config_of(options)
    start_jax(options)
    from tinymim_jax.evaluation.evaluate import evaluate_checkpoint

    print_result(evaluate_checkpoint(config, options.checkpoint, data_dir=options.data_dir, workers=options.workers))
    return 0
