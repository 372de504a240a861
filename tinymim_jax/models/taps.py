"""Which blocks of an encoder the head of a segmentation network sees."""

import math


def default_taps(head: str, depth: int) -> tuple[int, ...]:
    """The last block for 'linear' and 'mask', else four: blocks 4, 6, 8 and 12 of 12 as published, or in proportion."""
    if head in ("linear", "mask"):
        return (depth,)
    return tuple(max(1, math.ceil(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1))
