"""TinyMIM (arXiv 2301.01296): a small student learns the token relations of a frozen, MIM pre-trained teacher."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import merge
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.tasks.decoder import PixelPrediction, decoder_record, fill_decoder, pixel_prediction
from tinymim_jax.tasks.distill.pairs import adapter_record, align_heads, compare, find_blocks, init_adapters, make_pairs
from tinymim_jax.tasks.distill.targets import find_target
from tinymim_jax.tasks.distill.teachers import find_teacher, how_to_get, teacher_stand_in
from tinymim_jax.tasks.distill.views import build_inputs, compared
from tinymim_jax.tasks.pretrained import Loaded, build_encoder, compute_dtype, fill_encoder, fit_positions, load
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.task import Batch, Params, PerExample, Task, TaskType


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config`; labels are not used."""
    del class_names
    distill = config.distill
    find_target(distill.target)  # a misspelt one is said before the teacher is looked for
    loaded = _load_teacher(distill.teacher)
    teacher, tap = _teacher(loaded, config)
    student = build_encoder(config.model)
    blocks = find_blocks(distill, student.depth, teacher.depth, tap)
    student = align_heads(distill, student, teacher, blocks)
    pairs = make_pairs(distill, student, teacher, blocks)
    inputs = build_inputs(config, student, teacher)
    mim = pixel_prediction(distill, student)
    student_taps = tuple(pair.student for pair in blocks) + ((student.depth,) if mim else ())
    teacher_taps = tuple(pair.teacher for pair in blocks)

    def init(key: jax.Array) -> Params:
        params = {"encoder": student.init(key, jnp.zeros((1, *student.image_size, 3)))["params"]}
        if adapters := init_adapters(key, pairs, student, teacher):
            params["adapter"] = adapters
        return params | (mim.init(key) if mim else {})

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> PerExample:
        student_view, teacher_view = inputs.views(batch["image"], key, train)
        masking = inputs.masking(key, len(student_view))
        keep = masking.keep if masking else None
        seen_by_teacher: Any = teacher.apply(
            {"params": frozen},
            teacher_view,
            tap=teacher_taps,
            keep=keep if inputs.teacher_masked else None,
            drop_key=fold_in_name(key, "teacher_drop_path") if train else None,
            method="encode",
        )
        seen_by_student: Any = student.apply(
            {"params": params["encoder"]},
            student_view,
            tap=student_taps,
            keep=keep,
            drop_key=fold_in_name(key, "drop_path") if train else None,
            method="encode",
        )
        wanted = [inputs.aligned(compared(tap, teacher), masking) for tap in seen_by_teacher]
        seen = [compared(tap, student) for tap in seen_by_student[: len(pairs)]]
        values = compare(pairs, params.get("adapter"), seen, wanted)
        if mim:
            assert masking is not None
            reconstruction = mim.losses(params, seen_by_student[-1].output, student_view, masking)
            values |= {"loss": values["loss"] + mim.weight * reconstruction, "mae": reconstruction}
        return values

    model = {"encoder": student.record()}
    if any(pair.target.adapted for pair in pairs):
        model["adapter"] = adapter_record(distill, pairs, teacher)
    if mim:
        model["decoder"] = decoder_record(mim.decoder)

    return Task(
        model=model,
        init=init,
        losses=losses,
        names=("loss", *(name for pair in pairs for name in pair.names), *(("mae",) if mim else ())),
        load_frozen=lambda: _frozen(loaded, teacher, max(teacher_taps)),
        start=(lambda params: _filled(params, load(config.init), student, model, mim)) if config.init else None,
    )


def _frozen(loaded: Loaded, teacher: ViT, last: int) -> Params:
    """The teacher's weights up to block `last`: later ones are never run, so they need not lie on the device either."""
    unused = {f"blocks_{i}" for i in range(last, teacher.depth)} | {"norm"}
    used = {name: leaf for name, leaf in fit_positions(loaded, teacher).items() if name not in unused}
    return jax.tree.map(lambda leaf: np.asarray(leaf, teacher.dtype), used)


def _filled(params: Params, source: Loaded, student: ViT, model: dict, mim: PixelPrediction | None) -> Params:
    """`params` with what the checkpoint has for them: the encoder, and adapters and decoder where they are equal."""
    params = fill_encoder(params, source, student)
    if "adapter" in model and source.model.get("adapter") == model["adapter"]:
        params |= {"adapter": merge(params["adapter"], source.params["adapter"])}
    return fill_decoder(params, source, mim.decoder) if mim else params


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
        return load(teacher.path)
    except CheckpointError as error:
        hint = f"\nTo get it: {how_to_get(teacher.name, teacher.path)}" if teacher.name else ""
        raise CheckpointError(f"distill.teacher.path: {error}{hint}") from error


def _teacher(loaded: Loaded, config: ConfigDict) -> tuple[ViT, int]:
    """The frozen encoder at the config's image size, and the block that is tapped."""
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
