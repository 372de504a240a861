"""Relations of all blocks of two networks, head by head."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tinymim_jax.analysis.networks import Network
from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops.products import scaled_products
from tinymim_jax.ops.relations import resplit
from tinymim_jax.ops.token_grid import Grid, resize_tokens, without_extra_tokens

RELATIONS = ("qk", "vv")
"""Those of the published loss."""


def common_heads(student: Network, teacher: Network, pairs: tuple[tuple[int, int], ...]) -> int:
    """A number of relation heads that divides the widths of both networks.

    It is that of the first trained pair of blocks, if they have the same; otherwise the largest one up to the number of
    heads in the teacher's last block.
    """
    common = math.gcd(*student.vit.widths, *teacher.vit.widths)
    if pairs:
        own, theirs = student.vit.block_heads[pairs[0][0] - 1], teacher.vit.block_heads[pairs[0][1] - 1]
        if own == theirs and common % own == 0:
            return own
    return max(h for h in range(1, teacher.vit.block_heads[-1] + 1) if common % h == 0)


def comparable(student: Network, teacher: Network) -> tuple[str, ...]:
    """The RELATIONS that can be compared. Rotated q and k of the teacher cannot be resized to another grid."""
    rotated = teacher.vit.switches.rope is not None and teacher.vit.grid != student.vit.grid
    return tuple(name for name in RELATIONS if not rotated or name == "vv")


def relation_kl_of_blocks(student: Network, teacher: Network, heads: int) -> Any:
    """(student's weights, teacher's weights, images) -> KL(teacher || student) by relation; to be jitted.

    Each is float32 [batch, student blocks, teacher blocks, heads]: summed over keys and averaged over queries, as in
    the loss. The patches are compared on the student's grid, and the CLS token if both networks have one.
    """

    def compare(own: Any, theirs: Any, images: jax.Array) -> dict[str, jax.Array]:
        mine, wanted = student.taps(own, images), teacher.taps(theirs, images)
        prefix = min(1, student.vit.switches.cls_tokens, teacher.vit.switches.cls_tokens)
        found = {}
        for relation in comparable(student, teacher):
            logs = [
                jnp.stack([_log_softmax(tap, relation, heads, network, student.vit.grid, prefix) for tap in taps])
                for network, taps in ((student, mine), (teacher, wanted))
            ]
            # One block of the teacher at a time: all pairs of blocks at once would not fit into memory.
            by_teacher = jax.lax.map(lambda log_teacher, log_student=logs[0]: _kl(log_student, log_teacher), logs[1])
            found[relation] = jnp.transpose(by_teacher, (2, 1, 0, 3))
        return found

    return compare


def relation_map(tap: Tap, relation: str, network: Network, queries: jax.Array) -> jax.Array:
    """Relation of one patch of each image to all its patches, float32 [batch, patches], mean over the network's heads.

    Args:
      queries: int [batch], the number of the patch in each image.
    """
    left, right = getattr(tap, relation[0]), getattr(tap, relation[1])
    weights = jax.nn.softmax(scaled_products(left, right).astype(jnp.float32), axis=-1)
    patches = network.vit.grid[0] * network.vit.grid[1]
    between = weights[:, :, -patches:, -patches:].mean(axis=1)  # [batch, queries, keys]
    return jnp.take_along_axis(between, queries[:, None, None], axis=1)[:, 0]


def _log_softmax(tap: Tap, relation: str, heads: int, network: Network, grid: Grid, prefix: int) -> jax.Array:
    left, right = (
        resplit(_tokens(getattr(tap, letter), network, grid, prefix).astype(jnp.float32), heads) for letter in relation
    )
    return jax.nn.log_softmax(scaled_products(left, right), axis=-1)


def _tokens(features: jax.Array, network: Network, grid: Grid, prefix: int) -> jax.Array:
    """[batch, tokens, heads, head_dim]: `prefix` CLS tokens (0 or 1), then the patches on `grid`."""
    return resize_tokens(without_extra_tokens(features, network.vit.prefix, prefix), network.vit.grid, grid, prefix)


def _kl(log_student: jax.Array, log_teacher: jax.Array) -> jax.Array:
    """KL [student blocks, batch, heads] of all student blocks and one of the teacher, [..., queries, keys] each."""
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return jnp.mean(divergence, axis=-1)
