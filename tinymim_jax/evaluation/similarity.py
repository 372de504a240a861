"""Measures of layers: CKA, attention distance and entropy, effective rank, k-NN and linear accuracy of features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.ops.neighbors import nearest, unit_length, vote
from tinymim_jax.ops.products import full_precision, scaled_products

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # relative to features of variance 1
_HELD_OUT = 0.1


def gram(features: jax.Array) -> jax.Array:
    """Products of all pairs of images, float32 [n, n], of features [n, ...] from which their mean is subtracted."""
    rows = features.reshape(features.shape[0], -1).astype(jnp.float32)
    rows = rows - rows.mean(axis=0)
    return jnp.matmul(rows, rows.T, precision=full_precision(rows.dtype))


def hsic(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimator of HSIC from two Gram matrices [n, n], n >= 4 (Song et al. 2012, JMLR 13, equation 5).

    Minibatch CKA averages it over batches, numerator and denominator apart (Nguyen et al., arXiv 2010.15327, eq. 3).
    """
    n = len(first)
    if n < 4:
        raise ValueError(f"HSIC needs at least 4 images, got {n}")
    a, b = (np.array(matrix, np.float64) for matrix in (first, second))
    np.fill_diagonal(a, 0.0)
    np.fill_diagonal(b, 0.0)
    rows_a, rows_b = a.sum(axis=1), b.sum(axis=1)
    total = np.sum(a * b) + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows_a @ rows_b
    return float(total / (n * (n - 3)))


def cka(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Linear minibatch CKA, float64 [blocks, other blocks].

    Args:
      first, second: Gram matrices [batches, blocks, n, n] of two networks for the same images.
    """
    cross = np.mean([[[hsic(a, b) for b in theirs] for a in ours] for ours, theirs in zip(first, second)], axis=0)
    own, other = (np.mean([[hsic(a, a) for a in one] for one in each], axis=0) for each in (first, second))
    scale = np.sqrt(np.maximum(own[:, None] * other[None], 1e-300))
    return cross / scale


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim) + bias), float32 [batch, heads, queries, keys].

    Args:
      bias: of relative positions, [heads, queries, keys]; None for none.
    """
    logits = scaled_products(q.astype(jnp.float32), k.astype(jnp.float32))
    return jax.nn.softmax(logits if bias is None else logits + bias.astype(jnp.float32), axis=-1)


def attention_distance(weights: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Mean distance of query and key in pixels, weighted by attention, [batch, heads] (Raghu et al., 2108.08810).

    Args:
      weights: [batch, heads, tokens, tokens]; the last `rows * columns` tokens are the patches. Attention to and of
        other tokens is left out, and what remains of each query sums to 1 again.
    """
    patches = grid[0] * grid[1]
    places = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"), -1).reshape(patches, 2)
    distance = patch_size * np.linalg.norm(places[:, None] - places[None], axis=-1)  # [queries, keys]
    between = weights[:, :, -patches:, -patches:]
    between = between / jnp.maximum(between.sum(axis=-1, keepdims=True), 1e-30)
    return jnp.mean(jnp.sum(between * distance.astype(np.float32), axis=-1), axis=-1)


def attention_entropy(weights: jax.Array) -> jax.Array:
    """Entropy over the keys in nats, averaged over the queries, [batch, heads]."""
    return -jnp.mean(jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1), axis=-1)


def effective_rank(features: np.ndarray) -> float:
    """exp(entropy of the normalized singular values) of features [n, dim] (RankMe, Garrido et al., 2210.02885)."""
    values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-300)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


@functools.partial(jax.jit, static_argnums=3)
def _votes(bank: jax.Array, labels: jax.Array, queries: jax.Array, classes: int) -> jax.Array:
    valid = jnp.ones(len(bank), bool)
    similarities, theirs = nearest(unit_length(queries), unit_length(bank), labels, valid, 20)
    return vote(similarities, theirs, classes, 0.07)


def knn_accuracy(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, wanted: np.ndarray, classes: int) -> float:
    """Top-1 of weighted 20-NN by cosine similarity (DINO's protocol, temperature 0.07)."""
    votes = np.asarray(_votes(bank, labels, queries, classes))
    return float((votes.argmax(axis=1) == wanted).mean())


def linear_accuracy(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, wanted: np.ndarray, classes: int
) -> float:
    """Top-1 of ridge regression on one-hot labels, of standardized features.

    The strength of the ridge is the one of _RIDGES with the best top-1 on a held-out tenth of the bank.
    """
    mean, std = bank.mean(axis=0, dtype=np.float64), bank.std(axis=0, dtype=np.float64)
    scale = 1 / np.sqrt(std**2 + 1e-12)
    x, y = (bank - mean) * scale, np.eye(classes)[labels]
    order = np.random.default_rng(0).permutation(len(x))
    held = max(1, round(_HELD_OUT * len(x)))
    test, fit = order[:held], order[held:]
    found = {ridge: _hits(_ridge(x[fit], y[fit], ridge), x[test], labels[test]) for ridge in _RIDGES}
    best = max(found, key=lambda ridge: found[ridge])
    return _hits(_ridge(x, y, best), (queries - mean) * scale, wanted)


def _ridge(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    centre_x, centre_y = x.mean(axis=0), y.mean(axis=0)
    moved = x - centre_x
    matrix = moved.T @ moved + strength * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(matrix, moved.T @ (y - centre_y))
    return weights, centre_y - centre_x @ weights


def _hits(model: tuple[np.ndarray, np.ndarray], x: np.ndarray, wanted: np.ndarray) -> float:
    weights, bias = model
    return float(((x @ weights + bias).argmax(axis=1) == wanted).mean())
