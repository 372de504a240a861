"""TinyMIM (arXiv 2301.01296): a small student learns the token relations of a frozen, MIM pre-trained teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoint_format import CheckpointError
from tinymim_jax.errors import unknown
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import color_jitter, normalize
from tinymim_jax.ops.keys import named
from tinymim_jax.targets import TARGETS
from tinymim_jax.tasks.encoder import Loaded, build_encoder, compute_dtype, fill_encoder, fit_positions, load
from tinymim_jax.tasks.task import Batch, Params, PerExample, Task
from tinymim_jax.teachers import find_teacher, how_to_get


def build(config: ConfigDict, classes: int) -> Task:
    """The task of `config`; labels are not used."""
    del classes
    distill = config.distill
    if distill.target not in TARGETS:
        raise unknown("distill.target", distill.target, TARGETS)
    target = TARGETS[distill.target]
    loaded = _load_teacher(distill.teacher)
    teacher, tap = _teacher(loaded, config)
    student = _student(config, teacher.block_heads[tap - 1])
    student_tap = distill.student_tap or student.depth
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    jitter = dict(distill.jitter)

    def init(key: jax.Array) -> Params:
        return {"encoder": student.init(key, jnp.zeros((1, *student.image_size, 3)))["params"]}

    def load_frozen() -> Params:
        # Blocks after the tap are never run, so they need not lie on the device either.
        unused = {f"blocks_{i}" for i in range(tap, teacher.depth)} | {"norm"}
        used = {name: leaf for name, leaf in fit_positions(loaded, teacher).items() if name not in unused}
        return jax.tree.map(lambda leaf: np.asarray(leaf, teacher.dtype), used)

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> PerExample:
        clean = batch["image"]
        view = color_jitter(named(key, "jitter"), clean, **jitter) if train else clean
        seen_by_teacher: Any = teacher.apply({"params": frozen}, normalize(clean, mean, std), tap=tap, method="encode")
        seen_by_student: Any = student.apply(
            {"params": params["encoder"]},
            normalize(view, mean, std),
            tap=student_tap,
            drop_key=named(key, "drop_path") if train else None,
            method="encode",
        )
        wanted = jax.lax.stop_gradient(target.extract(seen_by_teacher))
        parts = target.loss(target.extract(seen_by_student), wanted)
        return {"loss": jnp.sum(jnp.stack(list(parts.values())), axis=0), **parts}

    def start(params: Params) -> Params:
        return fill_encoder(params, load(config.init), student)

    return Task(
        model={"encoder": student.record()},
        init=init,
        losses=losses,
        names=("loss", *target.names),
        load_frozen=load_frozen,
        start=start if config.init else None,
    )


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
    image_size = tuple(config.model.image_size)
    return ViT.from_record(
        record, image_size=image_size, dtype=compute_dtype(config.model), scan=config.model.scan
    ), tap


def _student(config: ConfigDict, teacher_heads: int) -> ViT:
    """The student; its last block has the teacher's heads when it is to be the published adaptive block."""
    student = build_encoder(config.model)
    choice = config.distill.last_heads
    if choice == "teacher":
        return student.clone(heads=(*student.block_heads[:-1], teacher_heads))
    if choice == "own":
        return student
    raise unknown("distill.last_heads", choice, ("teacher", "own"))
