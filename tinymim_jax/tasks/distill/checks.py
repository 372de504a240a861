"""Whether student, teacher and targets fit: errors before the first step."""

from collections.abc import Sequence
from typing import Protocol

from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.distill.pairs import Blocks, tapped_widths
from tinymim_jax.tasks.distill.targets import TARGETS, Target


class Compared(Protocol):
    """What is checked of a pair of blocks."""

    @property
    def target(self) -> Target: ...

    @property
    def blocks(self) -> Blocks: ...


def check_targets(pairs: Sequence[Compared], student: ViT, teacher: ViT | ConvNet, prefix: int) -> None:
    """Raises ValueError for targets that need tokens or features which one of the networks does not have.

    Args:
      prefix: number of tokens before the patches that are compared.
    """
    for pair in pairs:
        own, theirs = tapped_widths(pair.blocks, student, teacher)
        if pair.target.adapter == "none" and own != theirs:
            raise ValueError(
                f"distill.target: adapter=none compares the student's {', '.join(pair.target.names)} of width {own} "
                f"with the teacher's of {theirs} as they are: set adapter=linear, or distill.wide_last=True for the "
                "last block"
            )
    if isinstance(teacher, ConvNet):
        return _check_cnn(pairs, teacher)
    for pair in pairs:
        names = pair.target.names
        if "cls" in names and not prefix:
            whose = "student" if not student.switches.cls_tokens else "teacher"
            raise ValueError(
                f"distill.target: 'cls' compares the CLS token, and the {whose} has none: choose another target, such "
                "as output, or vv"
            )
        rotated = [name for name in names if set(name) <= set("qkvo") and set(name) & set("qk")]
        rotated += [name for name in names if name == "attention_map"]
        if rotated and teacher.switches.rope is not None and teacher.grid != student.grid:
            rows, columns = (side * teacher.patch_size for side in student.grid)
            raise ValueError(
                f"distill.target: {', '.join(rotated)} of this teacher are rotated by the positions of its patches "
                f"(rotary embedding), so they cannot be brought from its grid {teacher.grid} to the student's "
                f"{student.grid}: give both the same grid by 'distill.teacher.image_size=({rows}, {columns})', or "
                "choose a target that is not rotated, such as vv or output"
            )


def _check_cnn(pairs: Sequence[Compared], teacher: ConvNet) -> None:
    works = [name for name in ("output", "oo") if name in TARGETS]
    for pair in pairs:
        if missing := [name for name in pair.target.names if name not in works]:
            raise ValueError(
                f"distill.target: the teacher is a {teacher.kind}, which has no {', '.join(missing)}: its only "
                f"features are the map of its last stage. Choose distill.target={' or '.join(works)}"
            )
