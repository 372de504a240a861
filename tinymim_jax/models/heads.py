"""Classifiers: an encoder, pooling and a linear head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.blocks import LayerNorm
from tinymim_jax.models.vit import ViT

POOLS = ("mean", "cls")


class Classifier(nn.Module):
    """Logits from images (models_vit.py of the TinyMIM release).

    Attributes:
      encoder: with `final_norm` False for 'mean' pooling, True for 'cls'.
      classes: width of the head.
      pool: 'mean' averages the patch tokens and normalises the mean; 'cls' takes the normalised CLS token.
      head_std: the head starts as a truncated normal of this deviation.
    """

    encoder: ViT
    classes: int
    pool: str = "mean"
    head_std: float = 2e-5

    def setup(self):
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown. Choices: {', '.join(map(repr, POOLS))}")
        if self.encoder.final_norm != (self.pool == "cls"):
            raise ValueError(f"pool={self.pool!r} needs an encoder with final_norm={self.pool == 'cls'}")
        if self.pool == "mean":
            self.fc_norm = LayerNorm()
        self.head = nn.Dense(self.classes, kernel_init=nn.initializers.truncated_normal(self.head_std))

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, drop_key: jax.Array | None = None
    ) -> Float[Array, "batch classes"]:
        """float32 logits."""
        return self.head(self.features(images, drop_key=drop_key))

    def features(
        self, images: Float[Array, "batch height width 3"], *, drop_key: jax.Array | None = None
    ) -> Float[Array, "batch dim"]:
        """float32 image features: what the head sees."""
        tokens = self.encoder(images, drop_key=drop_key).astype(jnp.float32)
        if self.pool == "cls":
            return tokens[:, 0]
        return self.fc_norm(tokens[:, 1:].mean(axis=1))
