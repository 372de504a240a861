"""Several students that learn from one pass of each teacher, in one step."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tinymim_jax.checkpoints.params import STUDENTS
from tinymim_jax.models.blocks import Tap
from tinymim_jax.tasks.distill.distillation import Distillation
from tinymim_jax.tasks.distill.one_teacher import Teaching
from tinymim_jax.tasks.distill.settings import FIRST_STUDENT, errors_of_student
from tinymim_jax.tasks.task import RUNNING, Batch, Params


@dataclasses.dataclass(frozen=True)
class Family:
    """Students by their names, FIRST_STUDENT first; each has the losses and gradients that it would have alone.

    The parameters of the first are where they would be alone, those of the others in params[STUDENTS][name]. All get
    the keys that they would get alone, so equal students start as equal networks, and drop path draws from one stream.
    """

    students: Mapping[str, Distillation]

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `losses` returns: the sum over the students, and for each its loss and the parts of it."""
        own = [(name, student.names[1:]) for name, student in self.students.items()]
        return ("loss", *(each for name, parts in own for each in (name, *(f"{name}_{part}" for part in parts))))

    @property
    def taps(self) -> dict[str, int]:
        """As of Distillation, by the names that the losses have."""
        return {f"{name}_{tap}": block for name, own in self.students.items() for tap, block in own.taps.items()}

    @property
    def teachings(self) -> tuple[Teaching, ...]:
        """Of each teacher that of the first student, with the pairs of all of them."""
        return tuple(map(_joined, zip(*(student.teachings for student in self.students.values()), strict=True)))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of all students."""
        fresh = {name: student.init(key) for name, student in self.students.items()}
        return fresh.pop(FIRST_STUDENT) | {STUDENTS: fresh}

    def losses(self, params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> dict[str, Any]:
        """See Task.losses; `frozen` are the teacher's weights, or those of each by its name."""
        taught = self._taught(frozen, batch["image"], key, train)
        values, total, running = {}, [], {}
        for name, student in self.students.items():
            with errors_of_student(name):
                own = student.losses(own_params(params, name), frozen, batch, key, train, taught)
            if counted := own.pop(RUNNING, {}):
                running = with_own_params(running, name, counted)
            total.append(own.pop("loss"))
            values |= {name: total[-1]} | {f"{name}_{part}": value for part, value in own.items()}
        return {"loss": sum(total[1:], total[0])} | values | ({RUNNING: running} if running else {})

    def _taught(self, frozen: Params, images: jax.Array, key: jax.Array, train: bool) -> dict[str, dict[int, Tap]]:
        """Of each teacher all taps that a student is compared with, by block."""
        found = {}
        for teaching in self.teachings:
            masking = teaching.inputs.masking(key, len(images)) if teaching.inputs.teacher_masked else None
            found[teaching.name] = teaching.run(
                frozen[teaching.name] if len(self.teachings) > 1 else frozen,
                images,
                key,
                train,
                blocks=[pair.blocks.teacher for pair in teaching.pairs],
                keep=masking.keep if masking else None,
            )
        return found

    def seen(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """See Task.seen. Students of other patches are shown apart: other patches of them are hidden."""
        first = self.students[FIRST_STUDENT]
        found = first.seen(batch, key)
        for name, student in self.students.items():
            if student.student.patch_size != first.student.patch_size:
                inputs = student.teachings[0].inputs
                found[name] = inputs.student_seen(batch["image"], key, student.student.patch_size)
        return found


def build_families(methods: Mapping[str, Sequence[Distillation]]) -> tuple[Family, ...]:
    """One for each part of the training.

    Args:
      methods: of each student by its name, the first one first, what `build_distillations` has made.

    Raises ValueError for what several students cannot share.
    """
    families = tuple(Family(dict(zip(methods, now, strict=True))) for now in zip(*methods.values(), strict=True))
    for teaching in families[-1].teachings:
        if dropped := teaching.inputs.dropped:
            raise ValueError(
                f"drop_patches={dropped} of the {teaching.name}: the attention of one student chooses what the teacher "
                "is shown, and there are several: set it to 0, or train them apart"
            )
    names = families[-1].names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"distill.students: the losses {', '.join(twice)} are those of two students: rename one")
    return families


def own_params(params: Params, name: str) -> Params:
    """Those of one student, as they would be alone."""
    return params if name == FIRST_STUDENT else params[STUDENTS][name]


def with_own_params(params: Params, name: str, own: Params) -> Params:
    """`params` with those of one student."""
    if name == FIRST_STUDENT:
        return params | own
    return params | {STUDENTS: params.get(STUDENTS, {}) | {name: own}}


def _joined(teachings: Sequence[Teaching]) -> Teaching:
    pairs = tuple(pair for teaching in teachings for pair in teaching.pairs)
    return dataclasses.replace(
        teachings[0], pairs=pairs, every=tuple(pair for teaching in teachings for pair in teaching.every)
    )
