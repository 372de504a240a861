"""Adapters: what brings the student's arrays to the shape of the teacher's. They are trained, and not used later."""

from typing import Any

import jax
import jax.numpy as jnp

from tinymim_jax.models.layers import Dense
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.layer_norm import layer_norm
from tinymim_jax.ops.products import full_precision
from tinymim_jax.tasks.task import Params

# Of features. linear: a Linear (published) | mlp: Linear, GELU and Linear, all of the teacher's width | norm_linear:
# LayerNorm and Linear (Proteus, arXiv 2407.10366) | none: the student's feature itself, which has the teacher's width.
ADAPTERS = ("linear", "mlp", "norm_linear", "none")

_EPS = 1e-5  # of the LayerNorm of norm_linear; torch's default, as in the authors' code


def init_adapter(kind: str, key: jax.Array, student: int, teacher: int) -> Params | None:
    """Fresh parameters of an adapter; None where it has none.

    Args:
      kind: one of ADAPTERS, or 'heads': each of the teacher's attention maps is compared with a linear combination of
        the student's, at first their mean. It has no parameters where both have equally many.
      student, teacher: widths; numbers of heads for 'heads'.
    """
    if kind == "heads":
        return None if student == teacher else {"kernel": jnp.full((student, teacher), 1 / student)}
    if kind in ("linear", "norm_linear"):
        linear = Dense(teacher).init(key, jnp.zeros((1, student)))["params"]
        norm = {"scale": jnp.ones(student), "bias": jnp.zeros(student)}
        return linear if kind == "linear" else {"norm": norm, "linear": linear}
    first, second = jax.random.split(key)
    hidden = Dense(teacher).init(first, jnp.zeros((1, student)))["params"]
    return {"fc1": hidden, "fc2": Dense(teacher).init(second, jnp.zeros((1, teacher)))["params"]}


def adapt(kind: str, params: Params | None, values: jax.Array) -> jax.Array:
    """The student's features [batch, tokens, width] in the teacher's width, or its maps in the teacher's heads."""
    if kind == "heads":
        if params is None:
            return values
        kernel = params["kernel"].astype(values.dtype)
        return jnp.einsum("bsqk,st->btqk", values, kernel, precision=full_precision(values.dtype))
    assert params is not None
    if kind == "linear":
        return _linear(params, values)
    if kind == "norm_linear":
        return _linear(params["linear"], layer_norm(values, **params["norm"], eps=_EPS).astype(values.dtype))
    return _linear(params["fc2"], gelu(_linear(params["fc1"], values)))


def _linear(params: Params, values: jax.Array) -> jax.Array:
    found: Any = Dense(params["bias"].shape[0], dtype=values.dtype).apply({"params": params}, values)
    return found
