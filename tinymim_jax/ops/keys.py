"""Random keys derived by name."""

import zlib

import jax


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """The key for one use of randomness within a step, such as "jitter" or "masking".

    It depends on `key` and `name` only, so adding another use does not change the numbers drawn for this one.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
