"""CHIPS: the manufacturers' specifications of each chip."""

import dataclasses

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specifications of one chip or GPU; of a chip that jax shows as two devices, those of one of the two.

    platform: 'tpu', 'gpu' or 'cpu' (fake devices of this machine, for tests).
    peak: dense bfloat16 FLOP/s.
    memory: bytes available to a program: the TPU compiler's limit, or the share of a GPU's memory that
      launch/slurm.sbatch gives to jax (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9).
    bandwidth: of its memory, bytes/s.
    link: bytes/s in one direction to its neighbors in a slice or node, over all links together.
    network: bytes/s in one direction to other slices or nodes: this chip's share of the host's network cards.
    per_host: chips of each host in a topology of several hosts.
    vcpus: hardware threads of the host per chip, on Google Cloud.
    kind: prefix of its jax device_kind.
    source: where the numbers come from.
    devices: jax devices of one chip.
    int8: peak rate of products of 8-bit integers, relative to `peak`; 1 where the manufacturer states none (tpu7x) or
      the same (v4).
    """

    platform: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_host: int
    vcpus: int
    kind: str
    source: str
    devices: int = 1
    int8: float = 2.0


_TPU_DOCS = "docs.cloud.google.com/tpu/docs/"

# TPU memory is the limit of libtpu 0.0.42 and 0.0.52. A tpu7x chip has two halves with a memory each. Link bandwidths
# are half of the published bidirectional ones; for v4 Google publishes the all-reduce bandwidth of a pod instead: 1.1
# PB/s over 4096 chips.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 30.75 * GIB, 1200 * GB, 268 * GB, 6.25 * GB, 4, 60, "TPU v4", _TPU_DOCS + "v4", int8=1),
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.125 * GB, 4, 28, "TPU v5 lite", _TPU_DOCS + "v5e"),
    "v5p": Chip("tpu", 459e12, 95.73 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, 4, 52, "TPU v5", _TPU_DOCS + "v5p"),
    "v6e": Chip("tpu", 918e12, 31.24 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, 4, 45, "TPU v6 lite", _TPU_DOCS + "v6e"),
    "tpu7x": Chip(
        "tpu",
        1153.5e12,
        94.74 * GIB,
        3690 * GB,
        300 * GB,
        6.25 * GB,
        8,
        28,
        "TPU7x",
        _TPU_DOCS + "tpu7x",
        devices=2,
        int8=1,
    ),
    # NVIDIA's data sheets; 0.9 of the bytes that the cards report; network cards as in DGX A100, H100, H200, B200.
    "a100": Chip("gpu", 312e12, 76.6 * GB, 2039 * GB, 300 * GB, 25 * GB, 8, 12, "NVIDIA A100", "A100 80GB SXM"),
    "a100-40": Chip("gpu", 312e12, 38.1 * GB, 1555 * GB, 300 * GB, 25 * GB, 8, 12, "NVIDIA A100", "A100 40GB SXM"),
    "h100": Chip("gpu", 989e12, 76.4 * GB, 3352 * GB, 450 * GB, 50 * GB, 8, 26, "NVIDIA H100", "H100 SXM"),
    "h200": Chip("gpu", 989e12, 136.2 * GB, 4800 * GB, 450 * GB, 50 * GB, 8, 26, "NVIDIA H200", "H200 SXM"),
    "b200": Chip("gpu", 2250e12, 172.4 * GB, 7672 * GB, 900 * GB, 50 * GB, 8, 28, "NVIDIA B200", "HGX B200"),
    # Not a real chip: for trying out plans where no compiler for an accelerator is installed.
    "cpu": Chip("cpu", 1e12, 4 * GIB, 50 * GB, 10 * GB, 1 * GB, 8, 1, "cpu", "round numbers", int8=1),
}


def peak_of(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of the jax device with this `device_kind`; None if it is not in CHIPS."""
    known = [chip for chip in CHIPS.values() if chip.platform != "cpu" and device_kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind)).peak if known else None
