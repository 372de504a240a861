"""States like those of training, and ways to damage their checkpoints."""

import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinymim_jax.sharding import make_mesh, state_sharding


@flax.struct.dataclass
class State:
    """The shape of a training state: a dataclass over nested dicts and optax's named tuples, some of them empty."""

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any


def make_state(seed, width=512):
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {
            "kernel": rng.normal(size=(width, 64)).astype(np.float32),
            "cls_token": rng.normal(size=(1, 1, 7)).astype(np.float32),
        },
        "head": {"bias": rng.normal(size=(5,)).astype(jnp.bfloat16)},
    }
    # A NaN with a payload, a signed zero and a denormal: equal bits, not equal values.
    params["encoder"]["kernel"].view(np.uint32)[0, :3] = [0x7FC12345, 0x80000000, 1]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), {"encoder": True, "head": False})
    )
    return State(jnp.int32(seed), params, optimizer.init(params), {"ema": {"head": params["head"]}})


def place(state, fsdp):
    return jax.device_put(state, state_sharding(make_mesh(fsdp), state, min_size=64))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def largest_file(directory):
    """The largest file of a checkpoint. Its arrays are noise, so damage in the middle changes a value."""
    return max((directory / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_bit(directory):
    path = largest_file(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def truncate(directory):
    path = largest_file(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_step(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def rewrite_manifest(directory):
    path = directory / "manifest" / "metadata"
    path.write_text(path.read_text().replace("[512, 64]", "[64, 512]"))


def lose_state(directory):
    shutil.rmtree(directory / "state")
