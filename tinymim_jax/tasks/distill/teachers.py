"""TEACHERS: published checkpoints by name, with the block of each that is tapped."""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.stand_in import StandIn, encoder_zeros, is_missing


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A published checkpoint.

    embed_dim, depth: the architecture of the encoder in its file.
    tap: block, counted from 1, that the paper distills from.
    family: the argument of `tinymim convert --from`.
    url: where its authors offer the file.
    md5: first six digits of the file's checksum, as published by its authors; None where they published none.
    patch_size: side of its square patches, in pixels.
    """

    embed_dim: int
    depth: int
    tap: int
    family: str
    url: str
    md5: str | None = None
    patch_size: int = 16


_MAE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_"
_TINYMIM = "https://drive.google.com/drive/folders/10L305AoXyBSjJK7WfhBlxi3PF2Ni31Yu"

TEACHERS: dict[str, Teacher] = {
    # MAE release, README. Tapped blocks: TinyMIM, models_teacher.py, and the paper's table on the target block. The
    # paper does not study ViT-H: three quarters of the depth, as for ViT-L.
    "mae_vit_base": Teacher(768, 12, 12, "mae", _MAE + "base.pth", "8cad7c"),
    "mae_vit_large": Teacher(1024, 24, 18, "mae", _MAE + "large.pth", "b8b06e"),
    "mae_vit_huge": Teacher(1280, 32, 24, "mae", _MAE + "huge.pth", "9bdbb0", patch_size=14),
    # The authors' own students, for sequential distillation; of the last block only q, k and v were trained.
    "tinymim_vit_base": Teacher(768, 12, 12, "tinymim", _TINYMIM),
    "tinymim_vit_small": Teacher(384, 12, 12, "tinymim", _TINYMIM),
}


def find_teacher(name: str) -> Teacher:
    """The row of TEACHERS; the error for an unknown name suggests the nearest one."""
    if name not in TEACHERS:
        raise unknown("distill.teacher.name", name, TEACHERS)
    return TEACHERS[name]


def how_to_get(name: str, path: str) -> str:
    """Instructions for downloading the named teacher and converting it to `path`."""
    teacher = TEACHERS[name]
    file = pathlib.PurePosixPath(teacher.url).name if teacher.url.endswith(".pth") else "FILE.pth"
    checksum = f" (its md5 begins {teacher.md5})" if teacher.md5 else ""
    return f"download {teacher.url}{checksum}\n  tinymim convert --from {teacher.family} --input {file} --output {path}"


def teacher_stand_in(teacher: ConfigDict) -> list[StandIn]:
    """For the `config.distill.teacher` of a missing checkpoint: zeros of the shapes of its row in TEACHERS.

    Raises ValueError where the config does not name a row.
    """
    if not is_missing(teacher.path):
        return []
    if not teacher.name:
        raise ValueError(
            f"distill.teacher.path={teacher.path!r} is not here and distill.teacher.name is empty, so the teacher's "
            f"size is not known: give one of them. Names: {', '.join(TEACHERS)}"
        )
    row, path = find_teacher(teacher.name), teacher.path or f"the {teacher.name} of TEACHERS"
    loaded = encoder_zeros(path, ViT(row.embed_dim, row.depth, row.embed_dim // 64, row.patch_size))
    note = f"the teacher is not here: zeros of {teacher.name}'s shapes stand in for it"
    return [StandIn("distill.teacher.path", loaded, note)]
