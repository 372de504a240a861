"""Distillation: a student and its teachers as one loss."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.tasks.decoder import PixelPrediction, pixel_prediction
from tinymim_jax.tasks.distill.checks import check_targets
from tinymim_jax.tasks.distill.compare import init_comparison
from tinymim_jax.tasks.distill.eight_bit import check_eight_bit
from tinymim_jax.tasks.distill.final import check_final
from tinymim_jax.tasks.distill.hidden import MASK_TOKEN, find_hidden, hidden_patches, second_pass
from tinymim_jax.tasks.distill.one_teacher import Seen, Teaching
from tinymim_jax.tasks.distill.pairs import (
    Blocks,
    Comparisons,
    align_heads,
    find_blocks,
    find_comparisons,
    make_pairs,
    widened,
)
from tinymim_jax.tasks.distill.parts import Part
from tinymim_jax.tasks.distill.settings import FIRST, errors_of
from tinymim_jax.tasks.distill.teacher_networks import teacher_network
from tinymim_jax.tasks.distill.views import build_inputs
from tinymim_jax.tasks.pretrained import Loaded, Numbers, started_encoder
from tinymim_jax.tasks.task import RUNNING, Batch, Params


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A student, and the teachers that it is compared with.

    Of several teachers, adapters, statistics, frozen weights and names of losses are kept apart by the teachers' names.

    mim: MAE's loss beside the distillation; None without.
    hidden: share of the patches that is hidden in a second pass of the student; 0 without.
    taps: blocks by name that differ in other parts of the training; they are recorded beside the losses.
    """

    student: ViT
    teachings: tuple[Teaching, ...]
    mim: PixelPrediction | None
    hidden: float = 0.0
    taps: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether there is more than one teacher."""
        return len(self.teachings) > 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that `losses` returns."""
        names = ["loss"]
        for teaching in self.teachings:
            own = [name for pair in teaching.pairs for name in pair.names]
            names += [teaching.name, *(f"{teaching.name}_{name}" for name in own)] if self.several else own
        return (*names, *(("mae",) if self.mim else ()), *self.taps)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: "encoder", and "adapter", "statistics", MASK_TOKEN, "decoder" where losses need them."""
        image = jnp.zeros((1, *self.student.image_size, 3))
        params = {"encoder": self.student.init(key, image)["params"]} | self.init_comparisons(key)
        if self.hidden:
            params[MASK_TOKEN] = jnp.zeros((1, 1, self.student.embed_dim))  # as in DINOv2
        return params | (self.mim.init(key) if self.mim else {})

    def init_comparisons(self, key: jax.Array) -> Params:
        """Fresh "adapter" and "statistics" of all teachers, as far as the losses need them."""
        params: dict[str, Any] = {}
        for teaching in self.teachings:
            own = key if teaching.name == FIRST else fold_in_name(key, f"teacher {teaching.name}")
            for part, values in init_comparison(own, teaching.every, self.student, teaching.network).items():
                params[part] = params.get(part, {}) | ({teaching.name: values} if self.several else values)
        return params

    def losses(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: jax.Array,
        train: bool,
        taught: Mapping[str, Mapping[int, Tap]] | None = None,
    ) -> dict[str, Any]:
        """See Task.losses.

        Args:
          frozen: the teacher's weights, or those of each by its name.
          taught: of each teacher its taps of this batch, where these are for several students.
        """
        images, inputs = batch["image"], self.teachings[0].inputs
        view, masking = inputs.student_view(images, key, train), inputs.masking(key, len(images))
        pairs = [pair for teaching in self.teachings for pair in teaching.pairs]
        blocks = [pair.blocks.student for pair in pairs] + ([self.student.depth] if self.mim else [])
        blocks = tuple(dict.fromkeys(blocks))
        taps: Any = self.student.apply(
            {"params": params["encoder"]},
            view,
            tap=blocks,
            keep=masking.keep if masking else None,
            drop_key=fold_in_name(key, "drop_path") if train else None,
            method="encode",
        )
        taps, again, hidden = dict(zip(blocks, taps, strict=True)), {}, None
        if self.hidden:
            hidden = hidden_patches(key, len(images), self.student.grid, self.hidden)
            again = second_pass(self.student, params, view, pairs, hidden, key if train else None)
        by_student = Seen(self.student, params["encoder"], taps, masking, hidden, again)
        found = {
            teaching.name: teaching.losses(
                _own(params, teaching.name) if self.several else params,
                frozen[teaching.name] if self.several else frozen,
                images,
                key,
                train,
                by_student,
                taught[teaching.name] if taught else None,
            )
            for teaching in self.teachings
        }
        values = self._sum(found)
        if self.mim:
            assert masking is not None
            reconstruction = self.mim.losses(params, taps[self.student.depth].output, view, masking)
            values |= {"loss": values["loss"] + self.mim.weight * reconstruction, "mae": reconstruction}
        return values | {name: jnp.full(len(images), float(block)) for name, block in self.taps.items()}

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


def build_distillations(
    parts: Sequence[Mapping[str, ConfigDict]],
    loaded: Mapping[str, Loaded],
    pixels: Mapping[str, tuple[Numbers, Numbers]],
) -> tuple[Distillation, ...]:
    """The distillation in each part of a training; their parameters and the names of their losses are the same.

    Args:
      parts: for each teacher, by its name, the settings in that part of the training, see `teacher_settings`.
      loaded: for each teacher its checkpoint.
      pixels: for each teacher the mean and standard deviation by which its images are normalized.

    Raises ValueError where student, teachers and targets do not fit each other.
    """
    config = parts[-1][FIRST]
    distill, student = config.distill, started_encoder(config)
    compared = {name: _compared_blocks([part[name] for part in parts], name, student, loaded[name]) for name in loaded}
    student = widened(distill, student, compared[FIRST].network)
    student = align_heads(distill, student, [(each.network, each.every) for each in compared.values()])
    if distill.statistics_images < 1:
        raise ValueError(f"distill.statistics_images={distill.statistics_images} must be positive")
    teachings = []
    for name, each in compared.items():
        with errors_of(name):
            teachings.append(_teachings(name, parts[-1][name], student, each, pixels[name]))
    mim, shown = pixel_prediction(distill, student), _moving_blocks(compared)
    pairs = [pair for parts_of_one in teachings for pair in parts_of_one[-1].every]
    (hidden,) = {find_hidden(pairs, student, each[-1].inputs) for each in teachings}
    methods = tuple(
        Distillation(student, now, mim, hidden, taps) for now, taps in zip(zip(*teachings), shown, strict=True)
    )
    names = methods[-1].names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"distill.teachers: the losses {', '.join(twice)} are those of two teachers: rename one")
    return methods


@dataclasses.dataclass(frozen=True)
class _Compared:
    """A teacher's network, and in each part of the training the comparisons and the pair of blocks of the config."""

    network: ViT | ConvNet
    parts: list[Comparisons]
    usual: list[Blocks]

    @property
    def every(self) -> Comparisons:
        found: list[tuple[Part, Blocks]] = []
        for comparison in itertools.chain.from_iterable(self.parts):
            if comparison not in found:
                found.append(comparison)
        return found


