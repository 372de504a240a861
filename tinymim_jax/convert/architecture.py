"""The architecture, as model.json has it: made of the sizes that tensors show and the heads that they do not show."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families.table import Family, Sizes

Heads = int | str | Sequence[int]


def make_architecture(
    family: Family,
    parts: set[str],
    sizes: Sizes,
    heads: Heads | None,
    decoder_heads: int | None,
    image_size: tuple[int, int] | None,
) -> dict:
    """The architecture of a model of `family` that has these optional parts and sizes (see families/table.py).

    Raises:
      ConvertError: heads or image_size do not fit, or are needed because they have no default.
    """
    depth, paths = sizes["blocks."], {row.ours for row in family.rows_with(parts)}
    dist_token = "encoder/dist_token" in paths
    if heads is None:
        usual, last = _published(family.heads, sizes["d"], "--heads 6, or 6*11,12 block by block")
        heads = [usual] * (depth - 1) + [last]
    model: dict[str, Any] = {
        "encoder": {
            "embed_dim": sizes["d"],
            "depth": depth,
            "heads": parse_heads(heads, depth, sizes["d"]),
            "patch_size": sizes["p"],
            "image_size": make_image_size(sizes["n"], 2 if dist_token else 1, sizes["p"], image_size),
            "mlp_ratio": ratio(sizes["m"], sizes["d"]),
            "pos_embed": "learned",
            "final_norm": "encoder/norm/scale" in paths,
        }
    }
    if dist_token:
        model["encoder"]["dist_token"] = True
    if "decoder" in parts:
        width = sizes["e"]
        usual = decoder_heads
        if usual is None:
            usual = _published(family.decoder_heads, width, "--decoder_heads 16")
        (checked,) = parse_heads(usual, 1, width)
        model["decoder"] = {"embed_dim": width, "depth": sizes["decoder_blocks."], "heads": checked}
    if parts & {"mean", "head"} or "w" in sizes:
        model["classifier"] = {"classes": sizes.get("k", 0), "pool": "mean" if "mean" in parts else "cls"}
    if "w" in sizes:
        model["classifier"] |= _widened(sizes)
    return model


def _widened(sizes: Sizes) -> dict[str, Any]:
    """What the classifier of TinyMIM*-T has; the width of its norm shows if it is before or behind the widening."""
    wide, narrow, norm = sizes["w"], sizes["d"], sizes.get("f", sizes["w"])
    if norm not in (wide, narrow):
        raise ConvertError(f"fc_norm is {norm} wide: expected {wide} as behind conv1x1, or {narrow} as before it")
    return {"hidden_dim": wide} | ({"norm_first": True} if norm != wide else {})


def parts_of(model: Mapping) -> set[str]:
    """The optional parts that an architecture has."""
    parts = {"decoder"} if "decoder" in model else set()
    classifier = model.get("classifier", {"classes": 0, "pool": "cls"})
    parts |= {classifier["pool"]} | ({"head"} if classifier["classes"] else set())
    return whole_parts(parts | ({"dist"} if model["encoder"].get("dist_token") else set()))


def whole_parts(parts: set[str]) -> set[str]:
    """`parts` completed: two tokens have two heads, and a second head needs a first one and a second token."""
    both = {"dist", "head", "head_dist"}
    return parts | both if "head_dist" in parts or {"dist", "head"} <= parts else parts


def sizes_of(model: Mapping) -> dict[str, int]:
    """The sizes of an architecture, by the letters of the name tables."""
    encoder, decoder = model["encoder"], model.get("decoder", {"embed_dim": 0, "depth": 0})
    rows, columns = grid_of(encoder)
    classifier = model.get("classifier", {"classes": 0})
    wide = classifier.get("hidden_dim", 0)
    return {
        "d": encoder["embed_dim"],
        "m": int(encoder["embed_dim"] * encoder["mlp_ratio"]),
        "n": (2 if encoder.get("dist_token") else 1) + rows * columns,
        "p": encoder["patch_size"],
        "k": classifier["classes"],
        "w": wide,
        "f": encoder["embed_dim"] if classifier.get("norm_first") else wide,
        "e": decoder["embed_dim"],
        "blocks.": encoder["depth"],
        "decoder_blocks.": decoder["depth"],
    }


def grid_of(encoder: Mapping) -> tuple[int, int]:
    """Patches (rows, columns) of an encoder."""
    height, width = encoder["image_size"]
    return height // encoder["patch_size"], width // encoder["patch_size"]


def parse_heads(heads: Heads, depth: int, embed_dim: int) -> list[int]:
    """Attention heads of each block, from one number, a list, or a text such as '6', '2,2,4' or '6*11,12'."""
    if isinstance(heads, str):
        if not re.fullmatch(r"\d{1,4}(\*\d{1,4})?(,\d{1,4}(\*\d{1,4})?)*", heads):
            raise ConvertError(f"heads={heads!r} is not understood: write 6, or 6,6,12, or 6*11,12")
        counted = [item.partition("*") for item in heads.split(",")]
        heads = [int(number) for number, _, times in counted for _ in range(int(times or 1))]
        heads = heads[0] if len(heads) == 1 and depth > 1 else heads
    blocks = [heads] * depth if isinstance(heads, int) else list(heads)
    if len(blocks) != depth:
        raise ConvertError(f"heads names {len(blocks)} blocks and the model has {depth}: give one number or {depth}")
    for number in blocks:
        if number < 1 or embed_dim % number:
            raise ConvertError(f"heads={number} does not divide the width {embed_dim}")
    return blocks


def _published(table: Mapping[int, Any], width: int, remedy: str) -> Any:
    if width not in table:
        widths = ", ".join(map(str, table))
        raise ConvertError(
            f"no published model is {width} wide ({widths} are), so the attention heads must be named: {remedy}"
        )
    return table[width]


def make_image_size(rows: int, prefix: int, patch_size: int, image_size: tuple[int, int] | None) -> list[int]:
    """[height, width] in pixels of the images for a position table with this many rows.

    prefix: the rows before those of the patches.
    """
    patches = rows - prefix
    side = math.isqrt(max(patches, 0))
    without_cls = ""
    if patches > 0 and math.isqrt(rows) ** 2 == rows:
        without_cls = (
            f". Or, as its {rows} rows are a square, it has none for the CLS token (timm's no_embed_class): put a row "
            "of zeros before them, state['pos_embed'] = torch.cat([torch.zeros_like(state['pos_embed'][:, :1]), "
            "state['pos_embed']], 1)"
        )
    if image_size is None:
        if not patches or side * side != patches:
            raise ConvertError(
                f"the position table is for {patches} patches, which is no square number: give the image size, such as "
                f"--image_size {_oblong(patches, patch_size)}{without_cls}"
            )
        return [side * patch_size, side * patch_size]
    height, width = image_size
    if height % patch_size or width % patch_size or height * width != patches * patch_size**2:
        raise ConvertError(
            f"image_size={height}x{width} does not fit: the position table is for {patches} patches of {patch_size} "
            f"pixels{without_cls}"
        )
    return [height, width]


def _oblong(patches: int, patch_size: int) -> str:
    """'HEIGHT WIDTH' in pixels of the grid that is nearest to a square."""
    height = next((n for n in range(math.isqrt(max(patches, 1)), 1, -1) if patches % n == 0), 1)
    return f"{height * patch_size} {patches // height * patch_size}"


def ratio(hidden: int, width: int) -> float:
    """mlp_ratio such that int(width * ratio), with which models are built, gives `hidden`."""
    quotient = hidden / width
    return quotient if int(width * quotient) == hidden else math.nextafter(quotient, math.inf)
