"""Token relations: softmax similarities of all pairs of tokens in each head (paper, section 3.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.ops.products import HeadFeatures, Logits


def resplit(features: HeadFeatures, heads: int) -> Float[Array, "batch tokens {heads} new_head_dim"]:
    """The same channels split into `heads` equal heads instead of attention's own (MiniLMv2, arXiv 2012.15828)."""
    return features.reshape(*features.shape[:2], heads, -1)


def relation_kl(student: Logits, teacher: Logits) -> Float[Array, "batch"]:
    """KL(teacher || student) of the softmaxes, summed over keys, averaged over heads and queries, for each image.

    Both arguments are logits. (The authors' code takes the logarithm of a softmax, which is -inf after underflow.)
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32), axis=-1)
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)  # [batch, heads, queries]
    return jnp.mean(divergence, axis=(1, 2))
