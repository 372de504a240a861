"""Classifiers: an encoder, pooling and one or two linear heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.layers import Dense, LayerNorm
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.layer_norm import EPS
from tinymim_jax.ops.placement import split_batch
from tinymim_jax.ops.products import full_precision

POOLS = ("mean", "cls")
# Of classifiers: also both side by side, CLS first, each after the final norm (DINOv2's linear classifiers).
CLASSIFIER_POOLS = (*POOLS, "cls_mean")

Images = Float[Array, "batch height width 3"]
Tokens = Float[Array, "batch tokens dim"]
Features = Float[Array, "batch dim"]
Logits = Float[Array, "batch classes"]


def pool_tokens(tokens: Tokens, pool: str, encoder: ViT) -> Float[Array, "batch features"]:
    """float32: the mean of the patch tokens of `encoder`, its 'cls' token, of several the first, or both ('cls_mean').

    Raises ValueError for 'cls' where the encoder has no CLS token.
    """
    check_pool(encoder, pool)
    tokens = tokens.astype(jnp.float32)
    if pool == "cls":
        return tokens[:, 0]
    mean = tokens[:, encoder.prefix :].mean(axis=1)
    return mean if pool == "mean" else jnp.concatenate([tokens[:, 0], mean], axis=1)


def check_pool(encoder: ViT, pool: str) -> None:
    """Raises ValueError for 'cls' where the encoder has no CLS token."""
    if pool != "mean" and not encoder.switches.cls_tokens:
        raise ValueError(
            f"pool={pool!r}, but this encoder has no CLS token: choose 'mean', the mean of the patch tokens"
        )


class Widen(nn.Module):
    """LayerNorm, Linear and GELU on every token, after the last block of TinyMIM*-T (its release calls it conv1x1).

    This LayerNorm has torch's default eps, 1e-5; all others have 1e-6.
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
      encoder: its `final_norm` must be False for 'mean' pooling and with `hidden_dim`, otherwise True. If it has a DIST
        token, a second head `head_dist` reads that token and the logits are the mean of both heads'.
      classes: number of classes.
      pool: input of the first head. 'mean': the average of the patch tokens, followed by a norm (which is also applied
        to the second head's input); 'cls': the CLS token, normalized by the encoder's final norm or by Widen;
        'cls_mean': the CLS token and the average of the patch tokens side by side, both after the final norm.
      hidden_dim: width of the Widen layer applied to the tokens before pooling; 0: no such layer.
      norm_first: with 'mean' pooling and `hidden_dim`, pool and normalize first, then apply Widen.
      head_std: standard deviation of the heads' initial weights (truncated normal).
      norm_eps: of the norm behind 'mean' pooling.
    """

    encoder: ViT
    classes: int
    pool: str = "mean"
    hidden_dim: int = 0
    norm_first: bool = False
    head_std: float = 2e-5
    norm_eps: float = EPS

    def record(self) -> dict[str, Any]:
        """The attributes besides the encoder, as plain JSON: `Classifier(encoder, **record)` is this network."""
        optional = {"hidden_dim": self.hidden_dim, "norm_first": self.norm_first}
        record = {"classes": self.classes, "pool": self.pool} | {
            name: value for name, value in optional.items() if value
        }
        return record | ({"norm_eps": self.norm_eps} if self.norm_eps != EPS else {})

    def setup(self):
        if self.pool not in CLASSIFIER_POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown. Choices: {', '.join(map(repr, CLASSIFIER_POOLS))}")
        if self.pool == "cls_mean" and (self.hidden_dim or self.encoder.dist_token):
            raise ValueError("pool='cls_mean' is for one head without a hidden_dim: set that to 0, and no DIST token")
        check_pool(self.encoder, self.pool)
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
            self.fc_norm = LayerNorm(eps=self.norm_eps)
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
        """float32 image features: the input of the first head."""
        return self._read(images, drop_key)[:, 0]

    def _read(self, images: Images, drop_key: jax.Array | None) -> Float[Array, "batch heads dim"]:
        """The input of each head."""
        prefix = self.encoder.prefix
        tokens = self.encoder(images, drop_key=drop_key)
        if self.pool == "cls":
            tokens = tokens[:, :prefix]  # the other tokens are not read
        if self.hidden_dim and not self.norm_first:
            tokens = self.widen(tokens)
        read = pool_tokens(tokens, self.pool, self.encoder)[:, None]
        if self.encoder.dist_token:
            place = self.encoder.switches.cls_tokens  # DIST comes after the CLS tokens
            read = jnp.concatenate([read, tokens[:, place : place + 1].astype(jnp.float32)], axis=1)
        if self.pool == "mean":
            read = self.fc_norm(read)
        return self.widen(read).astype(jnp.float32) if self.norm_first else read

    def _linear(self) -> nn.Dense:
        start = nn.initializers.truncated_normal(self.head_std)
        return nn.Dense(self.classes, kernel_init=start, precision=full_precision(jnp.float32))


def needs_final_norm(pool: str, hidden_dim: int) -> bool:
    """Whether a Classifier's encoder needs its final norm: only if nothing else normalizes the input of the heads."""
    return pool != "mean" and not hidden_dim
