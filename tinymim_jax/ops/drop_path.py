"""Stochastic depth: residual branches are dropped at random for each image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def drop_path_rates(rate: float, depth: int, schedule: str) -> tuple[float, ...]:
    """The drop rate of each block.

    'linear' rises from 0 at the first block to `rate` at the last (fine-tuning, as timm does);
    'constant' is `rate` everywhere but 0 at the last block (TinyMIM's student, models_tinymim.py).
    """
    if schedule == "linear":
        return tuple(float(r) for r in np.linspace(0.0, rate, depth))
    if schedule == "constant":
        return (float(rate),) * (depth - 1) + (0.0,)
    raise ValueError(f"drop_path_schedule={schedule!r} is unknown. Choices: 'linear', 'constant'")


def drop_path_scales(key: jax.Array, rates: Sequence[float], batch: int) -> Float[Array, "depth 2 batch"]:
    """Factors for both residual branches of every block: 0 with the block's rate, else 1 / (1 - rate)."""
    keep = 1.0 - jnp.asarray(rates, jnp.float32)[:, None, None]
    kept = jax.random.uniform(key, (len(rates), 2, batch)) < keep
    return kept / keep
