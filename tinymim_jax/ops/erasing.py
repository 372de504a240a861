"""Random erasing (arXiv 1708.04896) as timm's RandomErasing in mode 'pixel': a box of normal noise in each image."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymim_jax.ops.keys import fold_in_name

_ATTEMPTS = 10


def random_erasing(
    key: jax.Array,
    images: Float[Array, "batch height width 3"],
    *,
    prob: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "batch height width 3"]:
    """Replaces a random box of some of the normalized images by standard normal noise; other pixels keep their bits.

    Args: as for `draw_boxes`.
    """
    batch, height, width, _ = images.shape
    boxes = draw_boxes(fold_in_name(key, "box"), (batch, height, width), prob=prob, area=area, aspect=aspect)
    noise = jax.random.normal(fold_in_name(key, "noise"), images.shape, images.dtype)
    return erase(images, boxes, noise)


def draw_boxes(
    key: jax.Array,
    shape: tuple[int, int, int],
    *,
    prob: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Int[Array, "batch 4"]:
    """Draws the box to erase in each image: top, bottom, left, right (ends excluded); all 0 where nothing is erased.

    Up to ten boxes are drawn for an image and the first that is smaller than the image on both sides is used; if none
    is, the image is not erased.

    Args:
      shape: batch, height, width.
      prob: probability that an image is erased.
      area: bounds of the box's share of the image area, drawn uniformly.
      aspect: bounds of its height / width, drawn log-uniformly.
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"prob={prob} is a probability: choose 0 to 1")
    batch, height, width = shape
    draws = (batch, _ATTEMPTS)
    pixels = jax.random.uniform(fold_in_name(key, "area"), draws, minval=area[0], maxval=area[1]) * (height * width)
    low, high = (math.log(bound) for bound in aspect)
    ratio = jnp.exp(jax.random.uniform(fold_in_name(key, "aspect"), draws, minval=low, maxval=high))
    sides = jnp.stack([jnp.sqrt(pixels * ratio), jnp.sqrt(pixels / ratio)], axis=-1)
    sides = jnp.round(sides).astype(jnp.int32)  # [batch, attempts, 2]
    limit = jnp.array([height, width], jnp.int32)
    fits = jnp.all(sides < limit, axis=-1)  # [batch, attempts]
    first = jnp.argmax(fits, axis=1)
    side = jnp.take_along_axis(sides, first[:, None, None], axis=1)[:, 0]  # [batch, 2]
    # Where no box fits, the upper bound is raised to 1 to be valid; the box is discarded below.
    start = jax.random.randint(fold_in_name(key, "place"), (batch, 2), 0, jnp.maximum(limit - side + 1, 1))
    box = jnp.stack([start[:, 0], start[:, 0] + side[:, 0], start[:, 1], start[:, 1] + side[:, 1]], axis=1)
    erased = (jax.random.uniform(fold_in_name(key, "erased"), (batch,)) < prob) & jnp.any(fits, axis=1)
    return jnp.where(erased[:, None], box, 0)


def erase(
    images: Float[Array, "batch height width 3"],
    boxes: Int[Array, "batch 4"],
    noise: Float[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
    """`noise` within each image's box, the image elsewhere."""
    top, bottom, left, right = (boxes[:, side, None, None] for side in range(4))
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # [batch, height, width]
    return jnp.where(inside[..., None], noise, images)
