"""How many processes the job has, from environment variables or the TPU slice, before anything waits for them."""

import dataclasses
import glob
import importlib.util
import os
import urllib.error
import urllib.request

_METADATA_SECONDS = 5
_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what jax reads of a task's environment


@dataclasses.dataclass(frozen=True)
class Job:
    """processes: their number, None if unknown. process_id: of this one, None if unknown. said_by: where it stands."""

    processes: int | None = None
    process_id: int | None = None
    said_by: str = ""


def find_job() -> Job:
    """The job of this process: from JAX_NUM_PROCESSES, or else from Slurm, Open MPI or the TPU slice.

    Raises ValueError for a variable that should be a number and is not.
    """
    if (count := env_number("JAX_NUM_PROCESSES")) is not None:
        return Job(count, env_number("JAX_PROCESS_ID"), "JAX_NUM_PROCESSES")
    if os.environ.get("SLURM_STEP_NODELIST"):  # set by srun for its tasks, not by sbatch
        return Job(env_number("SLURM_NTASKS"), env_number("SLURM_PROCID"), "SLURM_NTASKS")
    if (count := env_number("OMPI_COMM_WORLD_SIZE")) is not None:
        return Job(count, env_number("OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_SIZE")
    return find_slice()


def missing_slurm_variables() -> list[str]:
    """Unset variables that jax needs in one of several tasks of srun; [] outside such a task."""
    if not os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NTASKS") == "1":
        return []
    return [name for name in _SLURM if not os.environ.get(name)]


def tasks_without_srun() -> int:
    """The tasks of a Slurm job of several in which this process was not started by srun; 0 outside such a job.

    A script that sbatch or salloc runs is one process, however many tasks were asked for.
    """
    if not os.environ.get("SLURM_JOB_ID") or os.environ.get("SLURM_STEP_NODELIST"):
        return 0
    tasks = os.environ.get("SLURM_NTASKS", "")
    return int(tasks) if tasks.isdecimal() and int(tasks) > 1 else 0


def find_slice() -> Job:
    """The hosts of the TPU slice (or slices) that this machine is part of; Job() without a TPU."""
    if not _has_tpu():
        return Job()
    slices, this_slice = env_number("MEGASCALE_NUM_SLICES") or 1, env_number("MEGASCALE_SLICE_ID") or 0
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := os.environ.get(name):
            count, this = len(hosts.split(",")), env_number("TPU_WORKER_ID")
            return Job(slices * count, None if this is None else this_slice * count + this, name)
    hosts, this = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not hosts:
        return Job()
    count = len(hosts.split(","))
    return Job(
        slices * count,
        this_slice * count + int(this) if this and this.isdecimal() else None,
        "this machine's metadata",
    )


def env_number(name: str) -> int | None:
    """An environment variable as a number; None if it is unset or empty."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not a number. Set it to an integer from 0, or unset it.")
    return int(text)


def _has_tpu() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and not os.environ.get("TPU_SKIP_MDS_QUERY")


def _metadata(key: str) -> str | None:
    """The value of a key on the metadata server of a Google Cloud machine; None elsewhere."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is never behind a proxy
    try:
        with opener.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, OSError):
        return None
