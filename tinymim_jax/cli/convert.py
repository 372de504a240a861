"""`tinymim convert`: reads a PyTorch checkpoint, without PyTorch."""

import argparse
from typing import Any

HELP = "read a pre-trained ViT (PyTorch, safetensors, .npz, a folder or model of the hub, ONNX), without PyTorch"

# The keys of convert.FAMILIES and convert.INTERPOLATIONS: importing that package would make --help slow.
FAMILIES = ("mae", "tinymim", "vit", "tinymim_star", "tinymim_segmentation", "tinymim_star_segmentation")
# Those of convert.PUBLISHED.
PUBLISHED = (
    *("dinov3", "dinov2", "deit3", "ijepa", "hf_vit", "clip", "siglip", "eva02", "beit", "pe", "aimv2", "radio"),
    *("vit_jax", "big_vision"),
)
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
INTERPOLATIONS = ("bicubic", "bilinear")
# Written by `tinymim export` (hub: or by timm): these files describe their own architecture.
EXPORTS = ("hub", "onnx")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `convert` command."""
    command.add_argument(
        "--from",
        dest="family",
        default="auto",
        choices=("auto", *FAMILIES, *PUBLISHED, *EXPORTS),
        metavar="FAMILY",
        help="auto (the default) finds the family by the names of the tensors and config.json. Else one of: mae, "
        "tinymim, tinymim_star and their _segmentation (those releases); vit (timm's and DeiT's plain classifiers, "
        f"DINO, MoCo v3); {', '.join(PUBLISHED)}; hub (a folder that `tinymim export` or timm's save_for_hf wrote); "
        "onnx (a float32 file of `tinymim export`)",
    )
    command.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="a file, a folder with config.json and weights, or a model of the Hugging Face hub that is in the local "
        "cache (facebook/dinov2-small)",
    )
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
    shape.add_argument("--eps", type=float, help="of the norms; default: config.json's, or the family's")
    shape.add_argument("--activation", choices=ACTIVATIONS, help="of the MLPs; default: config.json's, or the family's")
    shape.add_argument(
        "--rope_grid",
        type=int,
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        help="EVA-02: the grid of patches of its pre-training, to which rotary positions are scaled (default 16 16)",
    )
    shape.add_argument("--licence", help="of the weights, kept in model.json; default: as published")
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
    """Writes --output and prints its content and what was assumed."""
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
        "eps": options.eps,
        "activation": options.activation,
        "rope_grid": tuple(options.rope_grid) if options.rope_grid else None,
        "licence": options.licence,
    }
    given = Given(
        mean=options.mean,
        std=options.std,
        resize=options.resize,
        interpolation=options.interpolation,
        class_names=read_class_names(options.classes) if options.classes else None,
    )
    family = _export_kind(options.input) if options.family == "auto" else options.family
    if family in EXPORTS:
        model, params = _read_export(family, options.input, arguments, given)
    else:
        model, params = convert_file(family, options.input, given=given, **arguments)
    save_params(options.output, params, model)
    source = model["source"]
    print(f"{options.output}: {_architecture(model, family)}")
    if "taken" in source:
        print(f"  taken: {source['taken']}")
    for text in source.get("left_out", []):
        print(f"  left out: {text}")
    if "not_read" in source:
        print(f"  not read: {', '.join(source['not_read'])}")
    if "licence" in source or not model.get("lineage"):
        licence = source.get("licence", "unknown; --licence names it")
        print(f"  licence of the weights: {licence} (kept in model.json, also of what is trained from them)")
    for text in source.get("notes", []):
        print(f"  note: {text}")
    print("\n".join(described(model["preprocessing"], classifier="classifier" in model or "segmenter" in model)))
    return 0


def _export_kind(path: str) -> str:
    """'onnx' or 'hub' for what `tinymim export` wrote and for timm's folders of plain ViTs; else 'auto'."""
    import json
    import pathlib

    file = pathlib.Path(path).expanduser()
    if file.suffix == ".onnx":
        return "onnx"
    try:
        config = json.loads((file / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "auto"
    if not isinstance(config, dict):
        return "auto"
    return "hub" if config.get("model_type") == "tinymim" or _is_plain(config) else "auto"


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether it is timm's configuration of a plain ViT, whose classifier is read as well."""
    import re

    from tinymim_jax.convert import PUBLISHED

    name = str(config.get("architecture", ""))
    known = any(re.match(row.architectures, name) for row in PUBLISHED.values())
    return name.startswith(("vit_", "deit_")) and not known


def _read_export(family: str, path: str, arguments: dict[str, Any], given: Any) -> tuple[dict, dict]:
    """Reads what says its own architecture."""
    if strange := [name for name, value in arguments.items() if value is not None]:
        where = "config.json of this folder" if family == "hub" else "the metadata of this file"
        raise ValueError(f"{path} is read as --from {family}, where {where} says all of it: leave out --{strange[0]}")
    if family == "hub":
        from tinymim_jax.convert.formats.hub import read_folder

        return read_folder(path, given=given)
    from tinymim_jax.convert.formats.onnx import read_file

    return read_file(path, given=given)


def _architecture(model: dict, family: str) -> str:
    source = model["source"]
    if "backbone" in model:
        backbone = model["backbone"]
        widths, blocks = (", ".join(map(str, backbone[key])) for key in ("widths", "blocks"))
        return f"{backbone['kind']}, as a teacher only; stages of {widths} channels, {blocks} blocks"
    encoder = model["encoder"]
    parts = "encoder" + ", decoder" * ("decoder" in model) + ", classifier" * ("classifier" in model)
    parts += ", segmentation network" * ("segmenter" in model)
    assumed = " (assumed: those of the published model of this width)" * ("heads" in source.get("assumed", []))
    return (
        f"{source.get('family', family)}, {parts}; width {encoder['embed_dim']}, {encoder['depth']} blocks, heads "
        f"{encoder['heads']}{assumed}"
    )
