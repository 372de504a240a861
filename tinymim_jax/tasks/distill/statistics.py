"""Mean and standard deviation of each channel of the teacher's features, estimated once at the start of a training.

A teacher without a final norm, or one with a few channels of huge values, needs another scale than LayerNorm gives it
(Theia, arXiv 2407.20179; AM-RADIO, arXiv 2312.06709). The estimates are parameters without a gradient, so they are
saved with the run.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Statistics = dict[str, Array]
Features = Float[Array, "batch tokens width"]


def no_statistics(width: int) -> Statistics:
    """Before the first image: mean 0 and variance 1, which change nothing."""
    return {"images": jnp.zeros(()), "mean": jnp.zeros(width), "variance": jnp.ones(width)}


def update_statistics(statistics: Statistics, features: Features, limit: int) -> Statistics:
    """`statistics` of the images so far and of these; unchanged once `limit` images or more were counted.

    All are float32. Two sets are merged by their sizes (Chan et al., 1979), so their order does not matter.

    Args:
      features: of the whole batch; every image has equally many tokens.
    """
    features = features.astype(jnp.float32)
    mean, variance = jnp.mean(features, axis=(0, 1)), jnp.var(features, axis=(0, 1))
    images = statistics["images"] + features.shape[0]
    share = features.shape[0] / images
    difference = mean - statistics["mean"]
    merged = {
        "images": images,
        "mean": statistics["mean"] + share * difference,
        "variance": (1 - share) * (statistics["variance"] + share * difference**2) + share * variance,
    }
    counting = statistics["images"] < limit
    return {name: jnp.where(counting, merged[name], statistics[name]) for name in statistics}


def standardize(features: Features, statistics: Statistics) -> Features:
    """Each channel minus its mean, divided by its standard deviation; float32."""
    deviation = jnp.sqrt(statistics["variance"] + 1e-6)
    return (features.astype(jnp.float32) - statistics["mean"]) / deviation
