"""The MLP of a block, plain or gated."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.layers import Dense, make_norm
from tinymim_jax.models.switches import PLAIN, Switches
from tinymim_jax.ops.gelu import gelu

Tokens = Float[Array, "batch tokens dim"]


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation of the GELU, `x sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


class Mlp(nn.Module):
    """Linear, activation, linear; the exact GELU by default. `Switches` says how it varies."""

    dim: int
    hidden_dim: int
    dtype: Any = jnp.float32
    switches: Switches = PLAIN

    def setup(self):
        bias = self.switches.linear_bias
        if self.switches.mlp == "gated":
            self.gate = Dense(self.hidden_dim, self.dtype, bias)
        self.fc1 = Dense(self.hidden_dim, self.dtype, bias)
        if self.switches.mlp_norm:
            self.norm = make_norm(self.switches, self.dtype)
        self.fc2 = Dense(self.dim, self.dtype, bias)

    def __call__(self, x: Tokens) -> Tokens:
        activation = ACTIVATIONS[self.switches.activation]
        hidden = activation(self.gate(x)) * self.fc1(x) if self.switches.mlp == "gated" else activation(self.fc1(x))
        return self.fc2(self.norm(hidden) if self.switches.mlp_norm else hidden)
