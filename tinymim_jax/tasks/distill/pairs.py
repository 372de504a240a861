"""Pairs of student and teacher blocks: which are compared, on what, and with how many heads."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.distill.parts import Part, read_parts
from tinymim_jax.tasks.distill.target import Target
from tinymim_jax.tasks.distill.targets import compares_heads, find_target, is_relation

HEADS = ("adaptive", "own", "resplit")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A student block and a teacher block, counted from 1, and the weight of their comparison."""

    student: int
    teacher: int
    weight: float = 1.0


Comparisons = Sequence[tuple[Part, Blocks]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two blocks and the target that compares them.

    names: of the parts of their loss in the logs.
    weight: of the sum of these parts in the loss.
    patches_only: tokens before the patches are not compared.
    key: of its adapters and statistics among the parameters.
    hidden: only so large a share of the patches is compared, which is hidden from the student; 0: all, and it sees all.
    """

    blocks: Blocks
    target: Target
    names: tuple[str, ...]
    weight: float = 1.0
    patches_only: bool = False
    key: str = "taps_0"
    hidden: float = 0.0


def find_comparisons(distill: ConfigDict, student_depth: int, teacher_depth: int, teacher_tap: int) -> Comparisons:
    """Each part of `distill.target` with each pair of blocks that it compares: its own, or those of the config."""
    usual = find_blocks(distill, student_depth, teacher_depth, teacher_tap)
    first, found = usual[0], []
    for part in read_parts(distill.target):
        if part.student is None and part.teacher is None:
            found += [(part, blocks) for blocks in usual]
            continue
        if len(usual) > 1 and None in (part.student, part.teacher):
            raise ValueError(
                f"distill.target={distill.target!r}: {part.name} names one block and distill.taps={distill.taps!r} "
                "several: give it both student= and teacher="
            )
        own = Blocks(part.student or first.student, part.teacher or first.teacher)
        _check_block("distill.target", own.student, student_depth, "student")
        _check_block("distill.target", own.teacher, teacher_depth, "teacher")
        found.append((part, own))
    return tuple(found)


def find_blocks(distill: ConfigDict, student_depth: int, teacher_depth: int, teacher_tap: int) -> tuple[Blocks, ...]:
    """The pairs of `distill.taps`, or the single one of `distill.student_tap` and `teacher_tap`."""
    taps, student_tap = distill.taps, distill.student_tap
    if taps is None:
        _check_block("distill.student_tap", student_tap or student_depth, student_depth, "student")
        return (Blocks(student_tap or student_depth, teacher_tap),)
    if student_tap is not None or distill.teacher.tap is not None:
        raise ValueError(
            f"distill.taps={taps!r} gives all pairs of blocks, but distill.student_tap={student_tap} or "
            f"distill.teacher.tap={distill.teacher.tap} gives a block too: set both to None, or distill.taps to None"
        )
    if not isinstance(taps, Sequence) or isinstance(taps, str) or not taps:
        raise _not_taps(taps)
    pairs = [_blocks(triple, taps) for triple in taps]
    for pair in pairs:
        _check_block("distill.taps", pair.student, student_depth, "student")
        _check_block("distill.taps", pair.teacher, teacher_depth, "teacher")
    if len({(pair.student, pair.teacher) for pair in pairs}) < len(pairs):
        raise ValueError(f"distill.taps={taps!r} has a pair twice: leave one out and add its weight to the other's")
    return tuple(pairs)


def _blocks(triple: Any, taps: Any) -> Blocks:
    if not isinstance(triple, Sequence) or len(triple) != 3:
        raise _not_taps(taps)
    student, teacher, weight = triple
    if not (isinstance(student, int) and isinstance(teacher, int) and isinstance(weight, int | float) and weight > 0):
        raise _not_taps(taps)
    return Blocks(student, teacher, float(weight))


def _not_taps(taps: Any) -> ValueError:
    return ValueError(
        f"distill.taps={taps!r} is not a list of (student block, teacher block, positive weight): write for example "
        "distill.taps='((12, 18, 1.0), (6, 9, 0.5))'"
    )


def _check_block(key: str, block: int, depth: int, whose: str) -> None:
    if not 1 <= block <= depth:
        raise ValueError(f"{key}: the {whose} has no block {block}; it has blocks 1 to {depth}")


def align_heads(distill: ConfigDict, student: ViT, teachers: Sequence[tuple[ViT | ConvNet, Comparisons]]) -> ViT:
    """The student with the attention heads that `distill.heads` asks for.

    Args:
      teachers: each with its targets. With several, only the targets that are compared head by head matter.
    """
    if distill.heads not in HEADS:
        raise unknown("distill.heads", distill.heads, HEADS)
    if distill.relation_heads is not None and distill.heads != "resplit":
        raise ValueError(
            f"distill.relation_heads={distill.relation_heads} needs distill.heads='resplit', but that is "
            f"{distill.heads!r}: set it, or distill.relation_heads=None"
        )
    heads, given = list(student.block_heads), {}
    adapted = [
        (teacher, blocks)
        for teacher, comparisons in teachers
        for part, blocks in comparisons
        if isinstance(teacher, ViT) and (len(teachers) == 1 or compares_heads(part.name))
    ]
    for teacher, pair in adapted if distill.heads == "adaptive" else ():
        count = teacher.block_heads[pair.teacher - 1]
        gives = f"distill.heads='adaptive' gives the student's block {pair.student} the {count} heads of the teacher's"
        if given.setdefault(pair.student, count) != count:
            raise ValueError(f"{gives} block {pair.teacher} and {given[pair.student]} of another: set it to 'resplit'")
        if (width := student.widths[pair.student - 1]) % count:
            raise ValueError(
                f"{gives} block {pair.teacher}, which do not divide the student's width {width}: set "
                "distill.heads='resplit'"
            )
        heads[pair.student - 1] = count
    return student.clone(heads=tuple(heads))


def widened(distill: ConfigDict, student: ViT, teacher: ViT | ConvNet) -> ViT:
    """The student with the last block that `distill.wide_last` asks for; its heads keep the width of the others'.

    The paper widens the last block only, and keeps that at inference (arXiv 2511.15572, abstract and model card). That
    a linear layer brings the tokens to its width, and the heads, are choices of this project.
    """
    if not distill.wide_last:
        return student
    width = teacher.embed_dim if isinstance(teacher, ConvNet) else teacher.widths[-1]
    if width <= student.embed_dim:
        raise ValueError(
            f"distill.wide_last=True: the student is {student.embed_dim} wide and the teacher {width}: set it to False"
        )
    switches, heads = dataclasses.replace(student.switches, last_dim=width), student.heads
    head_dim = student.embed_dim // student.block_heads[-1]
    if isinstance(heads, int) and width % head_dim == 0:
        heads = (*student.block_heads[:-1], width // head_dim)
    return student.clone(switches=switches, heads=heads)


def tapped_widths(blocks: Blocks, student: ViT, teacher: ViT | ConvNet) -> tuple[int, int]:
    """Widths of the compared blocks of student and teacher."""
    theirs = teacher.embed_dim if isinstance(teacher, ConvNet) else teacher.widths[blocks.teacher - 1]
    return student.widths[blocks.student - 1], theirs


def make_pairs(
    distill: ConfigDict,
    student: ViT,
    teacher: ViT | ConvNet,
    comparisons: Comparisons,
    *,
    every: Comparisons | None = None,
) -> tuple[Pair, ...]:
    """The pairs with their targets; there are as many relation heads as the teacher has unless the config says more.

    Args:
      every: those of the whole training, where `comparisons` are those of a part of it. The names of the losses are
        then without blocks that change, and the same in all parts.
    """
    moving, every = every is not None, comparisons if every is None else every
    several_blocks = len({(blocks.student, blocks.teacher) for _, blocks in every}) > 1
    pairs, taken = [], set()
    for part, blocks in comparisons:
        target = find_target(part.name, **_options(distill, part, student, teacher, blocks))
        names = target.names
        if several_blocks and not (moving and None in (part.student, part.teacher)):
            names = tuple(f"{name}_{blocks.student}_{blocks.teacher}" for name in names)
        if part.hidden:
            names = tuple(f"{name}_hidden" for name in names)
        loss = part.options.get("relation_loss") or part.options.get("feature_loss")
        if loss and taken & set(names):
            names = tuple(f"{name}_{loss}" for name in names)
        if taken & set(names):
            raise ValueError(
                f"distill.target={distill.target!r} compares {part.name} twice in the same blocks: leave one out, or "
                "give both a loss= of their own"
            )
        taken |= set(names)
        patches_only = distill.patches_only if part.patches_only is None else part.patches_only
        if (patches_only or part.hidden) and part.name == "cls":
            raise ValueError(
                f"distill.target={distill.target!r} compares the CLS token, and only patches are to be compared: write "
                "cls(patches=false) without hidden=, or set distill.patches_only=False"
            )
        key, weight = f"taps_{every.index((part, blocks))}", part.weight * blocks.weight
        pairs.append(Pair(blocks, target, names, weight, patches_only or part.hidden > 0, key, part.hidden))
    return tuple(pairs)


def _options(distill: ConfigDict, part: Part, student: ViT, teacher: ViT | ConvNet, blocks: Blocks) -> dict[str, Any]:
    """Arguments of `find_target`: the config's, and in place of them those of the part."""
    options: dict[str, Any] = {
        "relation_loss": distill.relation_loss,
        "relation_normalize": distill.relation_normalize,
        "relation_temperature": distill.relation_temperature,
        "relation_form": distill.relation_form,
        "feature_loss": distill.feature_loss,
        "feature_norm": distill.feature_norm,
        "adapter": distill.adapter,
        "beta": distill.beta,
    }
    if distill.heads == "resplit" and compares_heads(part.name):
        options["relation_heads"] = distill.relation_heads or teacher.block_heads[blocks.teacher - 1]
    options |= part.options
    for key in ("relation_heads", "output_heads"):
        if is_relation(part.name) and key in options:
            _check_relation_heads(options[key], *tapped_widths(blocks, student, teacher))
    return options


def _check_relation_heads(heads: int, student: int, teacher: int) -> None:
    if heads < 1 or student % heads or teacher % heads:
        common = math.gcd(student, teacher)
        choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"{heads} relation heads do not divide the widths of both student ({student}) and teacher ({teacher}): "
            f"set distill.relation_heads. Choices: {choices}"
        )
