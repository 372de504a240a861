"""Cross-entropy of every pixel, from logits on a coarser grid."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from tinymim_jax.ops.segmentation import ignore_value, resize_bilinear


@functools.partial(jax.checkpoint, prevent_cse=True)
def pixel_cross_entropy(
    logits: Float[Array, "batch rows columns classes"], labels: UInt[Array, "batch height width"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """(loss, accuracy) of each image; the logits are resized to the labels' size first (mmseg's cross_entropy_loss.py).

    As published, the loss is divided by all pixels of the image, of which the ignored ones have loss 0. The accuracy is
    that of the labelled pixels, and 1 where there is none. The backward pass computes the resized logits again: kept,
    those of 150 classes at 512 x 512 take 150 MB for each image.

    Args:
      labels: classes; the largest value of their dtype marks a pixel as ignored.
    """
    logits = resize_bilinear(logits.astype(jnp.float32), (labels.shape[1], labels.shape[2]))
    classes = jnp.arange(logits.shape[-1])
    chosen = labels[..., None].astype(jnp.int32) == classes  # all False where ignored
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    labelled = labels != ignore_value(labels.dtype)
    loss = jnp.where(labelled, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    right = labelled & (jnp.argmax(logits, axis=-1) == labels.astype(jnp.int32))
    counted = jnp.sum(labelled, axis=(1, 2))
    accuracy = jnp.where(counted > 0, jnp.sum(right, axis=(1, 2)) / jnp.maximum(counted, 1), 1.0)
    return loss.mean(axis=(1, 2)), accuracy
