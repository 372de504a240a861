"""Descriptions of absent devices for the compiler."""

import contextlib
import importlib
import types
from typing import Any

import jax
from jax.experimental import topologies

from tinymim_jax.plan.topology import Topology

_CUDNN = 91900  # version 9.19


def devices_of(topology: Topology) -> list:
    """jax devices of absent hardware. Programs can be compiled for them, but not run."""
    platform = topology.chip.platform
    if platform == "cpu":
        return jax.devices("cpu")[: topology.chips]
    if platform == "gpu":
        shape = "x".join(map(str, (1, *topology.shape)))
        return topologies.get_topology_desc(
            platform="cuda", topology=shape, target_config=gpu_description(topology.kind)
        ).devices
    settings: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":
        settings |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    elif topology.shape in ((1, 1), (2, 4), (1, 1, 1)):
        settings |= {"chips_per_host_bounds": (*topology.shape, 1)[:3]}
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    return topologies.get_topology_desc(name, platform="tpu", **settings).devices


def assume_cudnn() -> None:
    """Lets jax lower cuDNN's attention in this process, without cuDNN: jax would ask the installed one for its version.

    This uses private names of jax 0.10 to 0.12. Where they are missing nothing happens, and cuDNN's attention raises.
    """
    with contextlib.suppress(ImportError):
        private: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        if hasattr(private, "check_cudnn_version") and hasattr(private, "cuda_versions"):
            private.check_cudnn_version = lambda: _CUDNN
            private.cuda_versions = types.SimpleNamespace(cudnn_get_version=lambda: _CUDNN)


def gpu_description(kind: str) -> str:
    """The GPU properties that XLA's CUDA compiler needs, as a GpuTargetConfigProto in text format."""
    name, capability, cores, fpus, shared, l2, clock, memory, bandwidth = _GPUS[kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


# Name, compute capability, cores, float32 units and bytes of shared memory of a core, L2 bytes, GHz, bytes, bytes/s: as
# reported by the cards to CUDA (XLA has such reports in xla/backends/gpu/target_config/specs).
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 41943040, 1.41, 85100068864, 2039040000000),
    "a100-40": ("NVIDIA A100-SXM4-40GB", 8, 108, 64, 167936, 41943040, 1.41, 42331013120, 1555200000000),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 52428800, 1.98, 84942979072, 3352320000000),
    "b200": ("NVIDIA B200", 10, 148, 128, 233472, 132644864, 1.965, 191514411008, 7672320000000),
    "h200": ("NVIDIA H200 141GB HBM3e", 9, 132, 128, 233472, 52428800, 1.98, 151397597184, 4800000000000),
}
