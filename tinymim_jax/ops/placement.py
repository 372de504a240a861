"""Keeps the batch axis of activations split over the devices of a mesh."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def splitting_batches(mesh: Mesh) -> Iterator[None]:
    """While a step is traced inside this block, `split_batch` refers to `mesh`."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def for_each_shard(function: Callable[..., Array], *, whole: int = 0) -> Callable[..., Array]:
    """`function` of arrays `[batch, ...]`, run on each device's rows: for kernels, which the compiler cannot partition.

    Each device gets all of the last `whole` arguments; their gradients are summed over the devices.
    Without a mesh (see `splitting_batches`) it is `function` itself.
    """
    mesh = _MESH.get()
    if mesh is None or mesh.size == 1:
        return function
    rows = PartitionSpec(mesh.axis_names)

    def split(*arguments: Array) -> Array:
        specs = (rows,) * (len(arguments) - whole) + (PartitionSpec(),) * whole
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)

    return split


def split_batch(x: Shaped[Array, "batch *rest"]) -> Shaped[Array, "batch *rest"]:
    """`x` and its cotangent with the first axis split over all devices of the mesh and no other axis split.

    Parameters that are split over devices meet activations in matrix products. Without this constraint the compiler may
    split the activations along the parameters' axes, and then moves activations between devices in every layer instead
    of gathering each parameter once. Without a mesh (see `splitting_batches`) this is the identity.
    """
    mesh = _MESH.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
