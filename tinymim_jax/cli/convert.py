"""`tinymim convert`: reads a PyTorch checkpoint, without PyTorch."""

import argparse

HELP = "read a PyTorch checkpoint (.pth or .safetensors), without PyTorch"

FAMILIES = ("mae", "tinymim", "tinymim_star", "vit")  # convert.FAMILIES, which takes a second to import


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `convert` command."""
    command.add_argument("--from", dest="family", required=True, choices=FAMILIES, help="whose names it has")
    command.add_argument("--input", required=True, metavar="FILE")
    command.add_argument("--output", required=True, metavar="DIR")
    command.add_argument(
        "--heads", help="attention heads, one number or one for each block (2,2,2,4); default by width"
    )
    command.add_argument("--decoder_heads", type=int, metavar="N", help="of a full MAE file; default by width")
    command.add_argument(
        "--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="when the grid is not square"
    )


def run(options: argparse.Namespace) -> int:
    """Writes --output and prints what it holds."""
    from tinymim_jax.checkpoints.params import save_params
    from tinymim_jax.convert import convert_file

    image_size = tuple(options.image_size) if options.image_size else None
    model, params = convert_file(
        options.family,
        options.input,
        heads=options.heads,
        decoder_heads=options.decoder_heads,
        image_size=image_size,
    )
    save_params(options.output, params, model)
    encoder = model["encoder"]
    parts = "encoder" + ", decoder" * ("decoder" in model) + ", classifier" * ("classifier" in model)
    print(
        f"{options.output}: {parts}; width {encoder['embed_dim']}, {encoder['depth']} blocks, heads {encoder['heads']}"
    )
    return 0
