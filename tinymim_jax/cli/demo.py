"""`tinymim demo`: the whole method on handwritten digits."""

import argparse

from tinymim_jax.cli.options import add_compile_cache
from tinymim_jax.runtime.startup import use_compile_cache

HELP = "the whole method on handwritten digits, in minutes on two cores"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `demo` command."""
    command.add_argument("--workdir", default="runs/demo", help="where it is kept (default runs/demo)")
    command.add_argument("--seeds", type=int, default=3, help="runs of each fine-tuning (default 3)")
    add_compile_cache(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    from tinymim_jax.demo.demo import demo

    use_compile_cache(options.compile_cache)
    demo(options.workdir, seeds=options.seeds, compile_cache=options.compile_cache)
    return 0
