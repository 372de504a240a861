"""Batch norm over the last axis with float32 statistics, as in torch, without scale and shift.

Statistics are over the whole batch. Under jit a batch that is split over devices is still one batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6  # of MAE's linear probe (main_linprobe.py); torch's own default is 1e-5
MOMENTUM = 0.1  # torch's: the share of the newest batch in the running statistics

Features = Float[Array, "*batch dim"]
Vector = Float[Array, "dim"]


def batch_norm(x: Features, mean: Vector, variance: Vector, *, eps: float = EPS) -> Features:
    """`(x - mean) / sqrt(variance + eps)`, float32."""
    return (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + eps)


def batch_moments(x: Features) -> tuple[Vector, Vector]:
    """Mean and (biased) variance over all axes but the last, float32: used for normalising in training."""
    x, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = x.mean(axis=axes)
    return mean, jnp.square(x - mean).mean(axis=axes)


def update_running_stats(running: dict[str, Vector], mean: Vector, variance: Vector, count: int) -> dict[str, Vector]:
    """The running {"mean", "variance"} after a batch of `count` values each; like torch, of unbiased variances."""
    unbiased = variance * (count / max(count - 1, 1))
    return {
        "mean": (1 - MOMENTUM) * running["mean"] + MOMENTUM * mean,
        "variance": (1 - MOMENTUM) * running["variance"] + MOMENTUM * unbiased,
    }
