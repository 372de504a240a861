"""`tinymim export`: writes a checkpoint for other programs."""

import argparse
import sys

HELP = "write a checkpoint with PyTorch's names, as .safetensors"

# The keys of convert.FORMATS: importing that package would make --help slow.
FORMATS = ("mae", "tinymim", "vit", "tinymim_star")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `export` command."""
    command.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    command.add_argument(
        "--to",
        dest="format",
        required=True,
        choices=FORMATS,
        help="which model's tensor names to use: those of MAE's or TinyMIM's release, of TinyMIM*-T, or of timm (vit). "
        "The file's metadata have head counts, preprocessing and class names, which `tinymim convert` reads back",
    )
    command.add_argument("--output", required=True, metavar="FILE.safetensors")


def run(options: argparse.Namespace) -> int:
    """Writes --output; warnings go to standard error."""
    from tinymim_jax.checkpoints.params import load_params
    from tinymim_jax.convert import FORMATS

    model, params = load_params(options.checkpoint)
    for warning in FORMATS[options.format](options.output, model, params):
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"{options.output}: {options.format} names, as PyTorch loads them with safetensors.torch.load_file")
    return 0
