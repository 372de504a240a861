"""KL divergences of softmaxes inside kernels, and what the relation kernels share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from tinymim_jax.ops.kernels.tiles import LANES

Relations = tuple[tuple[int, int], ...]
"""A relation as two parts of (q, k, v): "qk" is (0, 1)."""


def kl_and_difference(logits: Array, teacher_logits: Array, axis: int) -> tuple[Array, Array]:
    """(KL of each query, softmax of student less that of teacher) of float32 logits with the keys along `axis`."""
    weights, shifted, log_total = _softmax(logits, axis)
    teacher_weights, teacher_shifted, teacher_log_total = _softmax(teacher_logits, axis)
    # With logits minus their maximum, both are near zero where the teacher has its weight: no large terms cancel.
    expected = jnp.sum(teacher_weights * (teacher_shifted - shifted), axis=axis, keepdims=True)
    return expected - teacher_log_total + log_total, weights - teacher_weights


def in_lanes(values: list[Array]) -> Array:
    """Numbers [1, 1] as the first lanes of [1, LANES]; zeros behind them."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = jnp.zeros((1, LANES), jnp.float32)
    for index, value in enumerate(values):
        row = jnp.where(lane == index, value, row)
    return row


def _softmax(logits: Array, axis: int) -> tuple[Array, Array, Array]:
    """(softmax, logits less their maximum, logarithm of the sum of exponentials of these)."""
    shifted = logits - jnp.max(logits, axis=axis, keepdims=True)
    powers = jnp.exp(shifted)
    total = jnp.sum(powers, axis=axis, keepdims=True)
    return powers * (1.0 / total), shifted, jnp.log(total)
