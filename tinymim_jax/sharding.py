"""Where arrays live: the mesh, one rule for parameters, the batch, and joining a job of several processes."""

import contextlib
import ctypes
import functools
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tinymim_jax.exits import joined_processes, watch_peers
from tinymim_jax.hosts import Job, find_job, find_slice, number

AXES = ("data", "fsdp")

_JOIN_SECONDS = 1800  # hosts of a large job may queue for a while
_REMIND_SECONDS = 60
_HEARTBEAT_SECONDS = 30  # a dead host is noticed after this long
_ALONE_HEARTBEAT_SECONDS = 10**7  # Ctrl-Z, or a machine that is paused, must not look like death to the process itself
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_log = logging.getLogger(__name__)


def initialize_distributed() -> None:
    """Starts JAX's coordination service, for one process as for many; call it before anything else of JAX.

    The service is what turns SIGTERM into a saved checkpoint, so a process on its own needs it too. A second
    call does nothing. The job is described by JAX_COORDINATOR_ADDRESS (`host:port` of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found by JAX itself under Slurm, Cloud TPU, Open MPI and
    Kubernetes; otherwise this process runs alone. Slurm and Open MPI give each of several processes on a host
    one GPU: start one task per GPU, or set JAX_LOCAL_DEVICE_IDS. How many processes are waited for is logged first.
    From here on an error that is not caught ends all processes of the job, not this one alone.

    Raises:
      ValueError: the environment describes a job of several processes incompletely.
      RuntimeError: JAX was used before this call, and the job has several processes.
    """
    if jax.distributed.is_initialized():
        return
    if os.environ.get("http_proxy") or os.environ.get("https_proxy"):
        # gRPC sends even loopback traffic to an HTTP proxy, and hangs. Nothing else reads grpc_proxy.
        os.environ.setdefault("grpc_proxy", "")
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=_JOIN_SECONDS,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    job, process_id = find_job(), number("JAX_PROCESS_ID")
    alone = job.processes == 1 or (job.processes is None and not any(map(os.environ.get, _ENVIRONMENT)))
    _warn_of_absent_hosts(job)
    try:
        if job.processes == 1:
            return _initialize_alone(initialize)
        with _saying_who_is_missing(job):
            initialize(num_processes=job.processes, process_id=process_id)
        watch_peers()
    except ValueError as error:
        if alone:
            return _initialize_alone(initialize)  # JAX found no cluster
        got = ", ".join(f"{name}={os.environ.get(name)!r}" for name in _ENVIRONMENT)
        raise ValueError(
            f"The environment does not describe a job of several processes: {error} Got {got}. "
            f"Set all three in each process (ids from 0), or none of them to run alone."
        ) from error
    except Exception as error:
        if alone:
            if "must be called before" in str(error):
                return _warn_unserviced()  # a notebook on one machine, most likely
            error.add_note("To run as a single process, whatever the surroundings, set JAX_NUM_PROCESSES=1.")
        raise


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes ("data", "fsdp"), both Auto: `fsdp` devices share one copy of the parameters.

    Devices (all of the job by default) are laid out process by process whatever the topology: row i of a
    global batch is row i for any number of processes, and an fsdp group stays on one host where it can.

    Raises:
      ValueError: the number of devices is not divisible by `fsdp`.
      RuntimeError: the devices are those of another number of processes than joined the job.
    """
    if devices is None:
        _check_processes(jax.process_count())
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        choices = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(f"fsdp={fsdp} does not divide the {count} devices. Choices: {choices}")
    if devices[0].platform == "cpu":
        _keep_freed_memory()
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

    Parameters, optimizer moments and moving average agree without knowing of each other. Leaves of fewer than
    `min_size` elements are replicated: gathering them costs more than they hold. Larger ones are split over
    "fsdp" along their largest divisible dimension, the last of equals.

    Args:
      abstract_tree: anything with `.shape` at its leaves: arrays or jax.ShapeDtypeStruct.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, _leaf_spec(x.shape, fsdp, min_size)), abstract_tree)


def place_batch(mesh: Mesh, local_batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays, split over all devices, from the rows that this process holds.

    Every process gives equally many rows; process p holds [p * rows, (p + 1) * rows) of the global batch.

    Raises:
      ValueError: the rows cannot be dealt out evenly to this process's devices.
    """
    devices = len(mesh.local_devices)
    for name, rows in local_batch.items():
        if len(rows) % devices:
            raise ValueError(
                f"batch[{name!r}] has {len(rows)} rows for the {devices} devices of this process. "
                f"Choose a batch size that is a multiple of {mesh.size}, the number of all devices."
            )
    place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a training loop means
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


def _warn_of_absent_hosts(job: Job) -> None:
    hosts = find_slice()
    if job.processes and hosts.processes and job.processes < hosts.processes:
        _log.warning(
            "%s says %d processes, but this is a host of a TPU slice of %d (%s). Its chips start together or not at "
            "all: unless they were divided by TPU_PROCESS_BOUNDS, this process now waits for ever. Start all hosts.",
            job.said_by,
            job.processes,
            hosts.processes,
            hosts.said_by,
        )


@contextlib.contextmanager
def _saying_who_is_missing(job: Job) -> Iterator[None]:
    """Tells once a minute that others are still waited for."""
    if not job.processes:
        yield
        return
    this = "" if job.process_id is None else f"This is process {job.process_id} of {job.processes}. "
    _log.info(
        "%sWaiting up to %d minutes for all %d processes (%s).",
        this,
        _JOIN_SECONDS // 60,
        job.processes,
        job.said_by,
    )
    joined = threading.Event()

    def remind() -> None:
        began = time.monotonic()
        while not joined.wait(_REMIND_SECONDS):
            minutes = (time.monotonic() - began) / 60
            _log.warning(
                "Not all %d processes have come after %.0f minutes: is the same command running on each host? Process "
                "0, whom all must reach, is where JAX_COORDINATOR_ADDRESS, Slurm or the TPU slice say.",
                job.processes,
                minutes,
            )

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _initialize_alone(initialize: functools.partial) -> None:
    with socket.socket() as reservation:
        # gRPC shares ports: this keeps the number from being given away until the service has taken it.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reservation.getsockname()[1]}"
        initialize(
            address,
            num_processes=1,
            process_id=0,
            heartbeat_timeout_seconds=_ALONE_HEARTBEAT_SECONDS,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address,  # the default is open to the whole network
        )


def _warn_unserviced() -> None:
    _log.warning(
        "JAX was in use before initialize_distributed(): training works, but SIGTERM ends it unsaved. "
        "Call initialize_distributed() first."
    )


# mallopt's names for them, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _keep_freed_memory() -> None:
    """Has malloc keep what is freed: XLA's CPU client asks for every buffer of every step anew.

    By default glibc maps large ones and unmaps them again, so that each step takes its pages one fault at a time: a
    fifth of a small distillation step (benchmarks/README.md). Without glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_TOP_PAD, 64 << 20)
