"""Where a different form of the same mathematics pays, and where it does not."""

import contextlib
from collections.abc import Iterator

import jax

_compiled_for: str | None = None


def on_cpu() -> bool:
    """Whether to use the forms written for XLA's CPU compiler; decided when a step is traced.

    There, fusion computes a softmax or a LayerNorm again in each consumer of the backward pass, and products over two
    batch axes run at half speed: a ViT-Tiny's gradient at 224 px took 3.1 s of CPU time in plain form and 1.2 s in
    these (batch 8, float32, jax 0.10.2). Compilers for accelerators need none of it and know the plain forms best.
    """
    return target() == "cpu"


def target() -> str:
    """The platform that is traced for: that of `compiling_for`, or else jax's default backend."""
    return _compiled_for or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced in the block is meant for `platform` ('tpu', 'gpu', 'cpu', 'litert'), wherever that is done."""
    global _compiled_for
    before, _compiled_for = _compiled_for, platform
    try:
        yield
    finally:
        _compiled_for = before
