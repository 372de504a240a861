"""TARGETS: which features or relations of student and teacher are compared, and by which loss.

A relation target is named by its letters in any combination ('qk_vv', 'qq_kk_vv', 'oo'), a feature target by its row of
FEATURES. A new feature is one row there.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.errors import unknown
from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops.layer_norm import layer_norm
from tinymim_jax.ops.losses import cosine_distance, mean_squared
from tinymim_jax.ops.products import scaled_products
from tinymim_jax.tasks.distill.adapters import ADAPTERS
from tinymim_jax.tasks.distill.relations import RELATIONS, relations
from tinymim_jax.tasks.distill.target import Extracted, Target, chosen, distances


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
# Of the teacher's feature. layer: LayerNorm of each token | fixed: by mean and standard deviation of each channel, see
# statistics.py | none: as it is.
FEATURE_NORMS = ("layer", "fixed", "none")
# Of features that have a counterpart after the network's final norm.
FINAL = ("output", "cls")


def features(
    name: str,
    *,
    loss: str = "smooth_l1",
    beta: float = 2.0,
    norm: str = "layer",
    adapter: str = "linear",
    final: bool = False,
) -> Target:
    """The target of a row of FEATURES: the student's feature, behind an adapter, against the teacher's normalized one.

    With `norm` 'layer' the teacher's feature passes a LayerNorm without scale and bias. The student's passes an
    adapter, also where widths are equal, because it is not normalized; `adapter` 'none' leaves it as it is. `loss` is
    'smooth_l1' (published, with beta 2), 'mse' or 'cosine'. With `final` both are taken after the final norm.
    """
    take = FEATURES[name]
    compare = chosen("feature_loss", loss, {**distances(beta), "cosine": cosine_distance})
    if norm not in FEATURE_NORMS:
        raise unknown("distill.feature_norm", norm, FEATURE_NORMS)
    if adapter not in ADAPTERS:
        raise unknown("distill.adapter", adapter, ADAPTERS)
    if final and name not in FINAL:
        raise ValueError(
            f"distill.target: {name}(final=true): only {' and '.join(FINAL)} of the last block are taken after the "
            "final norm"
        )

    def extract(tap: Tap) -> Extracted:
        return {part: function(tap) for part, function in take.items()}

    def losses(student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
        found = {}
        for part in take:
            _check_features(student[part], teacher[part])
            found[part] = compare(student[part], _normalized(teacher[part]) if norm == "layer" else teacher[part])
        return found

    return Target(tuple(take), extract, losses, adapter=adapter, standardized=norm == "fixed", final=final)


def _check_features(student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's feature is {student.shape} and the teacher's {teacher.shape}: bring it to the teacher's "
            "width by a Linear, and the teacher's tokens to the student's grid"
        )


def _normalized(teacher: Array) -> Array:
    """The teacher's feature, each token normalized in float32."""
    width = teacher.shape[-1]
    return layer_norm(teacher, np.ones(width, np.float32), np.zeros(width, np.float32))


ATTENTION_MAP = "attention_map"


def attention_map() -> Target:
    """Mean squared error of the attention maps, softmax included (MAE-lite, arXiv 2205.14443, section 5).

    Where student and teacher have different numbers of heads, each of the teacher's maps is compared with a learned
    linear combination of the student's.
    """

    def extract(tap: Tap) -> Extracted:
        return {ATTENTION_MAP: jax.nn.softmax(scaled_products(tap.q, tap.k), axis=-1)}

    def losses(student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
        own, other = student[ATTENTION_MAP], teacher[ATTENTION_MAP]
        if own.shape != other.shape:
            raise ValueError(
                f"the student's attention maps are {own.shape} and the teacher's {other.shape} [images, heads, tokens, "
                "tokens]: give both the same patch size and image size"
            )
        return {ATTENTION_MAP: mean_squared(own, other)}

    return Target((ATTENTION_MAP,), extract, losses, adapter="heads")


# All targets with their published losses. Another order of the letters gives the same target.
TARGETS: dict[str, Target] = (
    {
        "_".join(names): relations(*names)
        for count in range(1, len(RELATIONS) + 1)
        for names in itertools.combinations(RELATIONS, count)
    }
    | {name: features(name) for name in FEATURES}
    | {ATTENTION_MAP: attention_map()}
)


def find_target(
    name: str,
    *,
    relation_loss: str = "kl",
    relation_normalize: bool = False,
    relation_temperature: float | None = None,
    relation_heads: int | None = None,
    output_heads: int = 1,
    relation_form: str = "auto",
    feature_loss: str = "smooth_l1",
    feature_norm: str = "layer",
    adapter: str = "linear",
    beta: float = 2.0,
    final: bool = False,
) -> Target:
    """The target of that name with these options; the error for an unknown name suggests the nearest one."""
    of_features = functools.partial(features, loss=feature_loss, beta=beta, norm=feature_norm, adapter=adapter)
    of_relations = functools.partial(
        relations,
        loss=relation_loss,
        beta=beta,
        normalize=relation_normalize,
        temperature=relation_temperature,
        heads=relation_heads,
        output_heads=output_heads,
        form=relation_form,
    )
    for check, one in ((of_features, "output"), (of_relations, "qk")):
        check(one)  # validates the options of both kinds, whichever is used
    if name in FEATURES:
        return of_features(name, final=final)
    if name == ATTENTION_MAP:
        return attention_map()
    if not is_relation(name):
        raise unknown("distill.target", name, TARGETS)
    return of_relations(*name.split("_"))


def is_relation(name: str) -> bool:
    """Whether the name is one of relations: letters such as 'qk', each at most once, joined by _."""
    parts = name.split("_")
    return set(parts) <= set(RELATIONS) and len(set(parts)) == len(parts)


def compares_heads(name: str) -> bool:
    """Whether the target compares q, k or v head by head."""
    return is_relation(name) and bool(set(name) & set("qkv"))
