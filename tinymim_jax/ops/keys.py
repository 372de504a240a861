"""Random keys are addressed, not consumed."""

import zlib

import jax


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """The key of one use of randomness ("jitter", "masking", ...) within a step: independent of what else is drawn."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
