"""TARGETS: which features or relations of student and teacher are compared, and by which loss.

A relation target is named by its letters in any combination ('qk_vv', 'qq_kk_vv'), a feature target by its row of
FEATURES. A new feature is one row there.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.errors import unknown
from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops.attention import choose_form
from tinymim_jax.ops.layer_norm import layer_norm
from tinymim_jax.ops.losses import cosine_distance, mean_squared, smooth_l1
from tinymim_jax.ops.placement import for_each_shard
from tinymim_jax.ops.platform import target
from tinymim_jax.ops.products import scaled_products
from tinymim_jax.ops.relations import relation_kl, resplit

Extracted = dict[str, Array]
Comparison = Callable[[Array, Array], Float[Array, "batch"]]


@dataclasses.dataclass(frozen=True)
class Target:
    """One way to compare two taps.

    names: the parts of the loss.
    extract: tap -> the arrays that are compared, by name; nothing else of the network is computed.
    loss: (student, teacher) -> float32 [batch] for each name; training minimizes the mean of their unweighted sum.
    adapted: a Linear brings the student's arrays [batch, tokens, width] to the teacher's width before `loss`.
    """

    names: tuple[str, ...]
    extract: Callable[[Tap], Extracted]
    loss: Callable[[Extracted, Extracted], dict[str, Float[Array, "batch"]]]
    adapted: bool = False


RELATIONS = ("qk", "qq", "kk", "vv")


def relations(*names: str, loss: str = "kl", beta: float = 2.0, heads: int | None = None, form: str = "auto") -> Target:
    """Token relations such as 'qk' or 'vv' (paper, section 3.1).

    Args:
      loss: 'kl' is KL(teacher || student) of their softmaxes; 'smooth_l1' and 'mse' compare the scaled products.
      beta: the distance from which smooth-L1 is linear.
      heads: q, k and v are split into this many relation heads (`ops.relations.resplit`). None keeps the attention
        heads, of which both tapped blocks must have the same number.
      form: 'dense', 'fused' (KL without an array of all pairs of tokens) or 'auto', see ops.attention.choose_form.
        The fused form takes each of q, k and v in one relation at most: not 'qk_qq'.
    """
    can_fuse = loss == "kl" and len(set("".join(names))) == sum(len(set(name)) for name in names)
    if form == "fused" and not can_fuse:
        raise ValueError(
            f"distill.relation_form='fused' needs relation_loss='kl' and each of q, k, v in one relation at most; got "
            f"{loss!r} and {'_'.join(names)!r}: set it to 'auto' or 'dense'"
        )
    compare = _chosen("relation_loss", loss, {"kl": relation_kl, **_distances(beta)})

    def extract(tap: Tap) -> Extracted:
        def part(letter: str) -> Array:
            features = getattr(tap, letter)
            return features if heads is None else resplit(features, heads)

        chosen = choose_form("distill.relation_form", form, tokens=tap.qkv.shape[1])
        if chosen == "fused" and can_fuse and target() != "gpu":  # there is no kernel for GPUs
            return {"qkv": tap.qkv, "q": part("q")}
        return {name: scaled_products(part(name[0]), part(name[1])) for name in names}

    def losses(student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
        if "qkv" in student:
            return _fused_kl(names, student, teacher)
        for name in names:
            _check_relations(student[name], teacher[name])
        return {name: compare(student[name], teacher[name]) for name in names}

    return Target(names, extract, losses)


def _fused_kl(names: tuple[str, ...], student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
    # Pallas takes a second to import, and only this form needs it.
    from tinymim_jax.ops.kernels.relations import fused_relation_kl, relations_of

    queries, teacher_queries = student["q"], teacher["q"]  # [batch, tokens, heads, head_dim]; only their shapes count
    shape, teacher_shape = ((x.shape[0], x.shape[2], x.shape[1], x.shape[1]) for x in (queries, teacher_queries))
    _check_relations(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(teacher_shape, jnp.float32))
    pairs, heads = relations_of(names), shape[1]

    def kernel(student: Array, teacher: Array) -> Array:
        return fused_relation_kl(student, teacher, heads, pairs, target() != "tpu")

    found = for_each_shard(kernel)(student["qkv"], teacher["qkv"])  # [batch, relations]
    return {name: found[:, column] for column, name in enumerate(names)}


def _check_relations(student: Any, teacher: Any) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's tapped block has {student.shape[1]} heads and the teacher's {teacher.shape[1]}: relations "
            "are compared head by head; set distill.heads='adaptive' (the published adaptive block) or 'resplit'"
        )
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"the student sees {student.shape[2]} tokens and the teacher {teacher.shape[2]}: give both the same "
            "patch size and image size"
        )


def _joined(name: str) -> Callable[[Tap], Array]:
    """q, k or v with its heads side by side, [batch, tokens, width]."""

    def take(tap: Tap) -> Array:
        features = getattr(tap, name)
        return features.reshape(*features.shape[:2], -1)

    return take


# By target: the arrays [batch, tokens, width] that it takes from a tap, by the name of their part of the loss.
FEATURES: dict[str, dict[str, Callable[[Tap], Array]]] = {
    "cls": {"cls": lambda tap: tap.output[:, :1]},
    "output": {"output": lambda tap: tap.output},
    "ffn": {"ffn": lambda tap: tap.ffn},
    # The block's output again, named as in the paper's comparison of branches before and after the residual sum.
    "ffn_residual": {"ffn_residual": lambda tap: tap.output},
    "attention": {"attention": lambda tap: tap.attention},
    "attention_residual": {"attention_residual": lambda tap: tap.middle},
    "q": {"q": _joined("q")},
    "k": {"k": _joined("k")},
    "v": {"v": _joined("v")},
    "qkv": {name: _joined(name) for name in "qkv"},
}


def features(name: str, *, loss: str = "smooth_l1", beta: float = 2.0) -> Target:
    """The target of a row of FEATURES: the student's feature, behind a Linear, against the teacher's normalized one.

    The teacher's feature passes a LayerNorm without scale and bias. The student's always passes a Linear, also where
    widths are equal, because it is not normalized. `loss` is 'smooth_l1' (published, with beta 2), 'mse' or 'cosine'.
    """
    take = FEATURES[name]
    compare = _chosen("feature_loss", loss, {**_distances(beta), "cosine": cosine_distance})

    def extract(tap: Tap) -> Extracted:
        return {part: function(tap) for part, function in take.items()}

    def losses(student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
        return {part: compare(student[part], _normalized(student[part], teacher[part])) for part in take}

    return Target(tuple(take), extract, losses, adapted=True)


def _normalized(student: Array, teacher: Array) -> Array:
    """The teacher's feature, each token normalized in float32."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's feature is {student.shape} and the teacher's {teacher.shape}: bring it to the teacher's "
            "width by a Linear, and the teacher's tokens to the student's grid"
        )
    width = teacher.shape[-1]
    return layer_norm(teacher, np.ones(width, np.float32), np.zeros(width, np.float32))


