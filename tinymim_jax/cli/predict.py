"""`tinymim predict`: the classes of image files."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tinymim_jax.cli.options import add_compile_cache
from tinymim_jax.runtime import exits
from tinymim_jax.runtime.startup import use_compile_cache

if TYPE_CHECKING:
    from tinymim_jax.evaluation.predictor import Model, Prediction

HELP = "classify image files with a fine-tuned checkpoint"

_EPILOG = """\
Prints a line for each image, in the order given. A file that cannot be read or decoded is reported and the others are
classified; the exit status is then 1. With --json:

  {"image": "cat.jpg", "predictions": [{"name": "Siamese", "index": 33, "probability": 0.91}, ...]}

"name" is the class name that was recorded in training or by convert --classes, and otherwise the index.

  tinymim predict runs/b_finetuned cat.jpg dog.jpg
  tinymim predict runs/b_finetuned photos/*.jpg --top 1 --json > classes.jsonl
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `predict`."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes for each image (default 5)")
    command.add_argument("--json", action="store_true", help="one line of JSON for each image")
    add_compile_cache(command)


def run(options: argparse.Namespace) -> int:
    """Prints a line for each image; returns 1 where some could not be read."""
    if options.top < 1:
        raise ValueError(f"--top {options.top}: ask for at least one class")
    use_compile_cache(options.compile_cache)
    from tinymim_jax.evaluation.predictor import BATCH, load

    model, status = load(options.checkpoint), exits.DONE
    model.classifier()  # says at once where there is none
    for start in range(0, len(options.images), BATCH):
        images = options.images[start : start + BATCH]
        for image, found in zip(images, _classified(model, images, options.top)):
            if isinstance(found, Exception):
                print(f"tinymim predict: {found}", file=sys.stderr)
                status = exits.ERROR
            elif options.json:
                print(json.dumps({"image": image, "predictions": [each._asdict() for each in found]}))
            else:
                print(f"{image}: " + ", ".join(f"{each.name} {each.probability:.1%}" for each in found))
    return status


def _classified(model: "Model", images: list[str], top: int) -> list["list[Prediction] | Exception"]:
    """The predictions for each image, or the error where its file cannot be read or decoded."""
    try:
        return model.classify(images, top=top)
    except (ValueError, OSError) as error:
        if len(images) == 1:
            return [error]
        return [found for image in images for found in _classified(model, [image], top)]
