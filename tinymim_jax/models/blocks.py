"""The pre-norm transformer block, its intermediate values, and running a stack of blocks."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymim_jax.models.layers import Dense, make_norm
from tinymim_jax.models.mlp import Mlp
from tinymim_jax.models.switches import PLAIN, Switches
from tinymim_jax.ops.attention import joint_attention, split_heads
from tinymim_jax.ops.placement import split_batch
from tinymim_jax.ops.relative_bias import bias_rows, relative_bias
from tinymim_jax.ops.rope import Rope, angles, rotate

Tokens = Float[Array, "batch tokens dim"]
HeadFeatures = Float[Array, "batch tokens heads head_dim"]
PathScales = Float[Array, "2 batch"]

# Which intermediate values of a block the backward pass may keep; all others are recomputed.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Tap:
    """Intermediate values of one block. Under jit, values that are not used are never computed.

    q, k, v: [batch, tokens, heads, head_dim], as they enter the products: with biases, and q and k rotated if the
      encoder has rotary positions.
    qkv: the same in one array, [batch, tokens, 3 dim], columns ordered (q|k|v, head, channel).
    attention, ffn: what each branch adds to the residual stream, with LayerScale, [batch, tokens, dim].
    middle, output: the residual stream after the attention branch and after the whole block, [batch, tokens, dim].
    """

    q: HeadFeatures
    k: HeadFeatures
    v: HeadFeatures
    qkv: Float[Array, "batch tokens three_dim"]
    attention: Tokens
    middle: Tokens
    ffn: Tokens
    output: Tokens


@flax.struct.dataclass
class OutputTap(Tap):
    """A Tap of a network without attention: everything except `output` is None."""

    q: Any = None
    k: Any = None
    v: Any = None
    qkv: Any = None
    attention: Any = None
    middle: Any = None
    ffn: Any = None
    output: Any = None


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    dim: int
    heads: int
    dtype: Any = jnp.float32
    form: str = "auto"
    switches: Switches = PLAIN
    grid: tuple[int, int] = (0, 0)
    prefix: int = 1

    def setup(self):
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {self.dim}: choose a divisor of it")
        self.qkv = Dense(3 * self.dim, self.dtype, self.switches.qkv_bias == "qkv", into_kernel=True)
        if self.switches.qkv_bias == "qv":
            self.q_bias = self.param("q_bias", nn.initializers.zeros, (self.dim,))
            self.v_bias = self.param("v_bias", nn.initializers.zeros, (self.dim,))
        if self.switches.relative_bias:
            rows = bias_rows(self.grid, self.prefix)
            self.relative_bias = self.param("relative_bias", nn.initializers.zeros, (rows, self.heads))
        if self.switches.attention_norm:
            self.norm = make_norm(self.switches, self.dtype)
        self.proj = Dense(self.dim, self.dtype, self.switches.linear_bias)

    def __call__(
        self, x: Tokens, keep: Int[Array, "batch kept"] | None = None
    ) -> tuple[Float[Array, "batch tokens three_dim"], Tokens]:
        """(q, k and v as attention uses them, the output).

        The columns are ordered (q|k|v, head, channel), as in the PyTorch checkpoints.

        Args:
          keep: positions of the visible patches; None: all are visible.
        """
        qkv = self.qkv(x)
        if self.switches.qkv_bias == "qv":
            bias = jnp.concatenate([self.q_bias, jnp.zeros_like(self.q_bias), self.v_bias])
            qkv = qkv + bias.astype(self.dtype)
        if self.switches.rope is not None:
            qkv = self._rotated(qkv, self.switches.rope, keep)
        positions = None
        if self.switches.relative_bias:
            if keep is not None:
                raise ValueError("an encoder with relative position biases takes all patches: it cannot be masked")
            positions = relative_bias(self.relative_bias, self.grid, self.prefix)
        attended = joint_attention(qkv, self.heads, self.form, positions)
        return qkv, self.proj(self.norm(attended) if self.switches.attention_norm else attended)

    def _rotated(self, qkv: Array, rope: Rope, keep: Array | None) -> Array:
        angle: Any = angles(rope, self.grid, self.dim // self.heads)
        if keep is not None:
            angle = jnp.asarray(angle)[keep]
        q, k, v = split_heads(qkv, self.heads)
        parts = (rotate(q, angle, rope.layout), rotate(k, angle, rope.layout), v)
        return jnp.stack(parts, axis=2).reshape(qkv.shape)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (vit.py of the TinyMIM release)."""

    dim: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    attention: str = "auto"
    switches: Switches = PLAIN
    grid: tuple[int, int] = (0, 0)
    prefix: int = 1

    def setup(self):
        self.norm1 = make_norm(self.switches, self.dtype)
        self.attn = Attention(self.dim, self.heads, self.dtype, self.attention, self.switches, self.grid, self.prefix)
        self.norm2 = make_norm(self.switches, self.dtype)
        self.mlp = Mlp(self.dim, int(self.dim * self.mlp_ratio), self.dtype, self.switches)
        if self.switches.layer_scale:
            small = nn.initializers.constant(self.switches.layer_scale_start)
            self.scale1 = self.param("scale1", small, (self.dim,))
            self.scale2 = self.param("scale2", small, (self.dim,))

    def __call__(
        self, x: Tokens, path_scales: PathScales | None = None, keep: Int[Array, "batch kept"] | None = None
    ) -> Tap:
        """Intermediate values of the block for the input `x`.

        Args:
          path_scales: factors of the two residual branches for each image (drop path); None: all 1.
          keep: positions of the visible patches; None: all are visible.
        """
        x = split_batch(x)
        qkv, attended = self.attn(self.norm1(x), keep)
        if self.switches.layer_scale:
            attended = attended * self.scale1.astype(self.dtype)
        q, k, v = split_heads(qkv, self.heads)
        middle = split_batch(x + _scaled(attended, path_scales, 0))
        ffn = self.mlp(self.norm2(middle))
        if self.switches.layer_scale:
            ffn = ffn * self.scale2.astype(self.dtype)
        output = split_batch(middle + _scaled(ffn, path_scales, 1))
        return Tap(q=q, k=k, v=v, qkv=qkv, attention=attended, middle=middle, ffn=ffn, output=output)