def _compared_blocks(settings: Sequence[ConfigDict], name: str, student: ViT, loaded: Loaded) -> _Compared:
    with errors_of(name):
        networks = [teacher_network(loaded, own) for own in settings]
        network = networks[-1][0]
        sizes = [(own.distill, student.depth, network.depth, tap) for own, (_, tap) in zip(settings, networks)]
        parts = [find_comparisons(*each) for each in sizes]
        return _Compared(network, parts, [find_blocks(*each)[0] for each in sizes])


def _teachings(
    name: str, config: ConfigDict, student: ViT, compared: _Compared, pixels: tuple[Numbers, Numbers]
) -> tuple[Teaching, ...]:
    """One for each part of the training."""
    distill, teacher = config.distill, compared.network
    moving = compared.every if len(compared.parts) > 1 else None
    parts = [make_pairs(distill, student, teacher, now, every=moving) for now in compared.parts]
    every = tuple({pair.key: pair for pairs in parts for pair in pairs}.values())
    inputs = build_inputs(config, student, teacher, pixels)
    check_targets(every, student, teacher, inputs.prefix)
    check_final(every, student, teacher)
    if distill.teacher.int8:
        check_eight_bit(teacher)
    if inputs.dropped and (inputs.prefix == 0 or isinstance(teacher, ConvNet)):
        raise ValueError(
            f"distill.teacher.drop_patches={inputs.dropped}: the student's CLS token chooses what the teacher is not "
            "shown, which needs a student and a ViT teacher with CLS tokens: set it to 0"
        )
    given = distill.teacher.weight, distill.statistics_images, every, distill.teacher.int8
    return tuple(Teaching(name, teacher, pairs, inputs, *given) for pairs in parts)


def _moving_blocks(compared: Mapping[str, _Compared]) -> list[dict[str, int]]:
    """For each part of the training the tapped blocks that differ in another part, by the names of their figures."""
    blocks = {f"{name}_tap": [usual.teacher for usual in each.usual] for name, each in compared.items()}
    blocks["student_tap"] = [usual.student for usual in compared[FIRST].usual]
    moving = {name: each for name, each in blocks.items() if len(set(each)) > 1}
    return [{name: each[i] for name, each in moving.items()} for i in range(len(compared[FIRST].parts))]


def _own(params: Params, name: str) -> Params:
    """The adapters and statistics of the comparison with one of several teachers."""
    return {part: params[part].get(name, {}) for part in ("adapter", "statistics") if part in params}
