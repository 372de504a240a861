"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with itself, as timm's Mixup in mode 'batch'.

Image i is mixed with image `batch - 1 - i` (the middle image of an odd batch with itself). The operation and its
strength are drawn once for the batch, however many devices hold it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinymim_jax.ops.keys import fold_in_name


class Mix(NamedTuple):
    """How a batch is mixed.

    cut: bool [], True = a box is replaced (cutmix), False = all pixels are blended (mixup).
    lam: float32 [], the share of an image's own label; of cutmix, its own share of the pixels.
    box: int32 [4], top, bottom, left, right (ends excluded) of the box taken from the partner; empty unless `cut`.
    """

    cut: Bool[Array, ""]
    lam: Float[Array, ""]
    box: Int[Array, "4"]


def draw_mix(
    key: jax.Array, size: tuple[int, int], *, mixup: float, cutmix: float, prob: float, switch_prob: float
) -> Mix:
    """Draws how a batch is mixed.

    Args:
      size: height and width of the images.
      mixup, cutmix: parameter a of the Beta(a, a) distribution of lambda; 0 disables it. At least one must be positive.
      prob: probability that the batch is mixed; otherwise lambda is 1 and the box is empty.
      switch_prob: probability of cutmix if both are enabled.
    """
    if mixup < 0 or cutmix < 0 or not mixup + cutmix > 0:
        raise ValueError(f"mixup={mixup}, cutmix={cutmix}: both must be at least 0 and one of them positive")
    mixed = jax.random.uniform(fold_in_name(key, "mixed")) < prob
    if mixup and cutmix:
        cut = mixed & (jax.random.uniform(fold_in_name(key, "switch")) < switch_prob)
    else:
        cut = mixed & (cutmix > 0)
    blended = jax.random.beta(fold_in_name(key, "mixup"), mixup, mixup) if mixup else jnp.float32(1)
    left_over = jax.random.beta(fold_in_name(key, "cutmix"), cutmix, cutmix) if cutmix else jnp.float32(1)
    box = jnp.where(cut, draw_box(fold_in_name(key, "box"), left_over, size), 0)
    area = (box[1] - box[0]) * (box[3] - box[2])
    lam = jnp.where(cut, 1 - area / (size[0] * size[1]), jnp.where(mixed, blended, 1.0))
    return Mix(cut, lam.astype(jnp.float32), box)


def draw_box(key: jax.Array, lam: Float[Array, ""], size: tuple[int, int]) -> Int[Array, "4"]:
    """Top, bottom, left, right of a box with 1 - lam of the area, clipped to the image.

    Its sides are rounded down and its center is a uniformly random pixel. (timm 0.3.2, which the published runs used,
    makes odd sides one pixel shorter.)
    """
    limit = jnp.asarray(size, jnp.int32)  # [height, width]
    side = (limit * jnp.sqrt(1 - lam)).astype(jnp.int32)
    centre = jax.random.randint(key, (2,), 0, limit)
    low = jnp.maximum(centre - side // 2, 0)
    high = jnp.minimum(centre + (side + 1) // 2, limit)
    return jnp.stack([low[0], high[0], low[1], high[1]])


def mix_images(images: Float[Array, "batch height width 3"], mix: Mix) -> Float[Array, "batch height width 3"]:
    """Each image blended with its partner, or with a box of it pasted in. Pixels outside the box keep their bits."""
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])
    top, bottom, left, right = mix.box
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # [height, width]
    lam = mix.lam.astype(images.dtype)
    partners = images[::-1]
    cut = jnp.where(inside[:, :, None], partners, images)
    return jnp.where(mix.cut | (mix.lam == 1), cut, images * lam + partners * (1 - lam))


def mix_targets(targets: Float[Array, "batch classes"], lam: Float[Array, ""]) -> Float[Array, "batch classes"]:
    """Soft targets of the mixed images: the same mixture of the targets, which still sum to 1."""
    return targets * lam + targets[::-1] * (1 - lam)
