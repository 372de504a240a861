"""Targets that compare relations: similarities of all pairs of tokens, named by letters such as 'qk_vv' or 'oo'."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops.attention import choose_form
from tinymim_jax.ops.placement import for_each_shard
from tinymim_jax.ops.platform import target
from tinymim_jax.ops.products import scaled_products
from tinymim_jax.ops.relations import cosines, relation_cka, relation_kl, resplit
from tinymim_jax.tasks.distill.target import Extracted, Target, chosen, distances

RELATIONS = ("qk", "qq", "kk", "vv", "oo")

log = logging.getLogger(__name__)


def relations(
    *names: str,
    loss: str = "kl",
    beta: float = 2.0,
    normalize: bool = False,
    temperature: float | None = None,
    heads: int | None = None,
    output_heads: int = 1,
    form: str = "auto",
) -> Target:
    """Token relations such as 'qk' or 'vv' (paper, section 3.1), or 'oo', of the block's output.

    With 'oo', normalize, temperature and the patch tokens only, these are Gram anchoring (DINOv3, arXiv 2508.10104: mse
    of cosines), KL of cosines / 0.07 (LightlyTrain's loss on patches), and linear CKA.

    Args:
      loss: 'kl' is KL(teacher || student) of their softmaxes; 'smooth_l1' and 'mse' compare the scaled products; 'cka'
        is 1 - centred kernel alignment, which does not depend on their scale.
      beta: the distance from which smooth-L1 is linear.
      normalize: cosines of the tokens in place of their products.
      temperature: products or cosines are divided by it. None: the square root of the width of a head (published), and
        1 for cosines.
      heads: q, k and v are split into this many relation heads (`ops.relations.resplit`). None keeps the attention
        heads, of which both tapped blocks must have the same number.
      output_heads: the block's output, which has no heads, is split into this many for 'oo'.
      form: 'dense', 'fused' (KL without an array of all pairs of tokens) or 'auto', see ops.attention.choose_form.
        The fused form takes each of q, k and v in one relation at most, not 'qk_qq', and published scales only.
    """
    fused = _no_fused_form(names, loss, normalize, temperature)
    if form == "fused" and fused:
        raise ValueError(f"distill.relation_form='fused' {fused}: set it to 'auto' or 'dense'")
    compare = chosen("relation_loss", loss, {"kl": relation_kl, **distances(beta), "cka": relation_cka})
    if temperature is not None and not temperature > 0:
        raise ValueError(f"distill.relation_temperature={temperature} must be positive: similarities are divided by it")
    if temperature is not None and loss == "cka":
        raise ValueError(
            f"distill.relation_temperature={temperature} has no effect on relation_loss='cka', which does not depend "
            "on the scale: set it to None"
        )

    def extract(tap: Tap) -> Extracted:
        def part(letter: str) -> Array:
            if letter == "o":
                return resplit(tap.output, output_heads)
            features = getattr(tap, letter)
            return features if heads is None else resplit(features, heads)

        if _runs_fused(form, fused, tap.output.shape[1]):
            return {"qkv": tap.qkv, "q": part("q")}
        return {name: _similarities(part(name[0]), part(name[1]), normalize, temperature) for name in names}

    def losses(student: Extracted, teacher: Extracted) -> dict[str, Float[Array, "batch"]]:
        if "qkv" in student:
            return _fused_kl(names, student, teacher)
        for name in names:
            _check_relations(student[name], teacher[name])
        return {name: compare(student[name], teacher[name]) for name in names}

    return Target(names, extract, losses)


def _similarities(left: Array, right: Array, normalize: bool, temperature: float | None) -> Array:
    if normalize:
        found = cosines(left, right)
        return found if temperature is None else found / temperature
    found = scaled_products(left, right)
    return found if temperature is None else found * (left.shape[-1] ** 0.5 / temperature)


def _no_fused_form(names: tuple[str, ...], loss: str, normalize: bool, temperature: float | None) -> str:
    """Why the kernel does not compute these relations; "" where it does."""
    letters = "".join(names)
    if loss != "kl" or len(set(letters)) < sum(len(set(name)) for name in names):
        need = "needs relation_loss='kl' and each of q, k, v in one relation at most"
        return f"{need}; got {loss!r} and {'_'.join(names)!r}"
    if "o" in letters or normalize or temperature is not None:
        return "is for products of q, k and v at the published scale, not for oo, cosines or another temperature"
    return ""


def _runs_fused(form: str, no_fused: str, tokens: int) -> bool:
    if choose_form("distill.relation_form", form, tokens=tokens) != "fused":
        return False
    if target() == "gpu":
        no_fused = "has no kernel for GPUs"
    if no_fused:
        _log_dense(no_fused)
    return not no_fused


@functools.cache
def _log_dense(reason: str) -> None:
    log.info("distill.relation_form: dense, as the fused form %s", reason)


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
