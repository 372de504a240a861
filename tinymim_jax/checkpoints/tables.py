"""Parameters of an encoder whose shape depends on the grid of patches, for images of another size."""

from typing import Any

import jax
import numpy as np

from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.posembed import resize_table
from tinymim_jax.ops.relative_bias import resize_bias_table

Params = Any  # nested dicts of arrays


def biases_on_grid(params: Params, old: ViT, new: ViT) -> Params:
    """The parameters of the encoder `old` with its relative position biases resized to the grid of `new` (BEiT's rule).

    Unchanged where it has none, or where the grids are equal.
    """
    if not old.switches.relative_bias or old.grid == new.grid:
        return params

    def fit(path: Any, leaf: Any) -> Any:
        is_table = path[-1].key == "relative_bias"
        return resize_bias_table(np.asarray(leaf), old.grid, new.grid, old.prefix) if is_table else leaf

    return jax.tree_util.tree_map_with_path(fit, params)


def for_image_size(record: dict[str, Any], params: Params, image_size: tuple[int, int]) -> Params:
    """The parameters of an encoder with its position table and relative position biases for images of this size.

    Args:
      record: the architecture, see ViT.record.
    """
    old = ViT.from_record(record)
    new = old.clone(image_size=tuple(image_size))
    if "pos_embed" in params:
        table = resize_table(np.asarray(params["pos_embed"]), old.grid, new.grid, old.switches.table)
        params = params | {"pos_embed": np.asarray(table)}
    return biases_on_grid(params, old, new)
