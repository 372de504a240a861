"""The device mesh, the sharding of parameters and optimizer state, and placing batches on the devices."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tinymim_jax.runtime.exits import joined_processes
from tinymim_jax.runtime.malloc import keep_freed_memory

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ("data", "fsdp"), both Auto: each group of `fsdp` devices shares one copy of the parameters.

    Devices (by default all of the job) are ordered by process, whatever the topology: row i of a global batch is the
    same for any number of processes, and an fsdp group stays on one host if possible.

    Raises:
      ValueError: the number of devices is not divisible by `fsdp`.
      RuntimeError: the number of processes that joined the job is not the number that own the devices.
    """
    if devices is None:
        _check_processes(jax.process_count())
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        choices = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(f"fsdp={fsdp} does not divide the {count} devices. Choices: {choices}")
    if devices[0].platform == "cpu":
        keep_freed_memory()
    # JAX's default, Explicit axes, breaks flax.linen modules.
    return Mesh(np.asarray(devices).reshape(count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(mesh: Mesh, abstract_tree: Any, min_size: int = 2**18) -> Any:
    """A tree of NamedSharding, decided by each leaf's shape alone.

    So a parameter, its optimizer moments and its moving average are sharded alike. Leaves of fewer than `min_size`
    elements are replicated, since gathering them costs more than the memory is worth. Larger ones are split over
    "fsdp" along their largest divisible dimension, the last one of equals.

    Args:
      abstract_tree: anything with `.shape` at its leaves: arrays or jax.ShapeDtypeStruct.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, _leaf_spec(x.shape, fsdp, min_size)), abstract_tree)


def place_batch(mesh: Mesh, local_batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays, split over all devices, from the rows of this process.

    Every process passes the same number of rows; process p holds [p * rows, (p + 1) * rows) of the global batch.

    Raises:
      ValueError: the rows cannot be divided evenly among this process's devices.
    """
    devices = len(mesh.local_devices)
    for name, rows in local_batch.items():
        if len(rows) % devices:
            raise ValueError(
                f"batch[{name!r}] has {len(rows)} rows for the {devices} devices of this process. "
                f"Choose a batch size that is a multiple of {mesh.size}, the number of all devices."
            )
    place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    with jax.transfer_guard_host_to_device("allow"):  # the one intended transfer of the training loop
        return {name: place(rows) for name, rows in local_batch.items()}


def _leaf_spec(shape: tuple[int, ...], fsdp: int, min_size: int) -> PartitionSpec:
    divisible = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < min_size or not divisible:
        return PartitionSpec()
    _, axis = max(divisible)
    return PartitionSpec(*[None] * axis, "fsdp")


def _check_processes(with_devices: int) -> None:
    joined = joined_processes()
    if joined is not None and joined != with_devices:
        raise RuntimeError(
            f"{joined} processes joined this job, but its devices belong to {with_devices}: start it once on each host "
            "of the slice (launch/tpu_vm.sh does), with the same JAX_NUM_PROCESSES or none"
        )
