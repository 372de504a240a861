"""Loss values in float32, whatever the dtype that comes in."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def masked_pixel_loss(
    prediction: Float[Array, "batch patches pixels"],
    patches: Float[Array, "batch patches pixels"],
    hidden: Bool[Array, "batch patches"],
    *,
    normalize: bool,
) -> Float[Array, "batch"]:
    """Mean squared error over the hidden patches of each image (MAE release, models_mae.py: forward_loss).

    Every image hides equally many patches, so the mean over the batch is the published loss.

    Args:
      prediction: what the decoder says.
      patches: the true pixels of each patch.
      hidden: True where the patch was removed from the encoder.
      normalize: compare with each patch's pixels brought to mean 0 and (unbiased) variance 1.
    """
    target = patches.astype(jnp.float32)
    if normalize:
        mean = target.mean(axis=-1, keepdims=True)
        variance = target.var(axis=-1, keepdims=True, ddof=1)
        target = (target - mean) / jnp.sqrt(variance + 1e-6)
    error = jnp.mean((prediction.astype(jnp.float32) - target) ** 2, axis=-1)  # [batch, patches]
    return jnp.sum(error * hidden, axis=1) / jnp.sum(hidden, axis=1)


def soft_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, "batch"]:
    """Cross-entropy of each example with the distribution `targets`."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def soft_targets(labels: Int[Array, "batch"], classes: int, *, smoothing: float) -> Float[Array, "batch classes"]:
    """One-hot labels in float32, of which `smoothing` is spread evenly over all classes."""
    one_hot = (labels[:, None] == jnp.arange(classes)).astype(jnp.float32)
    return optax.smooth_labels(one_hot, smoothing)
