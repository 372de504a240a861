"""`tinymim export`: writes a checkpoint for other programs."""

import argparse

from tinymim_jax.cli.convert import FAMILIES

HELP = "write a checkpoint with PyTorch's names, as .safetensors"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `export` command."""
    command.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    command.add_argument("--to", dest="family", required=True, choices=FAMILIES, help="whose names to use")
    command.add_argument("--output", required=True, metavar="FILE.safetensors")


def run(options: argparse.Namespace) -> int:
    """Writes --output."""
    from tinymim_jax.checkpoints.params import load_params
    from tinymim_jax.convert import to_safetensors, to_torch

    model, params = load_params(options.checkpoint)
    to_safetensors(options.output, to_torch(options.family, model, params))
    print(f"{options.output}: {options.family} names, as PyTorch loads them with safetensors.torch.load_file")
    return 0
