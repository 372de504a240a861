"""Makes the tokens of two networks comparable: resizes token grids and images, selects visible patches."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]
Tokens = Float[Array, "batch tokens *rest"]


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of torch's bilinear interpolation: align_corners False, no antialiasing, edges repeated."""
    centre = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    left = np.floor(centre).astype(int)
    share = centre - left
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), left), 1 - share)
    np.add.at(weights, (np.arange(new), np.minimum(left + 1, old - 1)), share)
    return weights.astype(np.float32)


def resize_tokens(tokens: Tokens, old: Grid, new: Grid, prefix: int = 1) -> Float[Array, "batch new_tokens *rest"]:
    """Patch tokens interpolated from the grid `old` (rows, columns) to the grid `new`.

    The `prefix` tokens in front of them, such as CLS, are kept. Bilinear, computed in float32 and returned in the dtype
    of `tokens`. Returns `tokens` if the grids are equal.
    """
    if old == new:
        return tokens
    batch, count, *rest = tokens.shape
    if count != prefix + old[0] * old[1]:
        leading = {0: "", 1: "a CLS token and "}.get(prefix, f"{prefix} tokens and ")
        raise ValueError(f"{count} tokens are not {leading}a grid of {old[0]}x{old[1]} patches")
    grid = tokens[:, prefix:].reshape(batch, *old, -1).astype(jnp.float32)
    grid = jnp.einsum("rh,bhwd->brwd", bilinear_matrix(old[0], new[0]), grid, precision="highest")
    grid = jnp.einsum("cw,brwd->brcd", bilinear_matrix(old[1], new[1]), grid, precision="highest")
    patches = grid.reshape(batch, new[0] * new[1], *rest).astype(tokens.dtype)
    return jnp.concatenate([tokens[:, :prefix], patches], axis=1)


def without_extra_tokens(tokens: Tokens, prefix: int, kept: int = 1) -> Float[Array, "batch fewer *rest"]:
    """The first `kept` of the `prefix` tokens in front of the patches, and the patch tokens."""
    if kept > prefix:
        raise ValueError(f"{kept} of {prefix} tokens in front of the patches cannot be kept")
    return tokens if kept == prefix else jnp.concatenate([tokens[:, :kept], tokens[:, prefix:]], axis=1)


def visible_tokens(
    tokens: Tokens, keep: Int[Array, "batch kept"], prefix: int = 1
) -> Float[Array, "batch visible *rest"]:
    """The `prefix` tokens in front of the patches, and the patch tokens at the positions `keep` of each image.

    Positions are counted from 0 at the first patch; patches are returned in their order.
    """
    leading = jnp.broadcast_to(jnp.arange(prefix, dtype=keep.dtype), (keep.shape[0], prefix))
    positions = jnp.concatenate([leading, keep + prefix], axis=1)
    return jnp.take_along_axis(tokens, positions.reshape(*positions.shape, *(1,) * (tokens.ndim - 2)), axis=1)


def resize_images(
    images: Float[Array, "batch height width 3"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width 3"]:
    """Images of 0..255 resized to (height, width): bicubic with antialiasing, clipped to 0..255."""
    if images.shape[1:3] == size:
        return images
    resized = jax.image.resize(images, (images.shape[0], *size, 3), "cubic", antialias=True)
    return jnp.clip(resized, 0.0, 255.0)
