"""Speed and memory of the distillation step, optionally compared with the authors' PyTorch step.

    python benchmarks/step.py --config configs/distill_t.py --batch 16 --dtype float32 \\
        --reference ../TinyMIM --reference_python ../torch-venv/bin/python

The step is that of training, with task, optimizer and ColorJitter, on random images that are already on the device and
with a teacher of random weights. The reference does its jitter in the data loader, so its step does less. Rounds of
both alternate; results are medians over rounds. One JSON line goes to standard output, messages to standard error.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.config import from_json, load_config
from tinymim_jax.experiment import Experiment, assemble, batch_shapes, build_experiment, build_optimizer
from tinymim_jax.flops import step_flops
from tinymim_jax.metrics import no_averages
from tinymim_jax.models.vit import ViT
from tinymim_jax.plan.chips import peak_of
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.state import init_state, make_train_step, place_frozen, trained_paths
from tinymim_jax.tasks.distill.teachers import find_teacher

REFERENCE_STUDENTS = {
    192: "tinymim_vit_tiny_patch16",
    384: "tinymim_vit_small_patch16",
    768: "tinymim_vit_base_patch16",
}
REFERENCE_TEACHERS = {768: "mae_vit_base", 1024: "mae_vit_large"}


def main() -> None:
    options = _parse()
    with tempfile.TemporaryDirectory() as folder:
        experiment, teacher = _experiment(options, Path(folder))
        reference = _Reference(options, experiment, teacher) if options.reference else None
        ours = _Ours(experiment)
        flops = _needed_flops(experiment)
    rounds: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(options.repeat):
        rounds["ours"].append(ours.seconds(options.steps) / options.steps)
        if reference:
            rounds["reference"].append(reference.seconds(options.steps) / options.steps)
        _say({name: f"{values[-1]:.4f} s/step" for name, values in rounds.items() if values})
    print(json.dumps(_result(options, experiment, ours, reference, rounds, flops)))


class _Ours:
    """The training step, compiled."""

    def __init__(self, experiment: Experiment):
        mesh, task, config = make_mesh(), experiment.task, experiment.config
        self._frozen = place_frozen(task.load_frozen(), mesh)
        paths = trained_paths(task, self._frozen, batch_shapes(experiment))
        optimizer = build_optimizer(experiment, paths)
        self._key = jax.random.key(0)
        _, fresh = init_state(task, optimizer, paths, mesh, self._key, ema=config.train.ema)
        step = make_train_step(task, optimizer, paths, mesh, accumulate=config.train.accumulate, ema=config.train.ema)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, batch_shapes(experiment)["image"].shape, np.uint8)
        batch = {"image": images, "label": np.zeros(len(images), np.int32), "valid": np.ones(len(images), bool)}
        self._batch = place_batch(mesh, batch)
        self._state, self._recorded = fresh(), no_averages((*task.names, "gradient_norm"))
        began = time.perf_counter()
        lowered = step.lower(self._state, self._recorded, self._frozen, self._batch, self._key)
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.seconds(1)

    def seconds(self, steps: int) -> float:
        """Seconds for this many steps; the host waits for the last one only, as in training."""
        began = time.perf_counter()
        for _ in range(steps):
            self._state, self._recorded, skipped = self._step(
                self._state, self._recorded, self._frozen, self._batch, self._key
            )
        assert int(skipped) == 0, "the benchmark's loss is not finite"
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    def memory(self) -> dict[str, int | None]:
        """Bytes: the peak of the device (None if unknown), the compiler's estimate, and the peak of this process."""
        plan = self._step.memory_analysis()
        planned = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        stats = jax.local_devices()[0].memory_stats() or {}
        return {
            "device_peak_bytes": stats.get("peak_bytes_in_use"),
            "planned_bytes": planned + plan.temp_size_in_bytes,
            "temporary_bytes": plan.temp_size_in_bytes,
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


class _Reference:
    """The authors' step, in a separate process."""

    def __init__(self, options: argparse.Namespace, experiment: Experiment, teacher: ViT):
        width = experiment.task.model["encoder"]["embed_dim"]
        command = [options.reference_python, str(Path(__file__).with_name("reference_step.py"))]
        command += ["--repository", str(Path(options.reference).resolve()), "--dtype", experiment.config.model.dtype]
        command += ["--student", REFERENCE_STUDENTS[width], "--teacher", REFERENCE_TEACHERS[teacher.embed_dim]]
        command += ["--batch", str(experiment.batch_size)] + ["--compile"] * options.compile
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = self._line("ready")
        _say({"reference": self.name})

    def seconds(self, steps: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._line(""))

    def _line(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        sys.exit(
            "the reference process ended: --reference_python needs torch and timm, --reference a checkout of TinyMIM"
        )


def _experiment(options: argparse.Namespace, folder: Path) -> tuple[Experiment, ViT]:
    """The config's experiment with a random teacher. The digits are its data set in name only; no image is read."""
    words = [f"train.batch_size={options.batch}", f"model.dtype={options.dtype}", *options.overrides]
    words += ["data.source=digits", "data.eval_split=test", f"distill.teacher.path={folder / 'teacher'}"]
    config = load_config(options.config, words)
    row = find_teacher(config.distill.teacher.name)
    teacher = ViT(row.embed_dim, row.depth, row.embed_dim // 64, image_size=tuple(config.model.image_size))
    shape = (1, *teacher.image_size, 3)
    params = jax.jit(teacher.init)(jax.random.key(1), np.zeros(shape, np.float32))["params"]
    save_params(folder / "teacher", {"encoder": params}, {"encoder": teacher.record()})
    return build_experiment(config), teacher


def _needed_flops(experiment: Experiment) -> float:
    """FLOPs of a step without what remat recomputes."""
    config = from_json(experiment.config.to_dict())
    config.model.remat = "none"
    task = assemble(config, experiment.train_source, experiment.eval_source).task
    return step_flops(task, task.load_frozen(), batch_shapes(experiment))


def _result(options, experiment, ours, reference, rounds, flops) -> dict:
    seconds = statistics.median(rounds["ours"])
    kind = jax.devices()[0].device_kind
    result = {
        "config": options.config,
        "device": kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "batch": experiment.batch_size,
        "dtype": experiment.config.model.dtype,
        "images_per_second": round(experiment.batch_size / seconds, 2),
        "compile_seconds": round(ours.compile_seconds, 1),
        "needed_flops_per_step": flops,
        **ours.memory(),
    }
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_of(kind)
    if peak:
        result["model_flop_utilisation"] = round(flops / seconds / peak / jax.device_count(), 4)
    if reference:
        # Ratios of adjacent rounds, so that a temporary slowdown of the machine affects both.
        ratios = [theirs / own for own, theirs in zip(rounds["ours"], rounds["reference"])]
        theirs = statistics.median(rounds["reference"])
        result |= {
            "reference": reference.name + (" compiled" if options.compile else ""),
            "reference_images_per_second": round(experiment.batch_size / theirs, 2),
            "ratio": round(statistics.median(ratios), 3),
        }
    return result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/distill_t.py", help="a distillation with a named teacher")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--reference", metavar="DIR", help="a checkout of github.com/OliverRensu/TinyMIM")
    parser.add_argument(
        "--reference_python", default=sys.executable, metavar="FILE", help="a Python with torch and timm"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the reference")
    parser.add_argument("--peak_tflops", type=float, help="bfloat16 peak of one device, if it is not known")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args()


def _say(values: dict) -> None:
    print(" | ".join(f"{name} {value}" for name, value in values.items()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
