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
from tinymim_jax.sharding import place_batch, replicated


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

    def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens: Any = encoder.apply({"params": params}, normalize(batch["image"], mean, std))
        return pool_tokens(tokens, pool, encoder.prefix), batch["label"], batch["valid"]

    # Small next to the images: every host gets the rows of all.
    extract_step = jax.jit(extract, out_shardings=replicated(mesh))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    before = None
    with batches:
        for batch in batches:
            # The batch before is fetched once this one is under way: the device does not wait for the host.
            after = extract_step(params, place_batch(mesh, batch))
            if before is not None:
                found.append(_valid_rows(before))
            before = after
    if before is not None:
        found.append(_valid_rows(before))
    features, labels = (np.concatenate(parts) for parts in zip(*found))
    return features, labels


def _valid_rows(step: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    features, labels, valid = (np.asarray(array) for array in step)
    return features[valid], labels[valid]
