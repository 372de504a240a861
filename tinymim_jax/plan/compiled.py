"""Compiles a training step for absent chips in a subprocess; results are cached on disk."""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.plan.topology import Topology
from tinymim_jax.runtime.parent import end_with_parent

CACHE = "~/.cache/tinymim_jax/plan"

_CHILD = "from tinymim_jax.plan.compiled import child; child()"
_INSTALL = {
    "tpu": ("libtpu", "pip install 'tinymim-jax[plan]'"),
    "gpu": ("jax_plugins.xla_cuda13", "pip install 'tinymim-jax[plan-cuda]'"),
}
# There is no GPU for autotuning, and Triton's matrix products cannot be compiled without it.
_GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# Config keys that change numbers in the compiled program but not its structure; they are not part of the cache key.
_IRRELEVANT = {
    "train": ("duration", "log_every", "eval_every", "max_skipped", "probe_every", "probe_images", "probe_patience"),
    "optim": ("base_lr", "warmup", "final_lr", "b1", "b2", "eps", "weight_decay"),
    "data": ("train_split", "eval_split", "examples", "crop_scale", "crop_ratio", "flip", "crops", "upright",
             "rand_augment", "eval_resize", "resizer", "mean", "std"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result for one chip; all sizes in bytes per chip.

    arguments: held between steps: parameters, optimizer state, frozen weights, batches.
    temporaries: activations and everything else that lives within a step.
    code: size of the program.
    needed: the total. If the compiler ran out of memory only this is known and the others are 0.
    refused: the compiler ran out of memory.
    hlo: the optimized program as text; empty if refused.
    compiler: name and version of the compiler.
    """

    arguments: int
    temporaries: int
    code: int
    needed: int
    refused: bool
    hlo: str
    compiler: str


def compile_step(
    config: ConfigDict, topology: Topology, *, fsdp: int = 1, cache: str = CACHE, data_dir: str | None = None
) -> Compiled:
    """Compiles the step of `config` for `topology`, or returns the cached result of an earlier call.

    Results are cached in the folder `cache` ("" disables this) by config, topology and version of the compiler. Delete
    that folder after changing the code of the step.

    Raises:
      ImportError: the compiler for this hardware is not installed; the message has the command to install it.
      RuntimeError: compilation failed for another reason than lack of memory.
    """
    if (kept := kept_result(config, topology, fsdp=fsdp, cache=cache)) is not None:
        return kept
    check_installed(topology)
    with contextlib.ExitStack() as stack:
        if cache:
            folder = _folder(config, topology, fsdp, cache)
            folder.parent.mkdir(parents=True, exist_ok=True)
        else:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "result"
        return _in_child(folder, _request(config, topology, fsdp, data_dir), topology)


def kept_result(config: ConfigDict, topology: Topology, *, fsdp: int = 1, cache: str = CACHE) -> Compiled | None:
    """The cached result of an earlier `compile_step`, or None."""
    folder = _folder(config, topology, fsdp, cache) if cache else None
    return _read(folder) if folder and folder.is_dir() else None


def compiler_of(topology: Topology) -> str:
    """Name and version of the compiler for this topology, or that it is not installed."""
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-pjrt", "cpu": "jaxlib"}[topology.chip.platform]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} {importlib.metadata.version(package)}"
    return f"{package} (not installed)"


def check_installed(topology: Topology) -> None:
    """Raises ImportError if the compiler for this hardware is not installed."""
    platform = topology.chip.platform
    if platform not in _INSTALL:
        return
    module, command = _INSTALL[platform]
    with contextlib.suppress(ModuleNotFoundError):  # of the package that it is in
        if importlib.util.find_spec(module) is not None:
            return
    raise ImportError(
        f"to plan for {topology.name} without having one, {module.split('.')[-1]} is needed, its compiler. It is not "
        f"installed:\n  {command}"
    )


def child() -> None:
    """Runs in the subprocess: reads a request from standard input and writes the result into the folder it names."""
    request = json.load(sys.stdin)
    end_with_parent(request["parent"])  # compilers do not react to signals for minutes
    from tinymim_jax.config import from_json

    topology = Topology(**(request["topology"] | {"shape": tuple(request["topology"]["shape"])}))
    answer, hlo = compile_here(from_json(request["config"]), topology, request["fsdp"], request["data_dir"])
    folder = pathlib.Path(request["folder"])
    answer["compiler"] = compiler_of(topology)
    (folder / "step.hlo.gz").write_bytes(gzip.compress(hlo.encode(), mtime=0))
    (folder / "result.json").write_text(json.dumps(answer, indent=2) + "\n")


def compile_here(
    config: ConfigDict, topology: Topology, fsdp: int = 1, data_dir: str | None = None
) -> tuple[dict[str, Any], str]:
    """(memory of the compiled step in bytes, its optimized program as text), compiled in this process."""
    import jax

    from tinymim_jax.memory import bytes_needed, bytes_refused
    from tinymim_jax.ops.platform import compiling_for
    from tinymim_jax.plan.build import plan_experiment
    from tinymim_jax.plan.devices import assume_cudnn, devices_of
    from tinymim_jax.sharding import make_mesh

    platform = topology.chip.platform
    if platform == "gpu":
        assume_cudnn()
    mesh = make_mesh(fsdp, devices_of(topology))
    with compiling_for(platform):
        step, arguments = plan_experiment(config, data_dir=data_dir).step(mesh)
        lowered = step.lower(*arguments)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (needed := bytes_refused(str(error))) is None:
                raise
            return {"arguments": 0, "temporaries": 0, "code": 0, "needed": needed, "refused": True}, ""
    parts = bytes_needed(program)
    return {**parts, "needed": sum(parts.values()), "refused": False}, program.as_text()


def _in_child(folder: pathlib.Path, request: dict, topology: Topology) -> Compiled:
    running = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix="running-"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(request | {"folder": str(running), "parent": os.getpid()}),
            env=_environment(topology),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"the compiler for {topology.name} ({compiler_of(topology)}) failed:\n{_what_failed(done)}"
            )
        result = _read(running)
        # If another process was faster, its result is the same.
        with contextlib.suppress(OSError):
            running.rename(folder)
        return result
    finally:
        shutil.rmtree(running, ignore_errors=True)


def _environment(topology: Topology) -> dict[str, str]:
    platform, environment = topology.chip.platform, dict(os.environ)
    # Do not occupy an accelerator of this machine: a training may be running on it.
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # do not cache programs for absent chips
    flags = {"gpu": _GPU_FLAGS, "cpu": f"--xla_force_host_platform_device_count={topology.chips}", "tpu": ""}
    environment["XLA_FLAGS"] = flags[platform]
    return environment


def _request(config: ConfigDict, topology: Topology, fsdp: int, data_dir: str | None) -> dict[str, Any]:
    values = json.loads(json.dumps(config.to_dict()))
    return {"config": values, "topology": dataclasses.asdict(topology), "fsdp": fsdp, "data_dir": data_dir}


def _folder(config: ConfigDict, topology: Topology, fsdp: int, cache: str) -> pathlib.Path:
    request = _request(config, topology, fsdp, None)
    values = request["config"]
    for name in ("seed", "checkpoint"):
        values.pop(name)
    for section, keys in _IRRELEVANT.items():
        for key in keys:
            values[section].pop(key, None)
    request["topology"].pop("name")  # v5e-16 and v5e:4x4 are the same topology
    versions = [importlib.metadata.version("jax"), compiler_of(topology)]
    text = json.dumps([request, versions], sort_keys=True)
    return pathlib.Path(cache).expanduser() / hashlib.sha256(text.encode()).hexdigest()[:24]


def _read(folder: pathlib.Path) -> Compiled:
    answer = json.loads((folder / "result.json").read_text())
    return Compiled(**answer, hlo=gzip.decompress((folder / "step.hlo.gz").read_bytes()).decode())


def _what_failed(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return "\n".join(told[-1:] or lines[-5:]) or f"exit status {done.returncode}, without a word"
