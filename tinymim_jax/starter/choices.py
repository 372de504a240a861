"""The config values that `tinymim distill` chooses for given images, teacher, student and hardware, with reasons."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tinymim_jax.errors import unknown
from tinymim_jax.models.vit import PRESETS as SIZES
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.starter.data import Data
from tinymim_jax.starter.teacher import Teacher

STUDENT, CLASSIFIER = "student", "classifier"
"""Names of the two trainings, and of their folders."""

STUDENTS = {"pico": "pico", "nano": "nano", "hybrid": "hybrid", "Ti": "t", "S": "s", "B": "b"}
"""Values of --student, and their names in configs/distill_images.py and configs/own_images.py."""

PRESETS = {"5k": 5_000, "50k": 50_000, "1M": 1_000_000}
"""Values of --preset (see configs/distill_images.py), and the number of images that each is made for."""

CPU_HOURS = 0.15
SHARES = {STUDENT: 0.65, CLASSIFIER: 0.25}
"""Shares of --hours; the rest is for starting, evaluating and exporting. Without labels the student gets both."""

_FEWEST_STEPS = 20
_CPU_BATCH = 64
_MIXING_EPOCHS = 50
_PROBED_SHARE = 0.02
_MOST_PROBED = 4000


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices that train.

    platform: cpu, gpu or tpu.
    devices, kind: how many, and their name, such as "NVIDIA A100".
    memory: bytes that a program may use on each device; 0 if unknown.
    """

    platform: str
    devices: int
    kind: str
    memory: int = 0

    def describe(self) -> str:
        """Such as "2 x NVIDIA A100"."""
        return f"{self.devices} x {self.kind}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key of the config of one training, its value, and the reason."""

    stage: str
    key: str
    value: Any
    why: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """A training on the devices of this machine; see timing.step_time.

    seconds: duration of a step, including reading its images.
    micro_batches: number of parts into which a batch must be split to fit into memory.
    steps: number of steps of the whole training as configured.
    parameters: number of parameters in the checkpoint.
    trained: how many of them are trained.
    by: how `seconds` was found: "measured", or "planned for ..." with the plan's figure.
    """

    seconds: float
    micro_batches: int
    steps: int
    parameters: int
    trained: int
    by: str = "measured"


def find_student(name: str) -> str:
    """The key of STUDENTS that equals `name`, ignoring case. Raises ValueError for unknown names."""
    known = {each.lower(): each for each in STUDENTS}
    if name.lower() not in known:
        raise unknown("--student", name, STUDENTS)
    return known[name.lower()]


def nearest_preset(images: int) -> str:
    """The preset for this number of images, compared on a logarithmic scale."""
    return min(PRESETS, key=lambda name: abs(math.log(PRESETS[name] / max(images, 1))))


def config_specs(student: str, preset: str, data: Data) -> dict[str, str]:
    """The config of each training, as FILE:ARGUMENT."""
    size = STUDENTS[student]
    specs = {STUDENT: f"distill_images:{size},{preset}"}
    return specs | ({CLASSIFIER: f"own_images:{size},{data.train_images}"} if data.class_names else {})


def choose(data: Data, teacher: Teacher, hardware: Hardware, configs: Mapping[str, Any]) -> list[Choice]:
    """The choices that need no measurement.

    Args:
      configs: the unchanged config of each training.
    """
    chosen, width = [], SIZES[configs[STUDENT].model.variant]["embed_dim"]
    for stage, config in configs.items():
        chosen += [Choice(stage, *row) for row in _of_data(data)]
        chosen += [Choice(stage, *row) for row in _of_images(data, teacher)]
        chosen += [Choice(stage, *row) for row in _of_batch(data, hardware, config)]
        if hardware.platform == "cpu":
            chosen.append(Choice(stage, "model.dtype", "float32", "CPUs compute bfloat16 slowly"))
        chosen.append(Choice(stage, "checkpoint.every_minutes", 2.0, "little is lost if a process is killed"))
    chosen += [Choice(STUDENT, *row) for row in _of_teacher(teacher, width)]
    return chosen


