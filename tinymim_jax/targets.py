"""TARGETS: what student and teacher are compared on, and how.

A new target is one function and one row.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float

from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops.relations import relation_kl, relation_logits

Extracted = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Target:
    """One way to compare two taps.

    names: of the parts of the loss.
    extract: what is taken from a tap, by name. Only this is computed.
    loss: (student, teacher) -> float32 [batch] for each name; training minimises the mean of their plain sum.
    """

    names: tuple[str, ...]
    extract: Callable[[Tap], Extracted]
    loss: Callable[[Extracted, Extracted], dict[str, Float[Array, "batch"]]]


def relations(*names: str) -> Target:
    """Token relations such as 'qk' or 'vv', compared by KL(teacher || student) (paper, section 3.1).

    Relations are compared head by head, so both tapped blocks must have equally many heads.
    """

    def extract(tap: Tap) -> Extracted:
        return {name: relation_logits(getattr(tap, name[0]), getattr(tap, name[1])) for name in names}

    def loss(student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
        return {name: _relation_loss(student[name], teacher[name]) for name in names}

    return Target(names, extract, loss)


def _relation_loss(student: Array, teacher: Array) -> Float[Array, "batch"]:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's tapped block has {student.shape[1]} heads and the teacher's {teacher.shape[1]}: relations "
            "are compared head by head; set distill.last_heads='teacher' (the published adaptive block)"
        )
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"the student sees {student.shape[2]} tokens and the teacher {teacher.shape[2]}: give both the same "
            "patch size and image size"
        )
    return relation_kl(student, teacher)


TARGETS: dict[str, Target] = {
    "qk_vv": relations("qk", "vv"),
    "qk": relations("qk"),
    "vv": relations("vv"),
}
