"""TinyMIM (arXiv 2301.01296): a small student learns the token relations of a frozen, MIM pre-trained teacher."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import merge
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.token_grid import visible_tokens
from tinymim_jax.tasks.decoder import PixelPrediction, decoder_record, fill_decoder, pixel_prediction
from tinymim_jax.tasks.distill.checks import check_targets
from tinymim_jax.tasks.distill.cnn import cnn_teacher, cnn_weights
from tinymim_jax.tasks.distill.compare import compare, comparison_record, init_comparison
from tinymim_jax.tasks.distill.pairs import Pair, align_heads, find_comparisons, make_pairs
from tinymim_jax.tasks.distill.parts import read_parts
from tinymim_jax.tasks.distill.teachers import find_teacher, how_to_get, teacher_stand_in
from tinymim_jax.tasks.distill.views import Inputs, build_inputs, compared
from tinymim_jax.tasks.pretrained import (
    Loaded,
    Numbers,
    compute_dtype,
    fill_encoder,
    fit_positions,
    load,
    log_unused,
    same_part,
    started_encoder,
    teacher_pixels,
    teacher_record,
)
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.task import Batch, Params, Task, TaskType


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config`; labels are not used. Raises ValueError where student, teacher and target do not fit."""
    del class_names
    distill = config.distill
    read_parts(distill.target)  # a misspelled target is reported before a missing teacher
    loaded = _load_teacher(distill.teacher)
    pixels = teacher_pixels(loaded, distill.teacher.mean, distill.teacher.std, "distill.teacher")
    method = _distillation(config, loaded, pixels)
    model = _record(distill, method)
    return Task(
        model=model,
        init=method.init,
        losses=method.losses,
        names=method.names,
        seen=lambda batch, key: method.inputs.seen(batch["image"], key, method.student.patch_size),
        load_frozen=lambda: _frozen(loaded, method.teacher, max(pair.blocks.teacher for pair in method.pairs)),
        start=(lambda params: _filled(params, load(config.init), method, model)) if config.init else None,
        origin={"teacher": teacher_record(loaded, pixels) | _compared(method)},
    )


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Student and teacher, which blocks of them are compared on what, and what both are shown.

    mim: MAE's loss beside the distillation; None without.
    images: see compare.compare.
    """

    student: ViT
    teacher: ViT | ConvNet
    pairs: tuple[Pair, ...]
    inputs: Inputs
    mim: PixelPrediction | None
    images: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `losses` returns."""
        return ("loss", *(name for pair in self.pairs for name in pair.names), *(("mae",) if self.mim else ()))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: "encoder", and "adapter", "statistics" and "decoder" where the losses need them."""
        image = jnp.zeros((1, *self.student.image_size, 3))
        params = {"encoder": self.student.init(key, image)["params"]}
        params |= init_comparison(key, self.pairs, self.student, self.teacher)
        return params | (self.mim.init(key) if self.mim else {})

    def losses(self, params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> dict[str, Any]:
        """See Task.losses; `frozen` are the teacher's weights."""
        student_view, teacher_view = self.inputs.views(batch["image"], key, train)
        masking = self.inputs.masking(key, len(student_view))
        keep = masking.keep if masking else None
        last = (self.student.depth,) if self.mim else ()
        seen_by_student: Any = self.student.apply(
            {"params": params["encoder"]},
            student_view,
            tap=tuple(pair.blocks.student for pair in self.pairs) + last,
            keep=keep,
            drop_key=fold_in_name(key, "drop_path") if train else None,
            method="encode",
        )
        prefix = self.inputs.prefix
        seen = [compared(tap, self.student, prefix) for tap in seen_by_student[: len(self.pairs)]]
        deepest = max(range(len(seen)), key=lambda i: self.pairs[i].blocks.student)
        chosen: Any = self.inputs.chosen(seen[deepest], prefix)
        if chosen is not None:
            seen = [jax.tree.map(lambda tokens: visible_tokens(tokens, chosen, prefix), tap) for tap in seen]
        seen_by_teacher: Any = self.teacher.apply(
            {"params": frozen},
            teacher_view,
            tap=tuple(pair.blocks.teacher for pair in self.pairs),
            keep=keep if self.inputs.teacher_masked else chosen,
            drop_key=fold_in_name(key, "teacher_drop_path") if train else None,
            method="encode",
        )
        wanted = [self.inputs.aligned(compared(tap, self.teacher, prefix), masking) for tap in seen_by_teacher]
        values = compare(self.pairs, params, seen, wanted, prefix=prefix, images=self.images if train else 0)
        if self.mim:
            assert masking is not None
            reconstruction = self.mim.losses(params, seen_by_student[-1].output, student_view, masking)
            values |= {"loss": values["loss"] + self.mim.weight * reconstruction, "mae": reconstruction}
        return values


