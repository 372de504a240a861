"""A limited number of images of a split, for analyses."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.data.draws import permutation, philox
from tinymim_jax.data.pipeline import Batch, eval_batches
from tinymim_jax.data.sources.examples import Source, Subset
from tinymim_jax.data.views.transforms import EvalView


def some_of(source: Source, count: int, *, seed: int = 0) -> Source:
    """`count` random records in the order of the source, or all if there are fewer. The choice depends on the seed."""
    if count >= len(source):
        return source
    return Subset(source, np.sort(permutation(len(source), philox(seed, "subset", 1))[:count]))


def batches_of(source: Source, config: ConfigDict, size: int, *, workers: int = 0) -> Any:
    """Batches of `size` with all images of `source`, preprocessed as in evaluation; the last batch is padded.

    As in evaluation, more than 0.1 % of damaged images are an error: others would be measured in their place.
    """
    image_size = tuple(config.model.image_size)
    # Tasks that evaluate whole images have no eval_resize.
    view = EvalView(image_size, config.data.get("eval_resize") or max(image_size))
    return eval_batches(source, view=view, batch_size=size, upright=config.data.upright, workers=workers, tolerated=0)


def rows_of(function: Callable[[Batch], Any], batches: Any) -> Any:
    """`function(batch)`, a tree of arrays [batch, ...], for all batches, concatenated without rows of padding."""
    found = []
    with batches:
        for batch in batches:
            kept = batch["valid"]
            found.append(jax.tree.map(lambda array, kept=kept: np.asarray(array)[kept], function(batch)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
