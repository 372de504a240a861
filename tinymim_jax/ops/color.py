"""Color operations that run on the device: normalization and ColorJitter."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow's luma weights (ITU-R 601-2), in 1/65536, as its L conversion rounds them.
_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)

Images = Float[Array, "batch height width 3"]


def normalize(
    images: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Images:
    """Pixels of 0..255 to float32 `(pixel / 255 - mean) / std`."""
    scale = 1.0 / (255.0 * np.asarray(std, np.float32))
    return images.astype(jnp.float32) * scale - np.asarray(mean, np.float32) / np.asarray(std, np.float32)


def denormalize(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """The inverse of `normalize`, as pixels of 0..1."""
    return jnp.clip(images * np.asarray(std, np.float32) + np.asarray(mean, np.float32), 0.0, 1.0)


def color_jitter(
    key: jax.Array,
    images: UInt8[Array, "batch height width 3"],
    *,
    brightness: float,
    contrast: float,
    saturation: float,
) -> Images:
    """torchvision's ColorJitter without hue; returns float32 pixels of 0..255 that are whole numbers.

    Each image draws a factor in [max(0, 1 - s), 1 + s] for each of the three operations and a random order of them.
    Each operation blends the image with black, its mean gray level, or its grayscale version; the result is clipped and
    rounded down as in Pillow. It runs on the device so that one uint8 view serves both student and teacher.
    """
    batch = images.shape[0]
    factor_key, order_key = jax.random.split(key)
    strength = jnp.array([brightness, contrast, saturation], jnp.float32)
    low, high = jnp.maximum(0.0, 1.0 - strength), 1.0 + strength
    factors = jax.random.uniform(factor_key, (batch, 3), minval=low, maxval=high)
    order = jnp.argsort(jax.random.uniform(order_key, (batch, 3)), axis=1)
    return apply_jitter(images, factors, order)


def apply_jitter(
    images: UInt8[Array, "batch height width 3"], factors: Float[Array, "batch 3"], order: Array
) -> Images:
    """Brightness, contrast and saturation by `factors`, in each image's `order` (a permutation of 0, 1, 2)."""
    pixels = images.astype(jnp.float32)
    for turn in range(3):
        operation = order[:, turn][:, None, None, None]
        factor = jnp.take_along_axis(factors, order[:, turn : turn + 1], axis=1)[:, :, None, None]
        # Written out: as a matrix product a TPU would round it to bfloat16.
        grey = sum(pixels[..., i : i + 1] * _GREY[i] for i in range(3))  # [batch, height, width, 1]
        grey = jnp.floor(grey + 0.5)
        mean = jnp.floor(grey.mean(axis=(1, 2), keepdims=True) + 0.5)
        other = jnp.where(operation == 0, 0.0, jnp.where(operation == 1, mean, grey))
        # Pillow blends in float32 and truncates.
        pixels = jnp.floor(jnp.clip(other + factor * (pixels - other), 0.0, 255.0))
    return pixels
