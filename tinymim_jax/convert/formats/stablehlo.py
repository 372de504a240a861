"""StableHLO by jax.export: a program that jax runs without this package, for any batch size, on CPU, GPU and TPU."""

import pathlib
import re

import jax
import jax.numpy as jnp

from tinymim_jax.convert.formats.network import Network
from tinymim_jax.convert.formats.runners import needs
from tinymim_jax.ops.platform import compiling_for

PLATFORMS = ("cpu", "cuda", "tpu")


def write(path: pathlib.Path, network: Network) -> None:
    """Writes `network`, parameters included, as jax.export serializes it; the input is float32 [batch, h, w, 3]."""
    _needs_flatbuffers()
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, *network.image_size, 3), jnp.float32)
    # The forms for accelerators, which are also the ones that any other compiler understands best.
    with compiling_for("gpu"), jax.default_matmul_precision("highest"):
        exported = export.export(jax.jit(network.function()), platforms=PLATFORMS)(pixels)
    path.write_bytes(exported.serialize())


def loads_in() -> str:
    """Which jax versions load what this one writes."""
    minor = re.match(r"\d+\.\d+", jax.__version__)
    return f"jax {minor[0] if minor else jax.__version__} and newer; older versions do not load it"


def _needs_flatbuffers() -> None:
    needs("flatbuffers", "pip install 'tinymim-jax[stablehlo]'")
