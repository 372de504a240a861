"""Which platform a step is traced for: some operations have a second form for XLA's CPU compiler."""

import contextlib
from collections.abc import Iterator

import jax

# For `compiling_for`: products are only counted, in dense form and whatever a config says.
COUNTING = "counting"

_compiled_for: str | None = None


def on_cpu() -> bool:
    """Whether to use the forms written for XLA's CPU compiler; evaluated when a step is traced.

    On CPUs, fusion recomputes a softmax or LayerNorm in each consumer of the backward pass, and products over two batch
    axes run at half speed: the gradient of a ViT-Tiny at 224 px took 3.1 s of CPU time in plain form and 1.2 s in these
    (batch 8, float32, jax 0.10.2). Compilers for accelerators optimize the plain forms well.
    """
    return target() == "cpu"


def target() -> str:
    """The platform for which a step is traced: that of `compiling_for`, otherwise jax's default backend."""
    return _compiled_for or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Code traced inside this context is compiled for `platform` ('tpu', 'gpu', 'cpu', 'litert')."""
    global _compiled_for
    before, _compiled_for = _compiled_for, platform
    try:
        yield
    finally:
        _compiled_for = before
