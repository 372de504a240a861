"""The architecture of a segmentation network, made of the sizes that its tensors show, and the inverse."""

from collections.abc import Mapping
from typing import Any

from tinymim_jax.convert.architecture import Heads, grid_of, make_image_size, parse_heads, ratio
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families.table import Family, Sizes
from tinymim_jax.models.taps import default_taps

_BLOCKS = "backbone.blocks."


def make_segmenter(
    family: Family, parts: set[str], sizes: Sizes, heads: Heads | None, image_size: tuple[int, int] | None
) -> dict[str, Any]:
    """The architecture of a segmentation network of `family`.

    Attention heads are those that the tables of relative positions show. Blocks 4, 6, 8 and 12 of 12 are tapped, as
    published, which no tensor shows.

    Raises:
      ConvertError: heads or image_size do not fit.
    """
    depth, star = sizes[_BLOCKS], family.pyramid == "star"
    prefix = 2 if star else 1
    shown = parse_heads(sizes["h"], depth, sizes["d"])
    if heads is not None and parse_heads(heads, depth, sizes["d"]) != shown:
        raise ConvertError(f"heads={heads}: the tables of relative positions are for {sizes['h']} in every block")
    encoder = {
        "embed_dim": sizes["d"],
        "depth": depth,
        "heads": shown,
        "patch_size": sizes["p"],
        "image_size": make_image_size(sizes["n"], prefix, sizes["p"], image_size),
        "mlp_ratio": ratio(sizes["m"], sizes["d"]),
        "pos_embed": "learned",
        "final_norm": False,
        "switches": {"relative_bias": True, "layer_scale": True},
    }
    rows, columns = grid_of(encoder)
    offsets = (2 * rows - 1) * (2 * columns - 1) + 3 * prefix
    if sizes["r"] != offsets:
        raise ConvertError(
            f"the tables of relative positions have {sizes['r']} rows, and a grid of {rows}x{columns} patches, which "
            f"the position table is for, needs {offsets}"
        )
    segmenter = {
        "head": "upernet",
        "classes": sizes["k"],
        "taps": list(default_taps("upernet", depth)),
        "channels": sizes["c"],
        "auxiliary": sizes["a"] if "auxiliary" in parts else 0,
        "pyramid": family.pyramid,
        "widen": sizes["w"] if star else 0,
    }
    return {"encoder": encoder | ({"dist_token": True} if star else {}), "segmenter": segmenter}


def segmenter_parts(model: Mapping[str, Any]) -> set[str]:
    """The optional parts that a segmentation network has."""
    return {"auxiliary"} if model["segmenter"].get("auxiliary") else set()


def segmenter_sizes(model: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a segmentation network, by the letters of the name tables."""
    encoder, segmenter = model["encoder"], model["segmenter"]
    prefix, (rows, columns) = 2 if encoder.get("dist_token") else 1, grid_of(encoder)
    return {
        "d": encoder["embed_dim"],
        "m": int(encoder["embed_dim"] * encoder["mlp_ratio"]),
        "n": prefix + rows * columns,
        "p": encoder["patch_size"],
        "h": encoder["heads"][0],
        "r": (2 * rows - 1) * (2 * columns - 1) + 3 * prefix,
        "k": segmenter["classes"],
        "c": segmenter.get("channels", 0),
        "a": segmenter.get("auxiliary", 0),
        "w": segmenter.get("widen", 0),
        _BLOCKS: encoder["depth"],
    }


def check_segmenter(family: str, pyramid: str, model: Mapping[str, Any]) -> None:
    """Raises ConvertError if `model` is no segmentation network with the names of `family`."""
    if "segmenter" not in model:
        raise ConvertError(f"{family!r} names segmentation networks, and this is none")
    record, heads = model["segmenter"], model["encoder"]["heads"]
    if record["head"] != "upernet" or record["pyramid"] != pyramid:
        kind = f"head {record['head']!r}" + f" with pyramid {record.get('pyramid')!r}" * (record["head"] == "upernet")
        raise ConvertError(f"{family!r} is for head 'upernet' with pyramid {pyramid!r}, and this network has {kind}")
    if len(set(heads)) > 1:
        raise ConvertError(f"{family!r} has as many attention heads in every block, and this network has {heads}")
