"""`tinymim predict`: the classes of image files."""

import argparse
import json

from tinymim_jax.cli.options import add_compile_cache
from tinymim_jax.runtime.startup import use_compile_cache

HELP = "the classes that a fine-tuned checkpoint sees in images"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `predict` command."""
    command.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes to name for each (default 5)")
    command.add_argument("--json", action="store_true", help="one JSON line for each image")
    add_compile_cache(command)


def run(options: argparse.Namespace) -> int:
    """Prints a line for each image."""
    use_compile_cache(options.compile_cache)
    from tinymim_jax.evaluation.predictor import load

    model = load(options.checkpoint)
    for image, predictions in zip(options.images, model.classify(options.images, top=options.top)):
        if options.json:
            print(json.dumps({"image": image, "predictions": [each._asdict() for each in predictions]}))
        else:
            print(f"{image}: " + ", ".join(f"{each.name} {each.probability:.1%}" for each in predictions))
    return 0
