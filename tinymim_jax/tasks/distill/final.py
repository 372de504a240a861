"""Targets that are compared after the final norm of both networks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.distill.pairs import Pair
from tinymim_jax.tasks.task import Params


def check_final(pairs: Sequence[Pair], student: ViT, teacher: ViT | ConvNet) -> None:
    """Raises ValueError where `final=true` of a target names a block or a network without a final norm."""
    for pair in pairs:
        if not pair.target.final:
            continue
        if isinstance(teacher, ConvNet) or not teacher.final_norm:
            raise ValueError("distill.target: final=true: the teacher has no final norm: leave it out")
        last, blocks = (student.depth, teacher.depth), (pair.blocks.student, pair.blocks.teacher)
        if blocks != last:
            raise ValueError(
                f"distill.target: final=true is after the last blocks, {last[0]} and {last[1]}, and blocks {blocks[0]} "
                f"and {blocks[1]} are compared: write (final=true, student={last[0]}, teacher={last[1]})"
            )


def finished(network: ViT | ConvNet, params: Params, pairs: Sequence[Pair], taps: Sequence[Tap]) -> list[Tap]:
    """`taps` with their output after the final norm of `network` where a target compares that."""

    def finish(tap: Tap) -> Tap:
        output: Any = network.apply({"params": params}, tap.output, method="finish")  # pyright: ignore[reportCallIssue]
        return dataclasses.replace(tap, output=output)

    return [finish(tap) if pair.target.final else tap for pair, tap in zip(pairs, taps, strict=True)]
