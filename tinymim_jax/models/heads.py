"""Classifiers: an encoder, pooling and one or two linear heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.blocks import Dense, LayerNorm
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.placement import split_batch
from tinymim_jax.ops.products import full_precision

POOLS = ("mean", "cls")

Images = Float[Array, "batch height width 3"]
Tokens = Float[Array, "batch tokens dim"]
Features = Float[Array, "batch dim"]
Logits = Float[Array, "batch classes"]


def pool_tokens(tokens: Tokens, pool: str, prefix: int) -> Features:
    """float32: the mean of the patch tokens, which come after `prefix` others, or the 'cls' token."""
    tokens = tokens.astype(jnp.float32)
    return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(axis=1)


class Widen(nn.Module):
    """LayerNorm, Linear, GELU on every token: what TinyMIM*-T has behind its last block (its release calls it conv1x1).

    Its LayerNorm has torch's default eps, 1e-5, unlike all others.
    """

    dim: int
    dtype: Any = jnp.float32

    def setup(self):
        self.norm = LayerNorm(self.dtype, eps=1e-5)
        self.linear = Dense(self.dim, dtype=self.dtype)

    def __call__(self, tokens: Tokens) -> Float[Array, "batch tokens wide"]:
        return gelu(self.linear(self.norm(tokens)))


class Classifier(nn.Module):
    """Logits from images (models_vit.py of the TinyMIM release; with a DIST token as DeiT's distilled models).

    Attributes:
      encoder: with `final_norm` True for 'cls' pooling without `hidden_dim`, otherwise False. Where it has a DIST
        token, a second head `head_dist` reads that token, and the answer is the mean of both heads' logits.
      classes: width of the heads.
      pool: what the first head reads. 'mean' averages the patch tokens, and a norm follows (before the second head
        too); 'cls' takes the CLS token, normalised by the encoder's final norm or before widening.
      hidden_dim: width to which tokens are brought (see Widen) before they are pooled; 0: as they are.
      norm_first: with 'mean' pooling and `hidden_dim`, what is pooled is normalised first and widened then.
      head_std: the heads start as truncated normals of this deviation.
    """

    encoder: ViT
    classes: int
    pool: str = "mean"
    hidden_dim: int = 0
    norm_first: bool = False
    head_std: float = 2e-5

    def record(self) -> dict[str, Any]:
        """What is not the encoder's, as plain JSON: `Classifier(encoder, **record)` is this network."""
        optional = {"hidden_dim": self.hidden_dim, "norm_first": self.norm_first}
        return {"classes": self.classes, "pool": self.pool} | {name: value for name, value in optional.items() if value}

    def setup(self):
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown. Choices: {', '.join(map(repr, POOLS))}")
        if self.norm_first and not (self.hidden_dim and self.pool == "mean"):
            raise ValueError("norm_first=True needs pool='mean' and a hidden_dim: it orders the norm and the widening")
        final_norm = needs_final_norm(self.pool, self.hidden_dim)
        if self.encoder.final_norm != final_norm:
            raise ValueError(
                f"pool={self.pool!r} and hidden_dim={self.hidden_dim} need an encoder with final_norm={final_norm}"
            )
        if self.hidden_dim:
            self.widen = Widen(self.hidden_dim, self.encoder.dtype)
        if self.pool == "mean":
            self.fc_norm = LayerNorm()
        self.head = self._linear()
        if self.encoder.dist_token:
            self.head_dist = self._linear()

    def __call__(self, images: Images, *, drop_key: jax.Array | None = None) -> Logits:
        """float32 logits."""
        first, second = self.logits(images, drop_key=drop_key)
        return first if second is None else (first + second) / 2

    def logits(self, images: Images, *, drop_key: jax.Array | None = None) -> tuple[Logits, Logits | None]:
        """float32 logits of each head; None for the second where the encoder has no DIST token."""
        read = self._read(images, drop_key)
        first = split_batch(self.head(split_batch(read[:, 0])))
        return first, split_batch(self.head_dist(split_batch(read[:, 1]))) if self.encoder.dist_token else None

    def features(self, images: Images, *, drop_key: jax.Array | None = None) -> Features:
        """float32 image features: what the first head sees."""
        return self._read(images, drop_key)[:, 0]

    def _read(self, images: Images, drop_key: jax.Array | None) -> Float[Array, "batch heads dim"]:
        """What each head sees."""
        prefix = self.encoder.prefix
        tokens = self.encoder(images, drop_key=drop_key)
        if self.pool == "cls":
            tokens = tokens[:, :prefix]  # the rest is not widened
        if self.hidden_dim and not self.norm_first:
            tokens = self.widen(tokens)
        read = pool_tokens(tokens, self.pool, prefix)[:, None]
        if self.encoder.dist_token:
            read = jnp.concatenate([read, tokens[:, 1:2].astype(jnp.float32)], axis=1)
        if self.pool == "mean":
            read = self.fc_norm(read)
        return self.widen(read).astype(jnp.float32) if self.norm_first else read

    def _linear(self) -> nn.Dense:
        start = nn.initializers.truncated_normal(self.head_std)
        return nn.Dense(self.classes, kernel_init=start, precision=full_precision(jnp.float32))


def needs_final_norm(pool: str, hidden_dim: int) -> bool:
    """Whether a Classifier's encoder ends in a norm: only where nothing else normalises what the heads read."""
    return pool == "cls" and not hidden_dim