def larger_student(teacher: Teacher, config: Any) -> str:
    """What to tell the user if the blocks of the student have as many weights as those of the teacher; else "".

    Args:
      config: of the student's training.
    """
    model, theirs = config.model, teacher.encoder
    width = model.embed_dim or SIZES[model.variant]["embed_dim"]
    depth = model.depth or SIZES[model.variant]["depth"]
    if width**2 * depth < theirs["embed_dim"] ** 2 * theirs["depth"]:
        return ""
    return (
        f"the student ({depth} blocks of width {width}) is no smaller than the teacher ({theirs['depth']} of width "
        f"{theirs['embed_dim']}), so it costs more in use and is rarely better: choose a smaller --student "
        f"({', '.join(STUDENTS)}) or a larger teacher"
    )


def fit_hours(
    stage: str, config: Any, measured: Measured, hours: float | None, *, alone: bool, lost: float = 0.0
) -> tuple[list[Choice], float]:
    """(choices that make the training fit into its share of `hours`, the hours that it then takes).

    Args:
      config: with all other choices made.
      hours: time for everything; None: as long as the preset takes.
      alone: there is no other training.
      lost: the part of `hours` in which nothing is trained, as it goes into measuring and compiling; in hours.

    Raises ValueError if there is time for hardly any steps.
    """
    chosen, steps = [], measured.steps
    if measured.micro_batches != config.train.accumulate:
        parts = measured.micro_batches
        why = "the whole batch fits into memory" if parts == 1 else f"compiled: {parts} parts fit into memory"
        chosen.append(Choice(stage, "train.accumulate", parts, why))
    if hours is not None:
        share = sum(SHARES.values()) if alone else SHARES[stage]
        affordable = int(3600 * max(0.0, hours - lost) * share / measured.seconds)
        if affordable < min(_FEWEST_STEPS, measured.steps):
            least = lost + _FEWEST_STEPS * measured.seconds / share / 3600
            raise ValueError(
                f"--hours {hours:g}: a step of the {stage} takes {measured.seconds:.2f} s here ({measured.by}), so "
                f"there is time for {affordable} of them: give at least {least:.2g} hours, a smaller --student, or a "
                f"smaller {stage}.train.batch_size than {config.train.batch_size}"
            )
        if affordable < measured.steps:
            steps = affordable
            less = f", less {format_seconds(3600 * lost)} for starting," if lost else ""
            why = (
                f"{share:.0%} of {hours:g} hours{less} at {measured.seconds:.3g} s a step ({measured.by}); the preset "
                f"has {measured.steps}"
            )
            chosen += [
                Choice(stage, "train.duration", f"{steps} steps", why),
                Choice(stage, "optim.warmup", f"{max(1, steps // 10)} steps", "a tenth of the steps"),
            ]
            if stage == STUDENT:
                chosen.append(Choice(stage, "train.eval_every", "0 epochs", "the time goes into training"))
    chosen.append(Choice(stage, "train.log_every", max(1, min(50, steps // 40)), f"of {steps} steps"))
    return chosen, steps * measured.seconds / 3600


def short_finetuning(data: Data, config: Any, steps: int) -> list[Choice]:
    """Choices for a fine-tuning that is too short for strong augmentation; none if it is long enough."""
    epochs = steps * config.train.batch_size / data.train_images
    if epochs >= _MIXING_EPOCHS and steps >= 1000:
        return []
    why = f"{epochs:.0f} epochs ({steps} steps) are too few to learn from mixed images"
    every = f"{max(1, steps // 4)} steps"
    return [
        *(Choice(CLASSIFIER, f"classify.{key}", 0.0, why) for key in ("mixup", "cutmix", "erase")),
        Choice(CLASSIFIER, "data.rand_augment", "", why),
        Choice(CLASSIFIER, "train.ema", 0.0, "an average over a thousand updates would hold initial weights"),
        Choice(CLASSIFIER, "train.eval_every", every, "four times in all"),
    ]


def probes(data: Data, config: Any, steps: int, wanted: int | None) -> list[Choice]:
    """Choices that set how often the student's features are probed.

    Args:
      wanted: number of probes; None: up to ten, as long as they take less than _PROBED_SHARE of the time. An image in a
        probe takes at most half as long as one in a training step, which also runs the teacher and the gradient.
    """
    if wanted is not None:
        images = min(data.train_images, _MOST_PROBED)
        return [
            Choice(STUDENT, "train.probe_images", images, "all images up to some thousands"),
            Choice(STUDENT, "train.probe_every", f"{max(1, steps // wanted)} steps", f"{wanted} points of a curve"),
        ]
    # The neighbors, and half as many images that are classified. Without labels only the latter, for their rank.
    images = min(config.train.probe_images, data.train_images) * (1.5 if data.class_names else 0.5)
    affordable = _PROBED_SHARE * steps * config.train.batch_size / (0.5 * images)
    count = min(10, int(affordable))
    if count < 1:
        return []
    what = "k-NN accuracy and effective rank" if data.class_names else "effective rank of the features"
    why = f"{what} {count} times during the distillation, in less than {_PROBED_SHARE:.0%} of its time"
    return [Choice(STUDENT, "train.probe_every", f"{max(1, steps // count)} steps", why)]


def _of_data(data: Data) -> list[tuple[str, Any, str]]:
    return [
        ("data.source", data.source, "as given"),
        ("data.train_split", data.train_split, data.why_split),
        ("data.eval_split", data.eval_split, data.why_split),
    ]


def _of_images(data: Data, teacher: Teacher) -> list[tuple[str, Any, str]]:
    size = tuple(teacher.encoder["image_size"])
    resize = max(teacher.record.get("preprocessing", {}).get("resize") or 0, round(max(size) * 256 / 224))
    why = "the teacher's"
    if data.short_side < min(size):
        why += f"; yours, of about {data.short_side} pixels, are enlarged"
    return [
        ("model.image_size", size, why),
        ("model.patch_size", teacher.encoder["patch_size"], "the teacher's, so that tokens correspond"),
        ("data.eval_resize", resize, "short side before the central crop, in proportion to 256 for 224"),
    ]


def _of_batch(data: Data, hardware: Hardware, config: Any) -> list[tuple[str, Any, str]]:
    preset = config.train.batch_size
    limit, why = preset, "the preset's"
    if data.train_images // 8 < limit:
        limit, why = data.train_images // 8, "at least eight updates in each epoch"
    if hardware.platform == "cpu" and limit > _CPU_BATCH:
        limit, why = _CPU_BATCH, "more updates in the time that a CPU has"
    batch = 1 << max(1, limit.bit_length() - 1)
    batch = hardware.devices * max(1, batch // hardware.devices)
    rows: list[tuple[str, Any, str]] = [("train.batch_size", batch, why)]
    if batch != preset:
        rate = float(f"{config.optim.base_lr * math.sqrt(preset / batch):.2g}")
        rows.append(("optim.base_lr", rate, "for 256 images; the rate follows the square root of the batch"))
    return rows


def _of_teacher(teacher: Teacher, width: int) -> list[tuple[str, Any, str]]:
    rows: list[tuple[str, Any, str]] = [
        ("distill.teacher.path", teacher.path, "as given"),
        ("distill.teacher.tap", teacher.tap, teacher.why_tap),
    ]
    heads = teacher.encoder["heads"][teacher.tap - 1]
    if width % heads:
        common = math.gcd(width, teacher.encoder["embed_dim"])
        fitting = max(n for n in range(1, heads + 1) if common % n == 0)
        why = f"the teacher's {heads} heads do not divide the student's width {width}"
        rows += [("distill.heads", "resplit", why), ("distill.relation_heads", fitting, why)]
    return rows
