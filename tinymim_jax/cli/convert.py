"""`tinymim convert`: reads a PyTorch checkpoint, without PyTorch."""

import argparse
from typing import Any

HELP = "read a PyTorch checkpoint (.pth or .safetensors), a hub folder or an exported ONNX file, without PyTorch"

# The keys of convert.FAMILIES and convert.INTERPOLATIONS: importing that package would make --help slow.
FAMILIES = ("mae", "tinymim", "vit", "tinymim_star", "tinymim_segmentation", "tinymim_star_segmentation")
INTERPOLATIONS = ("bicubic", "bilinear")
# What `tinymim export` wrote, and in the case of the hub what timm saved: these say themselves what they are.
EXPORTS = ("hub", "onnx")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `convert` command."""
    command.add_argument(
        "--from",
        dest="family",
        required=True,
        choices=(*FAMILIES, *EXPORTS),
        help="which model's tensor names the file has: those of MAE's or TinyMIM's release, of the fine-tuned "
        "TinyMIM*-T, of timm's and DeiT's classifiers (vit), or of the release's segmentation networks. hub: a folder "
        "that `tinymim export` or timm's save_for_hf wrote; onnx: a float32 file of `tinymim export`",
    )
    command.add_argument("--input", required=True, metavar="FILE", help="for the hub a folder")
    command.add_argument("--output", required=True, metavar="DIR")
    command.add_argument(
        "--use",
        metavar="NETWORK",
        help="which of several networks in the file: ema, teacher, student, momentum, or the key that it is under; "
        "default: the model itself, else the teacher",
    )
    command.add_argument("--prefix", help="take the names that begin with this; default: found by itself")
    shape = command.add_argument_group("what tensors do not show")
    shape.add_argument(
        "--heads", help="attention heads, one number or one for each block (2,2,2,4 or 2*3,4); default by width"
    )
    shape.add_argument("--decoder_heads", type=int, metavar="N", help="of a full MAE file; default by width")
    shape.add_argument(
        "--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="when the grid is not square"
    )
    images = command.add_argument_group(
        "how the model wants its images",
        "Default: what `tinymim export` put into the file, else config.json of timm or Hugging Face beside it, else "
        "ImageNet's mean and std, resize to 8/7 of the image size, bicubic. It is kept in model.json.",
    )
    images.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels in 0..1")
    images.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    images.add_argument("--resize", type=int, metavar="PIXELS", help="the short side before the central crop")
    images.add_argument("--interpolation", choices=INTERPOLATIONS)
    images.add_argument(
        "--classes", metavar="FILE", help="class names in the order of the outputs: a line each, or a JSON list"
    )
    images.add_argument("--config", metavar="FILE", help="config.json to read; `none` ignores the one beside the file")


def run(options: argparse.Namespace) -> int:
    """Writes --output and prints what it holds and what was assumed."""
    from tinymim_jax.checkpoints.params import check_free, save_params
    from tinymim_jax.convert import Given, convert_file, described, read_class_names

    check_free(options.output)
    arguments: dict[str, Any] = {
        "heads": options.heads,
        "decoder_heads": options.decoder_heads,
        "image_size": tuple(options.image_size) if options.image_size else None,
        "use": options.use,
        "prefix": options.prefix,
        "config": options.config,
    }
    given = Given(
        mean=options.mean,
        std=options.std,
        resize=options.resize,
        interpolation=options.interpolation,
        class_names=read_class_names(options.classes) if options.classes else None,
    )
    if options.family in EXPORTS:
        model, params = _read_export(options, arguments, given)
    else:
        model, params = convert_file(options.family, options.input, given=given, **arguments)
    save_params(options.output, params, model)
    encoder, source = model["encoder"], model["source"]
    parts = "encoder" + ", decoder" * ("decoder" in model) + ", classifier" * ("classifier" in model)
    parts += ", segmentation network" * ("segmenter" in model)
    assumed = " (assumed: those of the published model of this width)" * ("heads" in source.get("assumed", []))
    print(
        f"{options.output}: {parts}; width {encoder['embed_dim']}, {encoder['depth']} blocks, heads {encoder['heads']}"
        f"{assumed}"
    )
    if "taken" in source:
        print(f"  taken: {source['taken']}")
    for text in source.get("left_out", []):
        print(f"  left out: {text}")
    for text in source.get("notes", []):
        print(f"  note: {text}")
    print("\n".join(described(model["preprocessing"], classifier="classifier" in model or "segmenter" in model)))
    return 0


def _read_export(options: argparse.Namespace, arguments: dict[str, Any], given: Any) -> tuple[dict, dict]:
    """Reads what says its own architecture."""
    if strange := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(f"--{strange[0]} has no meaning for --from {options.family}, which says it itself")
    if options.family == "hub":
        from tinymim_jax.convert.formats.hub import read_folder

        return read_folder(options.input, given=given)
    from tinymim_jax.convert.formats.onnx import read_file

    return read_file(options.input, given=given)
