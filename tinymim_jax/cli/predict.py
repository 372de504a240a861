"""`tinymim predict`: the classes of image files, or of every pixel of them."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING

from tinymim_jax.cli.options import add_compile_cache
from tinymim_jax.runtime import exits
from tinymim_jax.runtime.startup import use_compile_cache

if TYPE_CHECKING:
    from tinymim_jax.evaluation.predictor import Model, Prediction

HELP = "classify images, or their pixels, with a fine-tuned checkpoint"

_EPILOG = """\
Prints a line for each image, in the order given, and for those in a folder in the order of their names. A file that
cannot be read or decoded is reported and the others are classified; the exit status is then 1. With --json:

  {"image": "cat.jpg", "predictions": [{"name": "Siamese", "index": 33, "probability": 0.91}, ...]}

"name" is the class name that was recorded in training or by convert --classes, and otherwise the index.

  tinymim predict runs/b_finetuned cat.jpg dog.jpg
  tinymim predict runs/b_finetuned photos --top 1 --json > classes.jsonl

With a checkpoint of the task `segment`, images of any size get a class for every pixel. For each, two files are written
to the folder of --output: NAME.png, class numbers with a palette, and NAME_overlay.jpg, their colours over the image.
The line, or with --json "shares", says how much of the image each class covers:

  tinymim predict runs/segment_b street.jpg --output masks
  tinymim predict runs/segment_b street.jpg --output masks --flip --scales 0.75 1 1.25
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `predict`."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("checkpoint", help="workdir of a run, a student in it, or what `tinymim convert` wrote")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes for each image (default 5)")
    command.add_argument("--json", action="store_true", help="one line of JSON for each image")
    pixels = command.add_argument_group("with a checkpoint that labels pixels")
    pixels.add_argument("--output", metavar="DIR", help="folder for the masks and overlays (default: segmented)")
    pixels.add_argument("--mode", help="slide: overlapping windows | whole: one window (default: as in its training)")
    pixels.add_argument("--flip", action="store_true", help="average with the mirrored image")
    pixels.add_argument("--scales", type=float, nargs="+", metavar="X", help="average over these relative sizes")
    add_compile_cache(command)


_OF_PIXELS = ("output", "mode", "flip", "scales")
_SHOWN = 6  # classes in a line of text


def run(options: argparse.Namespace) -> int:
    """Prints a line for each image; returns 1 where some could not be read."""
    if options.top < 1:
        raise ValueError(f"--top {options.top}: ask for at least one class")
    use_compile_cache(options.compile_cache)
    from tinymim_jax.evaluation.predictor import BATCH, load

    options.images = _files(options.images)
    model, status = load(options.checkpoint), exits.DONE
    given = [name for name in _OF_PIXELS if getattr(options, name)]
    if model.labels_pixels:
        return _segment(model, options)
    if given:
        raise ValueError(f"--{given[0]} is for checkpoints of the task segment; {options.checkpoint} is not one")
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


def _files(arguments: list[str]) -> list[str]:
    """The arguments, with the images in a folder in place of the folder."""
    from tinymim_jax.data.sources.layout import is_image

    found = []
    for argument in arguments:
        folder = pathlib.Path(argument).expanduser()
        if folder.is_dir():
            inside = sorted(str(path) for path in folder.iterdir() if is_image(path.name) and path.name[0] != ".")
            if not inside:
                raise ValueError(f"{argument} is a folder without images; images in folders below it are not taken")
            found += inside
        else:
            found.append(argument)
    return found


def _classified(model: "Model", images: list[str], top: int) -> list["list[Prediction] | Exception"]:
    """The predictions for each image, or the error where its file cannot be read or decoded."""
    try:
        return model.classify(images, top=top)
    except (ValueError, OSError) as error:
        if len(images) == 1:
            return [error]
        return [found for image in images for found in _classified(model, [image], top)]


def _segment(model: "Model", options: argparse.Namespace) -> int:
    """Writes a mask and an overlay of each image; returns 1 where some could not be read."""
    from tinymim_jax.evaluation.segmented import recorded_windows

    changes = {name: getattr(options, name) for name in ("mode", "flip") if getattr(options, name)}
    changes |= {"scales": tuple(options.scales)} if options.scales else {}
    windows = dataclasses.replace(recorded_windows(model.preprocessing), **changes)
    folder, status = pathlib.Path(options.output or "segmented").expanduser(), exits.DONE
    names = [pathlib.Path(image).stem for image in options.images]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"several images are called {twice[0]}, and would write the same files: predict them apart")
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(options.images, names):
        try:
            pixels = model.pixels(image)
        except (ValueError, OSError) as error:
            print(f"tinymim predict: {error}", file=sys.stderr)
            status = exits.ERROR
            continue
        found = model.segment(pixels, windows=windows)
        mask, overlay = folder / f"{name}.png", folder / f"{name}_overlay.jpg"
        found.mask().save(mask)
        found.overlay(pixels).save(overlay, quality=90)
        shares = {each: round(share, 4) for each, share in found.shares().items()}
        if options.json:
            print(json.dumps({"image": image, "mask": str(mask), "overlay": str(overlay), "shares": shares}))
        else:
            shown = ", ".join(f"{each} {share:.1%}" for each, share in list(shares.items())[:_SHOWN])
            print(f"{image}: {shown}{', ...' * (len(shares) > _SHOWN)} -> {mask}, {overlay}")
    return status