def _distillation(config: ConfigDict, loaded: Loaded, pixels: tuple[Numbers, Numbers]) -> Distillation:
    distill = config.distill
    teacher, tap = _teacher(loaded, config)
    student = started_encoder(config)
    comparisons = find_comparisons(distill, student.depth, teacher.depth, tap)
    student = align_heads(distill, student, teacher, [blocks for _, blocks in comparisons])
    if distill.statistics_images < 1:
        raise ValueError(f"distill.statistics_images={distill.statistics_images} must be positive")
    pairs = make_pairs(distill, student, teacher, comparisons)
    inputs = build_inputs(config, student, teacher, pixels)
    check_targets(pairs, student, teacher, inputs.prefix)
    if inputs.dropped and (inputs.prefix == 0 or isinstance(teacher, ConvNet)):
        raise ValueError(
            f"distill.teacher.drop_patches={inputs.dropped}: the student's CLS token chooses what the teacher is not "
            "shown, which needs a student and a ViT teacher with CLS tokens: set it to 0"
        )
    return Distillation(
        student=student,
        teacher=teacher,
        pairs=pairs,
        inputs=inputs,
        mim=pixel_prediction(distill, student),
        images=distill.statistics_images,
    )


def _record(distill: ConfigDict, method: Distillation) -> dict[str, Any]:
    record = {"encoder": method.student.record()}
    init = functools.partial(init_comparison, pairs=method.pairs, student=method.student, teacher=method.teacher)
    parts = jax.eval_shape(init, jax.random.key(0))
    for part in ("adapter", "statistics"):
        if part in parts:
            record[part] = comparison_record(distill, method.pairs, method.teacher)
    if method.mim:
        record["decoder"] = decoder_record(method.mim.decoder)
    return record


def _compared(method: Distillation) -> dict[str, Any]:
    """The teacher's image size and the pairs of blocks (student, teacher), for model.json."""
    pairs = [list(pair) for pair in dict.fromkeys((p.blocks.student, p.blocks.teacher) for p in method.pairs)]
    return {"image_size": list(method.teacher.image_size), "blocks": pairs}


def _frozen(loaded: Loaded, teacher: ViT | ConvNet, last: int) -> Params:
    """The teacher's weights up to block `last`: later ones are never run, so they take no memory on the device."""
    if isinstance(teacher, ConvNet):
        return cnn_weights(loaded, teacher)
    unused = {f"blocks_{i}" for i in range(last, teacher.depth)} | {"norm"}
    used = {name: leaf for name, leaf in fit_positions(loaded, teacher).items() if name not in unused}
    return jax.tree.map(lambda leaf: np.asarray(leaf, teacher.dtype), used)


def _filled(params: Params, source: Loaded, method: Distillation, model: dict[str, Any]) -> Params:
    """`params` with the checkpoint's encoder, and its adapters and the like where they are those of this task."""
    params = fill_encoder(params, source, method.student)
    for part in ("adapter", "statistics"):
        if part in model and same_part(source, part, model[part]):
            params |= {part: merge(params[part], source.params[part])}
    if method.mim:
        params = fill_decoder(params, source, method.mim.decoder)
    log_unused(source, model)
    return params


def _load_teacher(teacher: ConfigDict) -> Loaded:
    if teacher.name:
        find_teacher(teacher.name)
    if not teacher.path:
        raise ValueError(
            "distill.teacher.path is empty: name a converted checkpoint or a run of ours, for example\n  "
            + how_to_get(teacher.name or "mae_vit_large", "teachers/mae_vit_large")
            + "\nand add distill.teacher.path=teachers/mae_vit_large"
        )
    try:
        return load(teacher.path, cnn=True)
    except CheckpointError as error:
        hint = f"\nTo get it: {how_to_get(teacher.name, teacher.path)}" if teacher.name else ""
        raise CheckpointError(f"distill.teacher.path: {error}{hint}") from error


def _teacher(loaded: Loaded, config: ConfigDict) -> tuple[ViT | ConvNet, int]:
    """The frozen encoder at the config's image size, and the block that is tapped."""
    if "backbone" in loaded.model:
        network = cnn_teacher(loaded, config)
        return network, network.depth
    record = loaded.model["encoder"]
    tap = config.distill.teacher.tap
    if config.distill.teacher.name:
        known = find_teacher(config.distill.teacher.name)
        if (record["embed_dim"], record["depth"]) != (known.embed_dim, known.depth):
            raise ValueError(
                f"{loaded.path} holds a ViT of width {record['embed_dim']} and {record['depth']} blocks, but "
                f"distill.teacher.name={config.distill.teacher.name!r} has width {known.embed_dim} and {known.depth} "
                "blocks: correct distill.teacher.path, or clear distill.teacher.name"
            )
        tap = tap or known.tap
    tap = tap or record["depth"]
    if not 1 <= tap <= record["depth"]:
        raise ValueError(f"distill.teacher.tap={tap}: {loaded.path} has blocks 1 to {record['depth']}")
    teacher = ViT.from_record(
        record,
        image_size=tuple(config.distill.teacher.image_size or config.model.image_size),
        drop_path=config.distill.teacher.drop_path,
        drop_path_schedule=config.model.drop_path_schedule,
        dtype=compute_dtype(config.model),
        scan=config.model.scan,
        attention=config.model.attention,
    )
    if any(side % teacher.patch_size for side in teacher.image_size):
        raise ValueError(
            f"distill.teacher.image_size: images of {teacher.image_size[0]}x{teacher.image_size[1]} cannot be cut into "
            f"the teacher's patches of {teacher.patch_size}: choose multiples of it; tokens are brought to the "
            "student's grid"
        )
    return teacher, tap


def _stand_ins(config: ConfigDict, classes: int) -> list[StandIn]:
    del classes
    return teacher_stand_in(config.distill.teacher) + init_stand_in(config)


TASK = TaskType(build=build, stand_ins=_stand_ins)
