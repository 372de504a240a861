"""Features of every image of a split, extracted once: what k-NN and linear probes work on."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinymim_jax.data.pipeline import Batches
from tinymim_jax.errors import unknown
from tinymim_jax.models.heads import POOLS, pool_tokens
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.per_example import collect, row_step


def extract_features(
    encoder: ViT,
    params: Any,
    batches: Batches,
    mesh: Mesh,
    *,
    pool: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 `[examples, dim]` and labels int32 `[examples]`, in the order of the split, on every host.

    Args:
      encoder: run to its end, its final norm included where it has one.
      params: of the encoder, placed on `mesh`.
      batches: padded batches with `valid`; closed at the end.
      pool: 'mean' of the patch tokens, or the 'cls' token.
      mean, std: of the pixels.
    """
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)

    def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens: Any = encoder.apply({"params": params}, normalize(batch["image"], mean, std))
        return pool_tokens(tokens, pool, encoder.prefix), batch["label"]

    return collect(row_step(extract, mesh), params, batches, mesh)