def _distances(beta: float) -> dict[str, Comparison]:
    if not beta > 0:
        raise ValueError(f"distill.beta={beta} must be positive: smooth-L1 is linear beyond it; the paper has 2")
    return {"smooth_l1": functools.partial(smooth_l1, beta=beta), "mse": mean_squared}


def _chosen(key: str, name: str, choices: Mapping[str, Comparison]) -> Comparison:
    if name not in choices:
        raise unknown(f"distill.{key}", name, choices)
    return choices[name]


# All targets with their published losses. Another order of the letters gives the same target.
TARGETS: dict[str, Target] = {
    "_".join(names): relations(*names)
    for count in range(1, len(RELATIONS) + 1)
    for names in itertools.combinations(RELATIONS, count)
} | {name: features(name) for name in FEATURES}


def find_target(
    name: str,
    *,
    relation_loss: str = "kl",
    feature_loss: str = "smooth_l1",
    beta: float = 2.0,
    relation_heads: int | None = None,
    relation_form: str = "auto",
) -> Target:
    """The target of that name with these losses; the error for an unknown name suggests the nearest one."""
    of_features = functools.partial(features, loss=feature_loss, beta=beta)
    of_relations = functools.partial(relations, loss=relation_loss, beta=beta, heads=relation_heads, form=relation_form)
    for check, one in ((of_features, "output"), (of_relations, "qk")):
        check(one)  # validates the losses of both kinds, whichever is used
    if name in FEATURES:
        return of_features(name)
    parts = name.split("_")
    if not set(parts) <= set(RELATIONS) or len(set(parts)) < len(parts):
        raise unknown("distill.target", name, TARGETS)
    return of_relations(*parts)
