"""Distillation: a student and its teachers as one loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.tasks.decoder import PixelPrediction, pixel_prediction
from tinymim_jax.tasks.distill.checks import check_targets
from tinymim_jax.tasks.distill.compare import init_comparison
from tinymim_jax.tasks.distill.one_teacher import Teaching
from tinymim_jax.tasks.distill.pairs import Comparisons, align_heads, find_comparisons, make_pairs
from tinymim_jax.tasks.distill.settings import FIRST, errors_of, key_of
from tinymim_jax.tasks.distill.teacher_networks import teacher_network
from tinymim_jax.tasks.distill.views import build_inputs
from tinymim_jax.tasks.pretrained import Loaded, started_encoder, teacher_pixels
from tinymim_jax.tasks.task import RUNNING, Batch, Params


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A student, and the teachers that it is compared with.

    Of several teachers, adapters, statistics, frozen weights and names of losses are kept apart by the teachers' names.

    mim: MAE's loss beside the distillation; None without.
    """

    student: ViT
    teachings: tuple[Teaching, ...]
    mim: PixelPrediction | None

    @property
    def several(self) -> bool:
        """Whether there is more than one teacher."""
        return len(self.teachings) > 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `losses` returns."""
        names = ["loss"]
        for teaching in self.teachings:
            own = [name for pair in teaching.pairs for name in pair.names]
            names += [teaching.name, *(f"{teaching.name}_{name}" for name in own)] if self.several else own
        return (*names, *(("mae",) if self.mim else ()))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: "encoder", and "adapter", "statistics" and "decoder" where the losses need them."""
        image = jnp.zeros((1, *self.student.image_size, 3))
        params = {"encoder": self.student.init(key, image)["params"]} | self.init_comparisons(key)
        return params | (self.mim.init(key) if self.mim else {})

    def init_comparisons(self, key: jax.Array) -> Params:
        """Fresh "adapter" and "statistics" of all teachers, as far as the losses need them."""
        params: dict[str, Any] = {}
        for teaching in self.teachings:
            own = key if teaching.name == FIRST else fold_in_name(key, f"teacher {teaching.name}")
            for part, values in init_comparison(own, teaching.pairs, self.student, teaching.network).items():
                params[part] = params.get(part, {}) | ({teaching.name: values} if self.several else values)
        return params

    def losses(self, params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> dict[str, Any]:
        """See Task.losses; `frozen` are the teacher's weights, or those of each by its name."""
        images, inputs = batch["image"], self.teachings[0].inputs
        view, masking = inputs.student_view(images, key, train), inputs.masking(key, len(images))
        blocks = [pair.blocks.student for teaching in self.teachings for pair in teaching.pairs]
        blocks = tuple(dict.fromkeys(blocks + ([self.student.depth] if self.mim else [])))
        taps: Any = self.student.apply(
            {"params": params["encoder"]},
            view,
            tap=blocks,
            keep=masking.keep if masking else None,
            drop_key=fold_in_name(key, "drop_path") if train else None,
            method="encode",
        )
        taps = dict(zip(blocks, taps, strict=True))
        found = {
            teaching.name: teaching.losses(
                _own(params, teaching.name) if self.several else params,
                frozen[teaching.name] if self.several else frozen,
                images,
                key,
                train,
                self.student,
                taps,
                masking,
            )
            for teaching in self.teachings
        }
        values = self._sum(found)
        if self.mim:
            assert masking is not None
            reconstruction = self.mim.losses(params, taps[self.student.depth].output, view, masking)
            values |= {"loss": values["loss"] + self.mim.weight * reconstruction, "mae": reconstruction}
        return values

    def _sum(self, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The losses of all teachers; "loss" is their weighted sum."""
        values, total, running = {}, [], {}
        for teaching in self.teachings:
            own = dict(found[teaching.name])
            for part, counted in own.pop(RUNNING, {}).items():
                running[part] = running.get(part, {}) | ({teaching.name: counted} if self.several else counted)
            loss = own.pop("loss")
            total.append(loss if teaching.weight == 1 else teaching.weight * loss)
            if self.several:
                own = {teaching.name: loss} | {f"{teaching.name}_{name}": value for name, value in own.items()}
            values |= own
        return {"loss": sum(total[1:], total[0])} | values | ({RUNNING: running} if running else {})

    def seen(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """See Task.seen."""
        images = batch["image"]
        student = self.teachings[0].inputs.student_seen(images, key, self.student.patch_size)
        return {"student": student} | {each.name: each.inputs.teacher_seen(images, key) for each in self.teachings}


def build_distillation(settings: Mapping[str, ConfigDict], loaded: Mapping[str, Loaded]) -> Distillation:
    """The distillation of a config. Raises ValueError where student, teachers and targets do not fit each other.

    Args:
      settings: for each teacher, by its name, see `teacher_settings`.
      loaded: its checkpoint.
    """
    config = settings[FIRST]
    student = started_encoder(config)
    networks: dict[str, ViT | ConvNet] = {}
    comparisons: dict[str, Comparisons] = {}
    for name, own in settings.items():
        with errors_of(name):
            network, tap = teacher_network(loaded[name], own)
            networks[name] = network
            comparisons[name] = find_comparisons(own.distill, student.depth, network.depth, tap)
    student = align_heads(config.distill, student, [(networks[name], comparisons[name]) for name in settings])
    if config.distill.statistics_images < 1:
        raise ValueError(f"distill.statistics_images={config.distill.statistics_images} must be positive")
    teachings = []
    for name, own in settings.items():
        with errors_of(name):
            teachings.append(_teaching(name, own, student, networks[name], comparisons[name], loaded[name]))
    method = Distillation(student, tuple(teachings), pixel_prediction(config.distill, student))
    if len(set(method.names)) < len(method.names):
        twice = sorted({name for name in method.names if method.names.count(name) > 1})
        raise ValueError(f"distill.teachers: the losses {', '.join(twice)} are those of two teachers: rename one")
    return method


def _teaching(
    name: str, config: ConfigDict, student: ViT, teacher: ViT | ConvNet, comparisons: Comparisons, loaded: Loaded
) -> Teaching:
    distill = config.distill
    pairs = make_pairs(distill, student, teacher, comparisons)
    pixels = teacher_pixels(loaded, distill.teacher.mean, distill.teacher.std, key_of(name))
    inputs = build_inputs(config, student, teacher, pixels)
    check_targets(pairs, student, teacher, inputs.prefix)
    if inputs.dropped and (inputs.prefix == 0 or isinstance(teacher, ConvNet)):
        raise ValueError(
            f"distill.teacher.drop_patches={inputs.dropped}: the student's CLS token chooses what the teacher is not "
            "shown, which needs a student and a ViT teacher with CLS tokens: set it to 0"
        )
    return Teaching(name, teacher, pairs, inputs, distill.teacher.weight, distill.statistics_images)


def _own(params: Params, name: str) -> Params:
    """The adapters and statistics of the comparison with one of several teachers."""
    return {part: params[part].get(name, {}) for part in ("adapter", "statistics") if part in params}
