"""Suggests which block of a teacher to distil from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_MEASURES = {
    "linear": "linear accuracy of the mean of its patch tokens",
    "effective_rank": "effective rank of the mean of its patch tokens, as there are no labels",
}


def suggest_tap(blocks: Sequence[Mapping[str, Any]], network: str, examples: int) -> dict[str, Any]:
    """The block with the best features: {"network", "block", "by", "value", "equal", "text"}.

    With labels the features are judged by the linear accuracy of the blocks, otherwise by their effective rank. "equal"
    lists the blocks within one standard error of the best. Of these the one nearest to three quarters of the depth is
    chosen, where the paper found the best block of ViT-L (18 of 24) and ViT-B (9 of 12). No student is distilled for
    the suggestion, so it is only a start for a search.

    Args:
      blocks: figures of the blocks, from analyze.analyze.
      examples: number of images of which the accuracies were measured.
    """
    by, values = _measure(blocks)
    best = max(values)
    error = math.sqrt(max(best * (1 - best), 0.0) / examples) if by != "effective_rank" else 0.0
    equal = [i + 1 for i, value in enumerate(values) if best - value <= error]
    block = min(equal, key=lambda i: abs(i - 0.75 * len(values)))
    text = f"block {block} of {len(blocks)} of the {network}: by the {_MEASURES[by]}, {values[block - 1]:.4g}"
    if len(equal) > 1:
        text += (
            f". Blocks {', '.join(map(str, equal))} are within one standard error of the best ({best:.4g}), and of "
            "these it is nearest to three quarters of the depth, the paper's choice"
        )
    text += ". No student was distilled for this suggestion; distill.teacher.tap takes it"
    return {"network": network, "block": block, "by": by, "value": values[block - 1], "equal": equal, "text": text}


def last_stage(blocks: Sequence[Mapping[str, Any]], network: str, _: int) -> dict[str, Any]:
    """The same for a convolutional network: always its last stage, since only that one can be distilled."""
    by, values = _measure(blocks)
    text = (
        f"stage {len(values)} of {len(values)} of the {network}, as no other one of a convolutional network can be "
        f"distilled: its {_MEASURES[by]} is {values[-1]:.4g}"
    )
    best = max(range(len(values)), key=values.__getitem__) + 1
    if best < len(values):
        text += f", and stage {best} has {values[best - 1]:.4g}"
    block = len(values)
    return {"network": network, "block": block, "by": by, "value": values[-1], "equal": [block], "text": text}


def _measure(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]]:
    """(name, values) of the first of _MEASURES that all blocks have."""
    by = next(key for key in _MEASURES if all(block.get(key) is not None for block in blocks))
    return by, [float(block[by]) for block in blocks]
