"""Top-k accuracy."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def in_top(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], k: int) -> Float[Array, "batch"]:
    """float32: 1 where the label is among the k highest scores, else 0; ties are ranked in the order of the classes."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    # No score compares greater than NaN, so a label whose score is NaN would count as correct.
    return ((jnp.sum(ahead, axis=1) < k) & jnp.isfinite(own[:, 0])).astype(jnp.float32)
