"""The pre-norm transformer block, its intermediate values, and running a stack of blocks."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.ops.attention import joint_attention, split_heads
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.layer_norm import EPS, layer_norm
from tinymim_jax.ops.placement import split_batch
from tinymim_jax.ops.platform import on_cpu
from tinymim_jax.ops.products import full_precision

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

    q, k, v: [batch, tokens, heads, head_dim], before any product.
    qkv: the same as the projection leaves them, [batch, tokens, 3 dim], columns ordered (q|k|v, head, channel).
    attention, ffn: output of each branch before its residual sum, [batch, tokens, dim].
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


class Dense(nn.Module):
    """A linear layer: Xavier-uniform kernel, zero bias, computed in `dtype`."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch features"]:
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (array.astype(self.dtype) for array in (split_batch(x), kernel, bias))
        rows = x.reshape(-1, x.shape[-1]) if on_cpu() else x
        product = jnp.matmul(rows, kernel, precision=full_precision(self.dtype)) + bias
        return split_batch(product.reshape(*x.shape[:-1], self.features))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with float32 statistics; the output has `dtype`."""

    dtype: Any = jnp.float32
    eps: float = EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, eps=self.eps).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    dim: int
    heads: int
    dtype: Any = jnp.float32
    form: str = "auto"

    def setup(self):
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {self.dim}: choose a divisor of it")
        self.qkv = Dense(3 * self.dim, dtype=self.dtype)
        self.proj = Dense(self.dim, dtype=self.dtype)

    def __call__(self, x: Tokens) -> tuple[Float[Array, "batch tokens three_dim"], Tokens]:
        """(q, k and v, the output). The columns are ordered (q|k|v, head, channel), as in the PyTorch checkpoints."""
        qkv = self.qkv(x)
        return qkv, self.proj(joint_attention(qkv, self.heads, self.form))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    dim: int
    hidden_dim: int
    dtype: Any = jnp.float32

    def setup(self):
        self.fc1 = Dense(self.hidden_dim, dtype=self.dtype)
        self.fc2 = Dense(self.dim, dtype=self.dtype)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (vit.py of the TinyMIM release)."""

    dim: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    attention: str = "auto"

    def setup(self):
        self.norm1 = LayerNorm(self.dtype)
        self.attn = Attention(self.dim, self.heads, self.dtype, self.attention)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.dim, int(self.dim * self.mlp_ratio), self.dtype)

    def __call__(self, x: Tokens, path_scales: PathScales | None = None) -> Tap:
        """`path_scales` are the factors of the two residual branches for each image (drop path); None: all 1."""
        x = split_batch(x)
        qkv, attended = self.attn(self.norm1(x))
        q, k, v = split_heads(qkv, self.heads)
        middle = split_batch(x + _scaled(attended, path_scales, 0))
        ffn = self.mlp(self.norm2(middle))
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
) -> Tokens:
    """The residual stream after all of `blocks`, which are bound submodules of one parent.

    Args:
      blocks: each has its own parameters, so checkpoints and layer decay do not depend on `scan`.
      x: input of the first block.
      path_scales: drop path factors of these blocks.
      scan: run consecutive blocks of equal shape as one `lax.scan`, which compiles a single block; their parameters are
        stacked inside the step.
      remat: a name in REMAT_POLICIES.
    """
    if not blocks:
        return x
    if blocks[0].is_initializing():
        for block in blocks:
            x = block(x).output
        return x
    for start, stop in _runs([block.heads for block in blocks]):
        step = _block_step(blocks[start].clone(parent=None, name=None), scan, remat)
        params = [block.variables["params"] for block in blocks[start:stop]]
        scales = None if path_scales is None else path_scales[start:stop]
        if scan and stop - start > 1:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            x, _ = jax.lax.scan(step, x, (stacked, scales))
        else:
            for i, block_params in enumerate(params):
                x, _ = step(x, (block_params, None if scales is None else scales[i]))
    return x


def _block_step(block: Block, scan: bool, remat: str) -> Callable:
    def step(x: Tokens, inputs: tuple) -> tuple[Tokens, None]:
        params, scales = inputs
        tap: Any = block.apply({"params": params}, x, scales)
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
