"""Images per second of the input pipeline on one core, compared with other pipelines, on real JPEG files.

    python benchmarks/input_pipeline.py --data DIR_OR_TAR --tensorflow_python ../tf-venv/bin/python

Every pipeline (they are in input_peers.py) runs in a separate process on the same core, one at a time, in rounds. Rates
are per second of processor time, so that other work on the machine disturbs them little.
Results are medians over rounds, and ratios medians of the ratios of each round. After that, one and two workers are
measured, and the memory of all processes over many images. One JSON line goes to standard output, messages to
standard error.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinymim_jax.data.pipeline import train_batches
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.transforms import Augment

# (ours, theirs) by the name of the ratio, as in the table of benchmarks/README.md.
RATIOS = {
    "ours / published": ("ours", "published"),
    "ours prepared / published": ("ours_prepared", "published"),
    "ours / published, one view": ("ours", "published_one_view"),
    "ours / torchvision": ("ours", "torchvision"),
    "ours prepared / torchvision": ("ours_prepared", "torchvision"),
    "ours / tf.data antialiased": ("ours", "tf_antialiased"),
    "ours / tf.data aliased": ("ours", "tf_aliased"),
    "ours / bare decode": ("ours", "bare_decode"),
    "ours prepared / bare decode of the prepared": ("ours_prepared", "bare_decode_prepared"),
    "cykooz / published": ("ours_cykooz", "published"),
    "cykooz prepared / published": ("ours_prepared_cykooz", "published"),
    "cykooz / torchvision": ("ours_cykooz", "torchvision"),
    "cykooz prepared / torchvision": ("ours_prepared_cykooz", "torchvision"),
    "cykooz / bare decode": ("ours_cykooz", "bare_decode"),
    "cykooz prepared / bare decode of the prepared": ("ours_prepared_cykooz", "bare_decode_prepared"),
}


def main() -> None:
    options = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(Path(options.data), Path(scratch))
        _prepare(folder, scratch)
        rates = _rates(options, folder, scratch)
        result = {
            "images_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
            "ratios": _ratios(rates),
            **_scaling(folder, options.size, options.images, options.repeat),
            **_memory(folder, options.size, options.memory_images),
        }
    print(json.dumps(result))


def _folder(data: Path, scratch: Path) -> Path:
    if data.is_dir():
        return data
    with tarfile.open(data) as archive:
        archive.extractall(scratch / "images", filter="data")
    return scratch / "images"


def _prepare(folder: Path, scratch: str) -> None:
    command = [sys.executable, "-m", "tinymim_jax", "prepare", f"folder:{folder}", "--splits", "all"]
    command += ["--output", scratch, "--name", "prepared_256", "--short_side", "256"]
    subprocess.run(command, check=True, stdout=sys.stderr)


class _Peer:
    """A process of input_peers.py."""

    def __init__(self, name: str, python: str, folder: Path, size: int, data_dir: str):
        command = [python, str(Path(__file__).with_name("input_peers.py")), name, str(folder), str(size), data_dir]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line("ready")

    def rate(self, images: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{images}\n")
        self._process.stdin.flush()
        seconds, done = self._line("").split()
        return int(done) / float(seconds)

    def _line(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        sys.exit(f"{self._process.args} ended without a result; its messages are above")


def _rates(options: argparse.Namespace, folder: Path, data_dir: str) -> dict[str, list[float]]:
    names = ["bare_decode", "bare_decode_prepared", "published", "published_one_view", "ours", "ours_prepared"]
    if importlib.util.find_spec("cykooz_resizer") is not None:
        names += ["ours_cykooz", "ours_prepared_cykooz"]
    pythons = dict.fromkeys(names, sys.executable)
    if options.torch_python:
        pythons["torchvision"] = options.torch_python
    if options.tensorflow_python:
        pythons |= dict.fromkeys(("tf_antialiased", "tf_aliased"), options.tensorflow_python)
    peers = {name: _Peer(name, python, folder, options.size, data_dir) for name, python in pythons.items()}
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.repeat):
        for name, peer in peers.items():
            rates[name].append(peer.rate(options.images))
        _say(" | ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()))
    return rates


def _ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(a / b for a, b in zip(rates[own], rates[other], strict=True)), 3)
        for name, (own, other) in RATIOS.items()
        if own in rates and other in rates
    }


def _scaling(folder: Path, size: int, images: int, repeat: int) -> dict:
    """Images per second with one and with two worker processes of one thread each."""
    rates = {1: [], 2: []}
    source = open_source(f"folder:{folder}", split="all")
    for _ in range(repeat):
        for workers in rates:
            with train_batches(
                source, augment=Augment(size), batch_size=50, seed=0, workers=workers, threads=1, prefetch=1
            ) as batches:
                for _ in range(8):
                    next(batches)
                began = time.perf_counter()
                steps = 2 * images * workers // 50
                for _ in range(steps):
                    next(batches)
                rates[workers].append(50 * steps / (time.perf_counter() - began))
        _say(" | ".join(f"{workers} workers {values[-1]:.0f}" for workers, values in rates.items()))
    medians = {workers: statistics.median(values) for workers, values in rates.items()}
    return {
        "workers": {str(workers): round(value, 1) for workers, value in medians.items()},
        "two workers / one": round(statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True)), 3),
    }


def _memory(folder: Path, size: int, images: int) -> dict:
    """Proportional set size of this process and its two workers, measured after the first tenth of the images."""
    sizes = []
    source = open_source(f"folder:{folder}", split="all")
    with train_batches(source, augment=Augment(size), batch_size=100, seed=0, workers=2, threads=1) as batches:
        for step in range(images // 100):
            next(batches)
            if step % 5 == 0 and step * 100 >= images // 10:
                sizes.append(_proportional_set_size())
    _say(f"memory over {images} images: {min(sizes) >> 20} to {max(sizes) >> 20} MiB")
    quarter = max(1, len(sizes) // 4)
    first, last = statistics.median(sizes[:quarter]), statistics.median(sizes[-quarter:])
    return {
        "memory_images": images,
        "memory_bytes": [min(sizes), max(sizes)],
        "memory_growth": round(last / first - 1, 4),
    }


def _proportional_set_size() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in ("self", *children):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += 1024 * int(rollup.split("Pss:")[1].split()[0])
    return total


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of JPEG files, or a .tar of them")
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels (default 224)")
    parser.add_argument("--images", type=int, default=1000, help="in each round (default 1000)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--memory_images", type=int, default=20_000, help="for the memory figure (default 20000)")
    parser.add_argument("--torch_python", metavar="FILE", help="a Python with torchvision, for the authors' transforms")
    parser.add_argument("--tensorflow_python", metavar="FILE", help="a Python with tensorflow-cpu, for tf.data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
