"""The Vision Transformer encoder."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymim_jax.models.blocks import Block, Tap, run_blocks
from tinymim_jax.models.layers import Dense, make_norm
from tinymim_jax.models.stem import ConvStem
from tinymim_jax.models.switches import PLAIN, Switches
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
# (which patches, the token in their place)
Replaced = tuple[Bool[Array, "batch patches"], Float[Array, "1 1 dim"]]


class ViT(nn.Module):
    """Encodes images as tokens in the order CLS, DIST (if `dist_token`), registers (if any), patches.

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
      switches: how the encoder differs from the plain ViT; only models of other authors do.
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
    switches: Switches = PLAIN

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens."""
        return self.switches.cls_tokens + self.dist_token + self.switches.registers

    @property
    def table_prefix(self) -> int:
        """Number of rows before those of the patches in the position table: registers have none."""
        return self.switches.cls_tokens + self.dist_token if self.switches.positions == "all" else 0

    @property
    def fixed_table(self) -> np.ndarray:
        """The sin-cos position table, float32 [1, table_prefix + patches, embed_dim]."""
        return sincos_table(self.embed_dim, self.grid, self.table_prefix)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each block; the last one is that of the encoder's output."""
        return (self.embed_dim,) * (self.depth - 1) + (self.switches.last_dim or self.embed_dim,)

    @property
    def block_heads(self) -> tuple[int, ...]:
        """Attention heads of each block."""
        heads = (self.heads,) * self.depth if isinstance(self.heads, int) else tuple(self.heads)
        if len(heads) != self.depth:
            raise ValueError(f"heads names {len(heads)} blocks but depth={self.depth}: give one number or {self.depth}")
        return heads

    def record(self) -> dict:
        """The architecture as plain JSON; it is saved with the parameters so that they can be used without a config.

        `dist_token` and `switches` are present only if they differ from the default, so that records from before they
        existed remain valid.
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
        record |= {"dist_token": True} if self.dist_token else {}
        switches = self.switches.record()
        return record | ({"switches": switches} if switches else {})

    @classmethod
    def from_record(cls, record: dict, **overrides: Any) -> "ViT":
        """The encoder described by `record`; `overrides` are attributes (dtype, scan, image_size, ...)."""
        fields: dict[str, Any] = dict(record, heads=tuple(record["heads"]), image_size=tuple(record["image_size"]))
        fields["switches"] = Switches.from_record(record.get("switches", {}))
        return cls(**(fields | overrides))

    def setup(self):
        if self.pos_embed not in ("sincos", "learned"):
            raise ValueError(f"pos_embed={self.pos_embed!r} is unknown. Choices: 'sincos', 'learned'")
        switches = self.switches
        token = nn.initializers.normal(0.02)
        if switches.stem == "conv":
            self.stem = ConvStem(self.embed_dim, self.patch_size, self.dtype)
        else:
            self.patch_embed = Dense(self.embed_dim, self.dtype, switches.patch_bias)
        if switches.patch_norm:
            self.patch_norm = make_norm(switches, self.dtype)
        leading = []
        if switches.cls_tokens:
            leading.append(self.param("cls_token", token, (1, switches.cls_tokens, self.embed_dim)))
        if self.dist_token:
            leading.append(self.param("dist_token", token, (1, 1, self.embed_dim)))
        self.leading = leading
        if switches.registers:
            self.registers = self.param("registers", token, (1, switches.registers, self.embed_dim))
        if switches.positions != "none":
            table = self.fixed_table
            learned = self.pos_embed == "learned"
            self.positions = self.param("pos_embed", lambda key: jnp.asarray(table)) if learned else table
        if switches.pre_norm:
            self.pre_norm = make_norm(switches, self.dtype)
        self.blocks = [
            Block(width, heads, self.mlp_ratio, self.dtype, self.attention, switches, self.grid, self.prefix)
            for width, heads in zip(self.widths, self.block_heads)
        ]
        if switches.last_dim:
            self.widen = Dense(switches.last_dim, self.dtype)
        if self.final_norm:
            self.norm = make_norm(switches, self.dtype)

    def __call__(
        self,
        images: Images,
        *,
        keep: Int[Array, "batch kept"] | None = None,
        drop_key: jax.Array | None = None,
    ) -> Tokens:
        """All tokens after the last block (and the final norm), [batch, prefix + patches, widths[-1]].

        Args:
          images: normalized pixels.
          keep: positions of the visible patches; None: all are visible.
          drop_key: random key for drop path; None disables it.
        """
        x, scales = self.embed(images, keep), self._path_scales(images, drop_key)
        return self.finish(self._run(x, 0, self.depth, scales, keep))

    def encode(
        self,
        images: Images,
        *,
        tap: int | Sequence[int],
        keep: Int[Array, "batch kept"] | None = None,
        drop_key: jax.Array | None = None,
        replaced: Replaced | None = None,
    ) -> Tap | tuple[Tap, ...]:
        """Intermediate values of block `tap`, counted from 1, or of several blocks in the given order.

        Takes one forward pass; blocks after the last tapped one are not run.

        Args:
          keep, drop_key: as of a call.
          replaced: patches whose tokens are replaced by another before positions are added; None: no patches.
        """
        wanted = (tap,) if isinstance(tap, int) else tuple(tap)
        for block in wanted:
            if not 1 <= block <= self.depth:
                raise ValueError(f"tap={block} is not a block of this encoder: choose 1 to {self.depth}")
        x, scales = self.embed(images, keep, replaced), self._path_scales(images, drop_key)
        taps: dict[int, Tap] = {}
        done = 0
        for block in sorted(set(wanted)):
            x = self._run(x, done, block - 1, scales, keep)
            if self._is_widened(block - 1):
                x = self.widen(x)
            taps[block] = self.blocks[block - 1](x, None if scales is None else scales[block - 1], keep)
            x, done = taps[block].output, block
        return taps[tap] if isinstance(tap, int) else tuple(taps[block] for block in wanted)

    def _run(self, x: Array, start: int, stop: int, scales: Array | None, keep: Array | None) -> Array:
        """The residual stream after blocks `start` to `stop - 1`, counted from 0, from that before block `start`."""
        if start < stop and self._is_widened(stop - 1):
            x, start = self.widen(self._run(x, start, stop - 1, scales, keep)), stop - 1
        scales = None if scales is None else scales[start:stop]
        return run_blocks(self.blocks[start:stop], x, scales, scan=self.scan, remat=self.remat, keep=keep)

    def _is_widened(self, block: int) -> bool:
        """Whether the input of this block, counted from 0, is widened."""
        return bool(self.switches.last_dim) and block == self.depth - 1

    def finish(self, tokens: Tokens) -> Tokens:
        """Applies the final norm, if there is one, to the output of the last block."""
        return self.norm(tokens) if self.final_norm else tokens

    def embed(
        self, images: Images, keep: Int[Array, "batch kept"] | None = None, replaced: Replaced | None = None
    ) -> Tokens:
        """The input of the first block: all tokens with position embeddings added."""
        if images.shape[1:3] != tuple(self.image_size):
            height, width = images.shape[1:3]
            raise ValueError(
                f"got images of {height}x{width}, but this encoder was built for "
                f"{self.image_size[0]}x{self.image_size[1]}: change the image size of the data or of the model"
            )
        tokens = self._patch_tokens(images, keep)
        if self.switches.patch_norm:
            tokens = self.patch_norm(tokens)
        if replaced is not None:
            which, token = replaced
            tokens = jnp.where(which[:, :, None], token.astype(tokens.dtype), tokens)
        leading = [token.astype(self.dtype) for token in self.leading]
        if self.switches.positions != "none":
            positions = jnp.asarray(self.positions, self.dtype)
            tokens = tokens + self._patch_positions(positions, keep, images.shape[0])
            if self.table_prefix:
                leading = [jnp.concatenate(leading, axis=1) + positions[:, : self.table_prefix]]
        if self.switches.registers:
            leading.append(self.registers.astype(self.dtype))
        repeated = [jnp.broadcast_to(token, (tokens.shape[0], *token.shape[1:])) for token in leading]
        tokens = jnp.concatenate([*repeated, tokens], axis=1) if repeated else tokens
        return self.pre_norm(tokens) if self.switches.pre_norm else tokens

    def _patch_tokens(self, images: Images, keep: Array | None) -> Tokens:
        if self.switches.stem == "conv":
            if keep is not None:
                raise ValueError(
                    "model.stem='conv': neighboring patches see a hidden one through the convolutions; set "
                    "model.stem='linear', or distill.mask_ratio=0"
                )
            return self.stem(images)
        patches = patchify(images, self.patch_size)
        if keep is not None:
            patches = take_tokens(patches, keep)
        return self.patch_embed(patches.astype(self.dtype))

    def _patch_positions(self, positions: Array, keep: Array | None, batch: Any) -> Array:
        of_patches = positions[:, self.table_prefix :]
        if keep is None:
            return of_patches
        return take_tokens(jnp.broadcast_to(of_patches, (batch, *of_patches.shape[1:])), keep)

    def _path_scales(self, images: Images, drop_key: jax.Array | None) -> Array | None:
        if drop_key is None or self.drop_path == 0:
            return None
        rates = drop_path_rates(self.drop_path, self.depth, self.drop_path_schedule)
        return drop_path_scales(drop_key, rates, images.shape[0])
