"""Multi-head attention: softmax in float32, products in the dtype that comes in; in plain form or as a kernel."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.errors import unknown
from tinymim_jax.ops.placement import for_each_shard
from tinymim_jax.ops.platform import COUNTING, on_cpu, target
from tinymim_jax.ops.products import HeadFeatures, full_precision, scaled_products

FORMS = ("auto", "dense", "fused")
# A kernel holds the keys and values of all tokens of a group of heads in VMEM: compiled for v5e up to 1025 tokens.
FUSED_TOKENS = 1100

log = logging.getLogger(__name__)


def joint_attention(
    qkv: Float[Array, "batch tokens three_dim"],
    heads: int,
    form: str = "auto",
    bias: Float[Array, "heads tokens tokens"] | None = None,
) -> Array:
    """Attention `[batch, tokens, dim]` from the output of the joint projection, columns ordered (q|k|v, head, channel).

    Args:
      form: see `choose_form`.
      bias: added to the logits of every image, in float32; None for none.
    """
    if choose_form("model.attention", form, tokens=qkv.shape[1]) == "fused":
        return fused_attention(qkv, heads, bias)
    q, k, v = split_heads(qkv, heads)
    attended = attention(q, k, v, None if bias is None else bias.astype(jnp.float32))
    return attended.reshape(*qkv.shape[:2], qkv.shape[2] // 3)


def fused_attention(qkv: Array, heads: int, bias: Array | None = None) -> Array:
    """The kernel of the platform that is traced for: cuDNN on GPUs, Pallas on TPUs and, in its interpreter, on CPUs."""
    if target() == "gpu":
        return cudnn_attention(*split_heads(qkv, heads), bias).reshape(*qkv.shape[:2], qkv.shape[2] // 3)
    # Pallas takes a second to import, and only this form needs it.
    from tinymim_jax.ops.kernels.attention import fused_attention as kernel

    interpret = target() != "tpu"
    if bias is None:
        return for_each_shard(lambda rows: kernel(rows, None, heads, interpret))(qkv)
    bias = bias.astype(jnp.float32)
    return for_each_shard(lambda rows, bias: kernel(rows, bias, heads, interpret), whole=1)(qkv, bias)


def split_heads(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """q, k and v `[batch, tokens, heads, head_dim]`."""
    batch, tokens, width = qkv.shape
    parts = qkv.reshape(batch, tokens, 3, heads, width // 3 // heads)
    return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]


def cudnn_attention(q: Array, k: Array, v: Array, bias: Array | None = None, implementation: Any = "cudnn") -> Array:
    """Attention by cuDNN, `[batch, tokens, heads, head_dim]`. An odd number of tokens, which it refuses, is padded.

    Padded keys are masked by their length, padded queries are dropped. cuDNN takes a bias in the dtype of q only.
    """
    batch, tokens = q.shape[:2]
    if tokens % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 1), (0, 1)))
    lengths = jnp.full((batch,), tokens, jnp.int32)
    output = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if bias is None else bias[None].astype(q.dtype),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return output[:, :tokens]


def choose_form(key: str, form: str, *, tokens: int) -> str:
    """'dense' or 'fused'. Decided when a step is traced.

    Args:
      key: the config key that `form` comes from, for messages.
      form: 'dense' leaves products and softmax to the compiler, with maps of all pairs of tokens in memory. 'fused' is
        a kernel without such maps. 'auto' is 'fused' on TPUs up to FUSED_TOKENS tokens, and 'dense' elsewhere: cuDNN
        was never measured with these models, and on CPUs the kernel only runs in an interpreter, for tests.
    """
    if form not in FORMS:
        raise unknown(key, form, FORMS)
    if target() == COUNTING:
        return "dense"
    if form != "auto":
        return form
    if target() != "tpu":
        return "dense"
    if tokens > FUSED_TOKENS:
        _log_once(f"{key}='auto': dense, as {tokens} tokens are more than the {FUSED_TOKENS} of the fused kernel")
        return "dense"
    return "fused"


@functools.cache
def _log_once(message: str) -> None:
    log.info("%s", message)


def attention(
    q: HeadFeatures, k: HeadFeatures, v: HeadFeatures, bias: Float[Array, "heads queries keys"] | None = None
) -> HeadFeatures:
    """`softmax(q k^T / sqrt(head_dim) + bias) v` for every head, [batch, tokens, heads, head_dim]."""
    if on_cpu():
        return attention_for_cpu(q, k, v, bias)
    logits = scaled_products(q, k)
    weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=full_precision(v.dtype))


@jax.custom_vjp
def attention_for_cpu(
    q: HeadFeatures, k: HeadFeatures, v: HeadFeatures, bias: Float[Array, "heads queries keys"] | None = None
) -> HeadFeatures:
    """The same with a custom gradient and with barriers that keep XLA from recomputing the exponentials.

    The products have the heads axis before the tokens: in the other order XLA's CPU products take up to twice as long.
    Their results are float32 first, see `products.linear_product_for_cpu`.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, tuple]:
    q, k, v = (_swap(x) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    powers = jax.lax.optimization_barrier(powers)  # [batch, heads, queries, keys]
    # The result [queries, head_dim] is divided, not the weights [queries, keys], since it is smaller.
    inverse = 1.0 / jnp.sum(powers, axis=-1, keepdims=True)  # [batch, heads, queries, 1]
    powers = powers.astype(v.dtype)
    product = jnp.einsum("bhqk,bhkd->bhqd", powers, v, preferred_element_type=jnp.float32)
    output = (product * inverse).astype(v.dtype)
    return _swap(output), (q, k, v, bias, powers, inverse, output)


def _backward(saved: tuple, cotangent: Array) -> tuple[Array, Array, Array, Array | None]:
    q, k, v, bias, powers, inverse, output = saved
    scaled = _swap(cotangent).astype(jnp.float32) * inverse
    # The softmax's gradient subtracts each query's mean, which is the dot product of output and cotangent.
    mean = jnp.sum(scaled * output.astype(jnp.float32), axis=-1, keepdims=True)
    scaled = scaled.astype(v.dtype)
    d_v = jnp.einsum("bhqk,bhqd->bhkd", powers, scaled, preferred_element_type=jnp.float32).astype(v.dtype)
    d_weights = jnp.einsum("bhqd,bhkd->bhqk", scaled, v, preferred_element_type=jnp.float32)
    d_logits = powers.astype(jnp.float32) * (d_weights - mean)
    d_bias = None if bias is None else d_logits.sum(axis=0).astype(bias.dtype)
    d_logits = jax.lax.optimization_barrier((d_logits * q.shape[-1] ** -0.5).astype(v.dtype))
    d_q = jnp.einsum("bhqk,bhkd->bhqd", d_logits, k, preferred_element_type=jnp.float32).astype(q.dtype)
    d_k = jnp.einsum("bhqk,bhqd->bhkd", d_logits, q, preferred_element_type=jnp.float32).astype(k.dtype)
    return _swap(d_q), _swap(d_k), _swap(d_v), d_bias


def _swap(x: Array) -> Array:
    """[batch, tokens, heads, head_dim] to [batch, heads, tokens, head_dim], and back."""
    return jnp.swapaxes(x, 1, 2)


attention_for_cpu.defvjp(_forward, _backward)
