"""Latency, throughput and memory of a checkpoint in several runtimes on this machine's CPU.

Each measurement is a process of its own, so that its peak memory and its number of threads are its own too.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from tinymim_jax.errors import unknown
from tinymim_jax.evaluation.exporting import PIXELS, network_of, write_program
from tinymim_jax.evaluation.predictor import load
from tinymim_jax.runtime.parent import PARENT_VARIABLE

# What must be installed for each, and the format that it runs; jax runs the checkpoint itself.
RUNTIMES: dict[str, tuple[tuple[str, ...], str]] = {
    "jax": (("jax",), ""),
    "onnx": (("onnx", "onnxruntime"), "onnx"),
    "litert": (("litert_converter", "ai_edge_litert"), "litert"),
    "openvino": (("onnx", "openvino"), "onnx"),
}
_INT8 = ("onnx", "litert")
_TIMEOUT = 600


def installed() -> list[str]:
    """The runtimes that can be measured here."""
    return [name for name, (modules, _) in RUNTIMES.items() if all(map(importlib.util.find_spec, modules))]


def bench(
    checkpoint: str,
    *,
    runtimes: Sequence[str] | None = None,
    int8: bool = False,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1, 0),
    seconds: float = 2.0,
) -> list[dict[str, Any]]:
    """Measures `checkpoint`: one row for each runtime, weights (float32, int8) and number of threads.

    Args:
      runtimes: names in RUNTIMES; None: those that are installed and have such networks.
      int8: also with int8 weights, in the runtimes that export offers them for.
      threads: 0 means all cores.
      seconds: of measuring, for each batch size.

    Returns:
      Rows with `runtime` (name and version), `weights`, `threads`, `megabytes` on disk (None for jax), `peak_megabytes`
      of the process, and for each batch size `batches[size]`: `milliseconds` (median of a call), `cpu_milliseconds`
      (processor time of a call, over all threads) and `images_per_second`.
    """
    model = load(checkpoint)
    network = network_of(model)
    usable = [name for name in installed() if not network.labels_pixels or RUNTIMES[name][1] in ("", *PIXELS)]
    chosen = list(runtimes) if runtimes else usable
    for name in chosen:
        if name not in RUNTIMES:
            raise unknown("runtime", name, RUNTIMES)
        if missing := [module for module in RUNTIMES[name][0] if importlib.util.find_spec(module) is None]:
            raise ImportError(f"--runtime {name}: {missing[0]} is not installed: pip install {missing[0]}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="tinymim-bench-") as folder:
        for name in chosen:
            for weights in ("float32", "int8") if int8 and name in _INT8 else ("float32",):
                job = {"runtime": name, "checkpoint": checkpoint, "size": network.image_size, "seconds": seconds}
                job["files"] = _write(pathlib.Path(folder), network, name, weights == "int8", batches)
                for count in threads:
                    rows.append({"weights": weights, "threads": count} | _measure(job | {"threads": count}))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    sizes = list(rows[0]["batches"])
    heads = ["runtime", "weights", "threads", "MB on disk", "peak MB"]
    heads += [text for size in sizes for text in (f"batch {size}: ms", "CPU ms", "images/s")]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        disk = "-" if row["megabytes"] is None else f"{row['megabytes']:.1f}"
        cells = [row["runtime"], row["weights"], str(row["threads"] or "all"), disk, f"{row['peak_megabytes']:.0f}"]
        for size in sizes:
            found = row["batches"][size]
            cells += [f"{found[key]:.1f}" for key in ("milliseconds", "cpu_milliseconds", "images_per_second")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _write(folder: pathlib.Path, network: Any, runtime: str, int8: bool, batches: Sequence[int]) -> dict[str, str]:
    """The file to run for each batch size, exported unless that was done for another runtime."""
    to = RUNTIMES[runtime][1]
    files = {}
    for batch in batches:
        # One ONNX file serves all batch sizes.
        path = folder / f"{to}{'_int8' * int8}{batch if to == 'litert' else ''}.{to}"
        if to and not path.exists():
            write_program(path, network, to, int8=int8, **({"batch": batch} if to == "litert" else {}))
        files[str(batch)] = str(path) if to else ""
    return files


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", PARENT_VARIABLE: str(os.getpid())}
    child = subprocess.run(
        [sys.executable, "-m", "tinymim_jax.evaluation.bench_child", json.dumps(job)],
        env=environment, capture_output=True, text=True, timeout=_TIMEOUT,
    )  # fmt: skip
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise RuntimeError(f"measuring {job['runtime']} with {job['threads'] or 'all'} threads failed: {last[0]}")
    return json.loads(child.stdout.splitlines()[-1])
