"""Is the right answer among the first k?"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def in_top(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], k: int) -> Float[Array, "batch"]:
    """float32: 1 where the label is among the k highest scores; of equal scores the first class ranks first."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    # Nothing compares above NaN: without this a broken model would be always right.
    return ((jnp.sum(ahead, axis=1) < k) & jnp.isfinite(own[:, 0])).astype(jnp.float32)
