"""Weighted k-nearest-neighbour classification by cosine similarity, as DINO evaluates features (arXiv 2104.14294)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinymim_jax.ops.products import full_precision


def unit_length(features: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Each row scaled to length 1; a row of zeros is unchanged."""
    lengths = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)


def nearest(
    queries: Float[Array, "queries dim"],
    bank: Float[Array, "bank dim"],
    labels: Int[Array, "bank"],
    valid: Bool[Array, "bank"],
    k: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Similarity and label of the k rows of `bank` most similar to each query, most similar first.

    Rows of `queries` and `bank` have length 1. Rows of `bank` that are not valid have similarity -inf.
    """
    similarities = jnp.where(valid, jnp.matmul(queries, bank.T, precision=full_precision(bank.dtype)), -jnp.inf)
    best, places = jax.lax.top_k(similarities, min(k, bank.shape[0]))
    return best, labels[places]


def vote(
    similarities: Float[Array, "queries k"], labels: Int[Array, "queries k"], classes: int, temperature: float
) -> Float[Array, "queries classes"]:
    """The weights exp(similarity / temperature) of the neighbors, summed by class.

    Weights are divided by the best neighbor's: the ranking is the same and small temperatures do not overflow.
    """
    weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
    rows = jnp.arange(labels.shape[0])[:, None]
    return jnp.zeros((labels.shape[0], classes), jnp.float32).at[rows, labels].add(weights)
