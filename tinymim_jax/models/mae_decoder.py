"""The masked autoencoder: an encoder of the visible patches and a small decoder that predicts all patches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymim_jax.models.blocks import Block, run_blocks
from tinymim_jax.models.layers import Dense, LayerNorm
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.masking import Masking, take_tokens
from tinymim_jax.ops.posembed import sincos_table
from tinymim_jax.ops.token_grid import without_extra_tokens

Tokens = Float[Array, "batch tokens dim"]


class MaeDecoder(nn.Module):
    """Predicts the pixels of every patch from the encoded visible patches (models_mae.py: forward_decoder).

    Attributes:
      cls: whether a CLS token comes before the patches; it has the position 0.
    """

    grid: tuple[int, int]
    patch_size: int
    embed_dim: int = 512
    depth: int = 8
    heads: int = 16
    scan: bool = False
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = jnp.float32
    cls: bool = True

    def setup(self):
        self.embed = Dense(self.embed_dim, dtype=self.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.embed_dim))
        block = {"dtype": self.dtype, "attention": self.attention}
        self.blocks = [Block(self.embed_dim, self.heads, **block) for _ in range(self.depth)]
        self.norm = LayerNorm(self.dtype)
        self.pred = Dense(self.patch_size**2 * 3, dtype=self.dtype)

    def __call__(self, latent: Tokens, restore: Int[Array, "batch patches"]) -> Float[Array, "batch patches pixels"]:
        """Predicted pixels [batch, patches, patch_size^2 * 3] from `latent` [batch, cls + kept, encoder width]."""
        x, prefix = self.embed(latent), int(self.cls)
        batch, kept = x.shape[0], x.shape[1] - prefix
        hidden = jnp.broadcast_to(self.mask_token.astype(self.dtype), (batch, restore.shape[1] - kept, self.embed_dim))
        patches = take_tokens(jnp.concatenate([x[:, prefix:], hidden], axis=1), restore)
        x = jnp.concatenate([x[:, :prefix], patches], axis=1)
        x = x + jnp.asarray(sincos_table(self.embed_dim, self.grid, prefix), self.dtype)
        x = run_blocks(self.blocks, x, scan=self.scan, remat=self.remat)
        return self.pred(self.norm(x)[:, prefix:])


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder together; the parameters are `encoder/...` and `decoder/...`.

    The decoder sees the patches and the CLS token, of several the first; registers are for the encoder alone.
    """

    encoder: ViT
    decoder: MaeDecoder

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        masking: Masking,
        *,
        drop_key: jax.Array | None = None,
    ) -> Float[Array, "batch patches pixels"]:
        """Predicted pixels of every patch, [batch, patches, patch_size^2 * 3]."""
        latent = self.encoder(images, keep=masking.keep, drop_key=drop_key)
        return self.decoder(without_extra_tokens(latent, self.encoder.prefix, int(self.decoder.cls)), masking.restore)
