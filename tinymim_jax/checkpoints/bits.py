"""Digests of the bits of arrays: a uint32 sum over the elements, each mixed with its position.

A change of one element always changes it. Integer sums do not depend on the order, so they do not depend on the
sharding either.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 1 << 18
_SMALL = 1 << 16  # elements; to compile a program for so few takes longer than to add them up


def for_host(x: Any) -> bool:
    """Whether `fold_on_host` is faster for an array: for numpy arrays, and for small ones on the CPU."""
    if not isinstance(x, jax.Array):
        return True
    here = x.is_fully_addressable or x.is_fully_replicated
    return here and x.size <= _SMALL and all(device.platform == "cpu" for device in x.devices())


def fold(x: jax.Array) -> jax.Array:
    """The digest of an array, computed on its devices. Every process that holds a part of it must call this."""
    return _finish_on_cpu(_fold(x))


def fold_on_host(x: np.ndarray) -> int:
    """As `fold`, without compiling a program and without copying the array to a device."""
    x = np.asarray(x, order="C")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    words = x.reshape(-1).view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    total = 0
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32)
        place = np.arange(start, start + len(chunk), dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(_mix(chunk ^ _mix(place)), dtype=np.uint64))
    return total % 2**32


@jax.jit
def _fold(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}").astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += iota * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(place)), dtype=jnp.uint32)


def _finish_on_cpu(result: jax.Array) -> jax.Array:
    """Waits for a sum over several CPU devices before the next one is begun.

    The programs of several CPU devices share one pool of threads, in one process as in several. Two sums at once can
    each wait for a part of the other to get a thread, for ever. Accelerators run programs in order.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return jax.block_until_ready(result)
    return result


def _mix(x: Any) -> Any:
    """A one-to-one scrambling of uint32 arrays (C. Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
