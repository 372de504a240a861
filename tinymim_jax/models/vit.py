"""The Vision Transformer encoder."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymim_jax.models.blocks import Block, Dense, LayerNorm, Tap, run_blocks
from tinymim_jax.ops.drop_path import drop_path_rates, drop_path_scales
from tinymim_jax.ops.masking import take_tokens
from tinymim_jax.ops.patches import patchify
from tinymim_jax.ops.posembed import sincos_table

# Width, depth and attention heads of the published sizes, and of two smaller sizes (pico, nano).
PRESETS: dict[str, dict[str, int]] = {
    "pico": {"embed_dim": 96, "depth": 12, "heads": 4},
    "nano": {"embed_dim": 128, "depth": 12, "heads": 4},
    "Ti": {"embed_dim": 192, "depth": 12, "heads": 3},
    "S": {"embed_dim": 384, "depth": 12, "heads": 6},
    "B": {"embed_dim": 768, "depth": 12, "heads": 12},
    "L": {"embed_dim": 1024, "depth": 24, "heads": 16},
    "H": {"embed_dim": 1280, "depth": 32, "heads": 16},
}

Images = Float[Array, "batch height width 3"]
Tokens = Float[Array, "batch tokens dim"]


class ViT(nn.Module):
    """Encodes images as tokens in the order CLS, DIST (if `dist_token`), patches.

    Attributes:
      embed_dim, depth, mlp_ratio: width, number of blocks, hidden width of the MLPs relative to embed_dim.
      heads: attention heads: one number for all blocks, or one for each block.
      patch_size, image_size: in pixels; image_size is (height, width).
      dist_token: adds the distillation token of DeiT (arXiv 2012.12877), a second learned token after CLS.
      pos_embed: 'sincos' is a fixed table, not a parameter; 'learned' is a parameter initialized with that table.
      drop_path, drop_path_schedule: see ops.drop_path.
      final_norm: LayerNorm over the tokens at the end; a mean-pool classifier has none.
      attention: 'auto', 'dense' or 'fused', see ops.attention.choose_form.
      scan, remat: how the blocks are run, see models.blocks.run_blocks.
      dtype: of the computation; parameters are float32.
    """

    embed_dim: int = 768
    depth: int = 12
    heads: int | Sequence[int] = 12
    patch_size: int = 16
    image_size: tuple[int, int] = (224, 224)
    mlp_ratio: float = 4.0
    dist_token: bool = False
    pos_embed: str = "sincos"
    drop_path: float = 0.0
    drop_path_schedule: str = "linear"
    final_norm: bool = True
    scan: bool = False
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens."""
        return 2 if self.dist_token else 1

    @property
    def fixed_table(self) -> np.ndarray:
        """The sin-cos position table, float32 [1, tokens, embed_dim]."""
        return sincos_table(self.embed_dim, self.grid, self.prefix)

    @property
    def block_heads(self) -> tuple[int, ...]:
        """Attention heads of each block."""
        heads = (self.heads,) * self.depth if isinstance(self.heads, int) else tuple(self.heads)
        if len(heads) != self.depth:
            raise ValueError(f"heads names {len(heads)} blocks but depth={self.depth}: give one number or {self.depth}")
        return heads

    def record(self) -> dict:
        """The architecture as plain JSON; it is saved with the parameters so that they can be used without a config.

        `dist_token` is present only if True, so that records from before it existed remain valid.
        """
        record = {
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "heads": list(self.block_heads),
            "patch_size": self.patch_size,
            "image_size": list(self.image_size),
            "mlp_ratio": self.mlp_ratio,
            "pos_embed": self.pos_embed,
            "final_norm": self.final_norm,
        }
        return record | ({"dist_token": True} if self.dist_token else {})

    @classmethod
    def from_record(cls, record: dict, **overrides: Any) -> "ViT":
        """The encoder described by `record`; `overrides` are attributes (dtype, scan, image_size, ...)."""
        fields: dict[str, Any] = dict(record, heads=tuple(record["heads"]), image_size=tuple(record["image_size"]))
        return cls(**(fields | overrides))

    def setup(self):
        if self.pos_embed not in ("sincos", "learned"):
            raise ValueError(f"pos_embed={self.pos_embed!r} is unknown. Choices: 'sincos', 'learned'")
        self.patch_embed = Dense(self.embed_dim, dtype=self.dtype)
        self.cls_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.embed_dim))
        if self.dist_token:
            self.dist = self.param("dist_token", nn.initializers.normal(0.02), (1, 1, self.embed_dim))
        table = self.fixed_table
        if self.pos_embed == "learned":
            self.positions = self.param("pos_embed", lambda key: jnp.asarray(table))
        else:
            self.positions = table
        self.blocks = [
            Block(self.embed_dim, heads, self.mlp_ratio, self.dtype, self.attention) for heads in self.block_heads
        ]
        if self.final_norm:
            self.norm = LayerNorm(self.dtype)

    def __call__(
        self,
        images: Images,
        *,
        keep: Int[Array, "batch kept"] | None = None,
        drop_key: jax.Array | None = None,
    ) -> Tokens:
        """All tokens after the last block (and the final norm), [batch, prefix + patches, embed_dim].

        Args:
          images: normalized pixels.
          keep: positions of the visible patches; None: all are visible.
          drop_key: random key for drop path; None disables it.
        """
        x, scales = self.embed(images, keep), self._path_scales(images, drop_key)
        x = run_blocks(self.blocks, x, scales, scan=self.scan, remat=self.remat)
        return self.finish(x)

    def encode(
        self,
        images: Images,
        *,
        tap: int | Sequence[int],
        keep: Int[Array, "batch kept"] | None = None,
        drop_key: jax.Array | None = None,
    ) -> Tap | tuple[Tap, ...]:
        """Intermediate values of block `tap`, counted from 1, or of several blocks in the given order.

        Takes one forward pass; blocks after the last tapped one are not run.
        """
        wanted = (tap,) if isinstance(tap, int) else tuple(tap)
        for block in wanted:
            if not 1 <= block <= self.depth:
                raise ValueError(f"tap={block} is not a block of this encoder: choose 1 to {self.depth}")
        x, scales = self.embed(images, keep), self._path_scales(images, drop_key)
        taps: dict[int, Tap] = {}
        done = 0
        for block in sorted(set(wanted)):
            between = None if scales is None else scales[done : block - 1]
            x = run_blocks(self.blocks[done : block - 1], x, between, scan=self.scan, remat=self.remat)
            taps[block] = self.blocks[block - 1](x, None if scales is None else scales[block - 1])
            x, done = taps[block].output, block
        return taps[tap] if isinstance(tap, int) else tuple(taps[block] for block in wanted)

    def finish(self, tokens: Tokens) -> Tokens:
        """Applies the final norm, if there is one, to the output of the last block."""
        return self.norm(tokens) if self.final_norm else tokens

    def embed(self, images: Images, keep: Int[Array, "batch kept"] | None = None) -> Tokens:
        """The input of the first block: all tokens with position embeddings added."""
        if images.shape[1:3] != tuple(self.image_size):
            height, width = images.shape[1:3]
            raise ValueError(
                f"got images of {height}x{width}, but this encoder was built for "
                f"{self.image_size[0]}x{self.image_size[1]}: change the image size of the data or of the model"
            )
        patches = patchify(images, self.patch_size)
        positions = jnp.asarray(self.positions, self.dtype)
        patch_positions = positions[:, self.prefix :]
        if keep is not None:
            patches = take_tokens(patches, keep)
            batch_positions = jnp.broadcast_to(patch_positions, (images.shape[0], *patch_positions.shape[1:]))
            patch_positions = take_tokens(batch_positions, keep)
        tokens = self.patch_embed(patches.astype(self.dtype)) + patch_positions
        leading = jnp.concatenate([self.cls_token, self.dist], axis=1) if self.dist_token else self.cls_token
        leading = leading.astype(self.dtype) + positions[:, : self.prefix]
        return jnp.concatenate([jnp.broadcast_to(leading, (tokens.shape[0], *leading.shape[1:])), tokens], axis=1)

    def _path_scales(self, images: Images, drop_key: jax.Array | None) -> Array | None:
        if drop_key is None or self.drop_path == 0:
            return None
        rates = drop_path_rates(self.drop_path, self.depth, self.drop_path_schedule)
        return drop_path_scales(drop_key, rates, images.shape[0])
