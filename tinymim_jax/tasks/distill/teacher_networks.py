"""The network of a teacher: its checkpoint, its architecture at the size of its images, and its frozen weights."""

import jax
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.distill.cnn import cnn_teacher, cnn_weights
from tinymim_jax.tasks.distill.eight_bit import eight_bit
from tinymim_jax.tasks.distill.teachers import find_teacher, how_to_get
from tinymim_jax.tasks.pretrained import Loaded, compute_dtype, fit_positions, load
from tinymim_jax.tasks.task import Params


def load_teacher(teacher: ConfigDict) -> Loaded:
    """The checkpoint that `config.distill.teacher` names. CheckpointError or ValueError where there is none."""
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


def teacher_network(loaded: Loaded, config: ConfigDict) -> tuple[ViT | ConvNet, int]:
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


def frozen_weights(
    loaded: Loaded, teacher: ViT | ConvNet, last: int, *, final: bool = False, int8: bool = False
) -> Params:
    """The teacher's weights up to block `last` in the dtype of its computation.

    Args:
      final: those of the final norm too.
      int8: those of `eight_bit`.
    """
    if isinstance(teacher, ConvNet):
        return cnn_weights(loaded, teacher)
    used = used_weights(loaded, teacher, last, final=final)
    return eight_bit(used, teacher.dtype) if int8 else jax.tree.map(lambda leaf: np.asarray(leaf, teacher.dtype), used)


def used_weights(loaded: Loaded, teacher: ViT, last: int, *, final: bool = False) -> Params:
    """The weights as stored, up to block `last`: later ones are never run, so they take no memory on the device."""
    unused = {f"blocks_{i}" for i in range(last, teacher.depth)} | (set() if final else {"norm"})
    return {name: leaf for name, leaf in fit_positions(loaded, teacher).items() if name not in unused}
