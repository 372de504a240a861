"""`tinymim demo`: the whole method on handwritten digits, or segmentation of generated shapes."""

import argparse

from tinymim_jax.cli.options import add_compile_cache
from tinymim_jax.runtime.startup import use_compile_cache

HELP = "the whole method on handwritten digits, in minutes on two cores; or segmentation of shapes, in one"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `demo` command."""
    command.add_argument(
        "--segment", action="store_true", help="instead: label the pixels of generated pictures of shapes"
    )
    command.add_argument("--workdir", help="where it is kept (default runs/demo, or runs/demo_segment with --segment)")
    command.add_argument("--seeds", type=int, default=3, help="runs of each fine-tuning on the digits (default 3)")
    add_compile_cache(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    use_compile_cache(options.compile_cache)
    if options.segment:
        from tinymim_jax.demo.segment import demo_segment

        demo_segment(options.workdir or "runs/demo_segment")
        return 0
    from tinymim_jax.demo.demo import demo

    demo(options.workdir or "runs/demo", seeds=options.seeds, compile_cache=options.compile_cache)
    return 0
