"""Joins this process to its job by starting JAX's coordination service, for one process or many."""

import contextlib
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax

from tinymim_jax.runtime.exits import watch_peers
from tinymim_jax.runtime.hosts import Job, env_number, find_job, find_slice, missing_slurm_variables, tasks_without_srun

_JOIN_SECONDS = 1800  # the hosts of a large job may start far apart
_REMIND_SECONDS = 60
_HEARTBEAT_SECONDS = 30  # until a host that died is noticed
# A single process that was suspended (Ctrl-Z, a paused virtual machine) must not be ended by its own heartbeat.
_ALONE_HEARTBEAT_SECONDS = 10**7
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_log = logging.getLogger(__name__)


def initialize_distributed() -> None:
    """Starts JAX's coordination service. Call it before anything else of JAX; a second call does nothing.

    The service turns SIGTERM into a saved checkpoint, so a single process needs it too. The job is described by
    JAX_COORDINATOR_ADDRESS (`host:port` of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found by JAX itself
    under Slurm, Cloud TPU, Open MPI and Kubernetes; otherwise this process runs alone. Slurm and Open MPI give each of
    several processes on a host one GPU: start one task per GPU, or set JAX_LOCAL_DEVICE_IDS. The number of processes
    that it waits for is logged. After it, an uncaught error ends all processes of the job.

    Raises:
      ValueError: the environment describes a job of several processes, but incompletely.
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
    job, process_id = find_job(), env_number("JAX_PROCESS_ID")
    alone = job.processes == 1 or (job.processes is None and not any(map(os.environ.get, _ENVIRONMENT)))
    _warn_of_absent_hosts(job)
    if not os.environ.get("JAX_NUM_PROCESSES") and (missing := missing_slurm_variables()):
        raise ValueError(
            f"SLURM_STEP_NODELIST is set, as in a task that srun has started, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not. Start the command with srun and pass its environment on, or "
            "set JAX_NUM_PROCESSES=1 to run a single process"
        )
    if job.processes is None and (tasks := tasks_without_srun()):
        _log.warning(
            "The Slurm job %s has %d tasks, but this process was not started by srun: it runs alone. To use all tasks, "
            "put srun before the command, as launch/slurm.sbatch does; for a single process, set JAX_NUM_PROCESSES=1.",
            os.environ["SLURM_JOB_ID"],
            tasks,
        )
    try:
        if job.processes == 1:
            return _initialize_alone(initialize)
        with _remind_while_waiting(job):
            initialize(num_processes=job.processes, process_id=process_id)
        watch_peers()
    except ValueError as error:
        if alone:
            return _initialize_alone(initialize)  # JAX found no cluster
        got = ", ".join(f"{name}={os.environ.get(name)!r}" for name in _ENVIRONMENT)
        raise ValueError(
            f"The environment does not describe a job of several processes: {error} Got {got}. "
            f"Set all three in each process (ids from 0), or JAX_NUM_PROCESSES=1 alone to run a single process."
        ) from error
    except Exception as error:
        if alone:
            if "must be called before" in str(error):
                return _warn_without_service()  # most likely a notebook
            error.add_note("To run as a single process, whatever the environment says, set JAX_NUM_PROCESSES=1.")
        raise


def _warn_of_absent_hosts(job: Job) -> None:
    hosts = find_slice()
    if job.processes and hosts.processes and job.processes < hosts.processes:
        _log.warning(
            "%s says %d processes, but this is a host of a TPU slice of %d (%s). The chips of a slice start only "
            "together: unless TPU_PROCESS_BOUNDS divides them, this process now waits for ever. Start all hosts.",
            job.said_by,
            job.processes,
            hosts.processes,
            hosts.said_by,
        )


@contextlib.contextmanager
def _remind_while_waiting(job: Job) -> Iterator[None]:
    """Logs once a minute, while the block runs, that not all processes have started."""
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
                "Not all %d processes have started after %.0f minutes: is the same command running on each host? All "
                "must reach process 0, at the address that JAX_COORDINATOR_ADDRESS, Slurm or the TPU slice gives.",
                job.processes,
                minutes,
            )

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _initialize_alone(initialize: functools.partial) -> None:
    # With the service, jax would connect CPU devices of one process by Gloo, which prints to standard output.
    jax.config.update("jax_cpu_collectives_implementation", None)
    with socket.socket() as reservation:
        # Keeps the port free until the service, which may share it, has taken it.
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


def _warn_without_service() -> None:
    _log.warning(
        "JAX was used before initialize_distributed(): training works, but SIGTERM ends it unsaved. "
        "Call initialize_distributed() first."
    )
