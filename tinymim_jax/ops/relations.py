"""Token relations: similarities of all pairs of tokens in each head (paper, section 3.1), and how two are compared."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.ops.products import HeadFeatures, Logits, scaled_products


def resplit(
    features: Float[Array, "batch tokens *channels"], heads: int
) -> Float[Array, "batch tokens {heads} new_head_dim"]:
    """The same channels split into `heads` equal heads instead of attention's own (MiniLMv2, arXiv 2012.15828).

    Args:
      features: with heads of their own, or without, [batch, tokens, width].
    """
    return features.reshape(*features.shape[:2], heads, -1)


def cosines(left: HeadFeatures, right: HeadFeatures) -> Logits:
    """The cosine of every pair of tokens in each head, float32; a zero vector has cosine 0 with all others.

    The products are of the operands' dtype, summed in float32, and divided by float32 lengths afterwards: dividing the
    vectors first would round them twice.
    """
    products = scaled_products(left, right) * left.shape[-1] ** 0.5
    return products * _inverse_lengths(left)[..., :, None] * _inverse_lengths(right)[..., None, :]


def _inverse_lengths(features: HeadFeatures) -> Float[Array, "batch heads tokens"]:
    squares = jnp.sum(jnp.square(features.astype(jnp.float32)), axis=-1)
    return jnp.moveaxis(jax.lax.rsqrt(jnp.maximum(squares, 1e-12)), 1, 2)


def relation_kl(student: Logits, teacher: Logits) -> Float[Array, "batch"]:
    """KL(teacher || student) of the softmaxes, summed over keys, averaged over heads and queries, for each image.

    Both arguments are logits. (The authors' code takes the logarithm of a softmax, which is -inf after underflow.)
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32), axis=-1)
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)  # [batch, heads, queries]
    return jnp.mean(divergence, axis=(1, 2))


def relation_cka(student: Logits, teacher: Logits) -> Float[Array, "batch"]:
    """1 - centred kernel alignment of the two relations, averaged over heads, for each image.

    For the products of one feature with itself this is linear CKA of the tokens (Kornblith et al., arXiv 1905.00414,
    section 3). It does not depend on the scale of either relation.
    """
    student, teacher = _centred(student), _centred(teacher)

    def inner(a: Array, b: Array) -> Float[Array, "batch heads"]:
        return jnp.sum(a * b, axis=(-2, -1))

    lengths = (jax.lax.rsqrt(jnp.maximum(inner(x, x), 1e-12)) for x in (student, teacher))
    alignment = inner(student, teacher)
    for inverse in lengths:
        alignment *= inverse
    return jnp.mean(1.0 - alignment, axis=1)


def _centred(relation: Logits) -> Logits:
    """Rows and columns have mean 0: the relation of the tokens after their mean is subtracted from each."""
    relation = relation.astype(jnp.float32)
    relation -= jnp.mean(relation, axis=-1, keepdims=True)
    return relation - jnp.mean(relation, axis=-2, keepdims=True)