def _scaled(branch: Tokens, path_scales: PathScales | None, index: int) -> Tokens:
    if path_scales is None:
        return branch
    return branch * path_scales[index, :, None, None].astype(branch.dtype)


def run_blocks(
    blocks: Sequence[Block],
    x: Tokens,
    path_scales: Float[Array, "blocks 2 batch"] | None = None,
    *,
    scan: bool = False,
    remat: str = "none",
    keep: Int[Array, "batch kept"] | None = None,
) -> Tokens:
    """The residual stream after all of `blocks`, which are bound submodules of one parent.

    Args:
      blocks: each has its own parameters, so checkpoints and layer decay do not depend on `scan`.
      x: input of the first block.
      path_scales: drop path factors of these blocks.
      scan: run consecutive blocks of equal shape as one `lax.scan`, which compiles a single block; their parameters are
        stacked inside the step.
      remat: a name in REMAT_POLICIES.
      keep: positions of the visible patches; None: all are visible.
    """
    if not blocks:
        return x
    if blocks[0].is_initializing():
        for block in blocks:
            x = block(x, keep=keep).output
        return x
    for start, stop in _runs([block.heads for block in blocks]):
        step = _block_step(blocks[start].clone(parent=None, name=None), scan, remat, keep)
        params = [block.variables["params"] for block in blocks[start:stop]]
        scales = None if path_scales is None else path_scales[start:stop]
        if scan and stop - start > 1:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            x, _ = jax.lax.scan(step, x, (stacked, scales))
        else:
            for i, block_params in enumerate(params):
                x, _ = step(x, (block_params, None if scales is None else scales[i]))
    return x


def _block_step(block: Block, scan: bool, remat: str, keep: Array | None) -> Callable:
    def step(x: Tokens, inputs: tuple) -> tuple[Tokens, None]:
        params, scales = inputs
        tap: Any = block.apply({"params": params}, x, scales, keep)
        return tap.output, None

    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat={remat!r} is unknown. Choices: {', '.join(map(repr, REMAT_POLICIES))}")
    if remat == "none":
        return step
    # prevent_cse adds barriers, which are not needed inside a scan.
    return functools.partial(jax.checkpoint, policy=REMAT_POLICIES[remat], prevent_cse=not scan)(step)


def _runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [start, stop) of consecutive blocks with the same number of heads."""
    bounds = [0, *(i for i in range(1, len(heads)) if heads[i] != heads[i - 1]), len(heads)]
    return list(itertools.pairwise(bounds))
