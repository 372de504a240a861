"""`tinymim convert` and `tinymim export`: PyTorch's files in and out, without PyTorch."""

import argparse

_FAMILIES = ("mae", "tinymim", "tinymim_star", "vit")  # convert.FAMILIES, which takes a second to import


def add_convert_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from", dest="family", required=True, choices=_FAMILIES, help="whose names it has")
    command.add_argument("--input", required=True, metavar="FILE")
    command.add_argument("--output", required=True, metavar="DIR")
    command.add_argument(
        "--heads", help="attention heads, one number or one for each block (2,2,2,4); default by width"
    )
    command.add_argument("--decoder_heads", type=int, metavar="N", help="of a full MAE file; default by width")
    command.add_argument(
        "--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="when the grid is not square"
    )


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    command.add_argument("--to", dest="family", required=True, choices=_FAMILIES, help="whose names to use")
    command.add_argument("--output", required=True, metavar="FILE.safetensors")


def convert(options: argparse.Namespace) -> int:
    from tinymim_jax.convert import convert_file
    from tinymim_jax.params_io import save_params

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


def export(options: argparse.Namespace) -> int:
    from tinymim_jax.convert import to_safetensors, to_torch
    from tinymim_jax.params_io import load_params

    model, params = load_params(options.checkpoint)
    to_safetensors(options.output, to_torch(options.family, model, params))
    print(f"{options.output}: {options.family} names, as PyTorch loads them with safetensors.torch.load_file")
    return 0
