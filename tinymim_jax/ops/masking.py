"""Per-image random masking (MAE release, models_mae.py: random_masking)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Masking(NamedTuple):
    """Which patches are visible to an encoder.

    keep: int32 [batch, kept], positions of the visible patches in the order in which the encoder receives them.
    restore: int32 [batch, patches], `concatenate([visible, hidden])[restore]` is the original order.
    hidden: bool [batch, patches], True = removed from the encoder.
    """

    keep: Int[Array, "batch kept"]
    restore: Int[Array, "batch patches"]
    hidden: Bool[Array, "batch patches"]


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Number of visible patches, rounded down as published. Raises ValueError if it is 0 or the ratio is invalid."""
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio={mask_ratio} must lie in [0, 1)")
    kept = int(patches * (1 - mask_ratio))
    if kept == 0:
        raise ValueError(f"mask_ratio={mask_ratio} hides all of {patches} patches: lower it or use smaller patches")
    return kept


def masking_from_noise(noise: Float[Array, "batch patches"], mask_ratio: float) -> Masking:
    """In each image, keeps the patches with the smallest noise."""
    patches = noise.shape[1]
    kept = kept_patches(patches, mask_ratio)
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(keep=order[:, :kept], restore=restore, hidden=restore >= kept)


def random_masking(key: jax.Array, batch: int, patches: int, mask_ratio: float) -> Masking:
    """Uniformly random visible patches, independent for every image."""
    return masking_from_noise(jax.random.uniform(key, (batch, patches)), mask_ratio)


def most_attended(
    queries: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens heads head_dim"],
    *,
    prefix: int,
    kept: int,
) -> Int[Array, "batch {kept}"]:
    """Positions, in ascending order, of the patches that the first token attends to most; mean over the heads.

    Args:
      queries, keys: of one block.
      prefix: number of tokens before the patches.
    """
    queries, keys = queries[:, 0].astype(jnp.float32), keys.astype(jnp.float32)
    logits = jnp.sum(queries[:, None] * keys, axis=-1) * queries.shape[-1] ** -0.5  # [batch, tokens, heads]
    attention = jnp.mean(jax.nn.softmax(logits, axis=1), axis=2)[:, prefix:]
    return jnp.sort(jax.lax.top_k(attention, kept)[1], axis=1)


def greyed(
    images: Float[Array, "batch height width 3"], hidden: Bool[Array, "batch patches"], patch_size: int
) -> Float[Array, "batch height width 3"]:
    """Images of 0..1 with their hidden patches painted grey, to be looked at."""
    rows, columns = images.shape[1] // patch_size, images.shape[2] // patch_size
    grid = hidden.reshape(-1, rows, columns, 1)
    painted = jnp.repeat(jnp.repeat(grid, patch_size, axis=1), patch_size, axis=2)
    return jnp.where(painted, 0.5, images)


def take_tokens(
    tokens: Float[Array, "batch tokens dim"], positions: Int[Array, "batch chosen"]
) -> Float[Array, "batch chosen dim"]:
    """Row `positions[b, i]` of `tokens[b]`."""
    return jnp.take_along_axis(tokens, positions[:, :, None], axis=1)
