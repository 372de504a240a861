"""The segmentation network of the golden files, and small ones."""

import functools
from typing import Any

import flax.traverse_util as traverse
import numpy as np
from segmentation_files import segmentation_golden

from tinymim_jax.convert.families.segmentation import FAMILY
from tinymim_jax.convert.families.table import Leaf, leaves, sizes_shown
from tinymim_jax.models.segmentation import SegmentationNetwork
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT


@functools.cache
def golden_weights() -> dict[str, np.ndarray]:
    """The whole network by the names of the release."""
    arrays = segmentation_golden("seg_model.npz")
    return {name.removeprefix("weights/"): x for name, x in arrays.items() if name.startswith("weights/")}


@functools.cache
def golden_leaves() -> dict[str, Leaf]:
    """What each tensor of the release is here, by the release's name."""
    rows = FAMILY.rows_with({"auxiliary"})
    sizes = sizes_shown(rows, {name: x.shape for name, x in golden_weights().items()})
    return {leaf.torch: leaf for leaf in leaves(rows, sizes)}


def golden_params() -> dict[str, Any]:
    """The golden network's parameters and running statistics."""
    named = {leaf.ours: leaf.layout.ours(golden_weights()[name]) for name, leaf in golden_leaves().items()}
    return traverse.unflatten_dict({path: np.asarray(x, np.float32) for path, x in named.items()}, sep="/")


def golden_network(**changes: Any) -> SegmentationNetwork:
    """The network, with attributes changed."""
    meta = segmentation_golden("seg_meta.json")["segmentation"]
    encoder = ViT(
        embed_dim=meta["embed_dim"],
        depth=meta["depth"],
        heads=meta["heads"],
        patch_size=meta["patch_size"],
        image_size=(meta["image_size"],) * 2,
        pos_embed="learned",
        final_norm=False,
        switches=Switches(relative_bias=True, layer_scale=True),
    )
    network = SegmentationNetwork(
        encoder,
        "upernet",
        meta["classes"],
        tuple(index + 1 for index in meta["out_indices"]),
        channels=meta["channels"],
        auxiliary=meta["aux_channels"],
        dropout=meta["dropout"],
        pool_scales=tuple(meta["pool_scales"]),
    )
    return network.clone(**changes)
