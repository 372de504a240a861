"""Features of every image of a split, extracted once: what k-NN and linear probes work on."""

import logging
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax.data.pipeline import Batches, eval_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.errors import unknown
from tinymim_jax.evaluation.collect import collect, row_step
from tinymim_jax.models.heads import POOLS, pool_tokens
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.runtime.progress import format_seconds

log = logging.getLogger(__name__)

_BATCH = 256  # images of each device at a time, at most: a config's batch may be split into micro-batches, or be huge


def extract_features(
    encoder: ViT,
    params: Any,
    batches: Batches,
    mesh: Mesh,
    *,
    examples: int,
    pool: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 `[examples, dim]` and labels int32 `[examples]`, in the order of the split, on every host.

    Args:
      encoder: run to its end, its final norm included where it has one.
      params: of the encoder, placed on `mesh`.
      batches: padded batches with `valid`; closed at the end.
      examples: length of the split.
      pool: 'mean' of the patch tokens, or the 'cls' token.
      mean, std: of the pixels.
    """
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)

    def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens: Any = encoder.apply({"params": params}, normalize(batch["image"], mean, std))
        return pool_tokens(tokens, pool, encoder.prefix), batch["label"]

    return collect(row_step(extract, mesh), params, batches, mesh, examples=examples)


def labelled_splits(config: ConfigDict, *, data_dir: str | None, purpose: str) -> tuple[Source, Source]:
    """The training and the evaluation split of `config.data`. Raises ValueError, with `purpose`, without labels."""
    data = config.data
    train = open_source(
        data.source, split=data.train_split, data_dir=data_dir, examples=data.examples or None, seed=config.seed
    )
    judged = open_source(data.source, split=data.eval_split, data_dir=data_dir)
    for split, source in ((data.train_split, train), (data.eval_split, judged)):
        if source.classes == 0:
            raise ValueError(f"split {split!r} of {data.source!r} has no labels: {purpose}")
    return train, judged


def split_features(
    config: ConfigDict, source: Source, encoder: ViT, params: Any, mesh: Mesh, *, pool: str, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """`extract_features` of a whole split, seen as `config` evaluates its images."""
    batches = eval_batches(
        source,
        view=EvalView(tuple(config.model.image_size), config.data.eval_resize),
        batch_size=min(-(-config.train.batch_size // mesh.size), _BATCH) * mesh.size,
        upright=config.data.upright,
        workers=workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    began = time.perf_counter()
    settings = {"pool": pool, "mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    found = extract_features(encoder, params, batches, mesh, examples=len(source), **settings)
    seconds = time.perf_counter() - began
    log.info(
        "features of %s: %d in %s, %.0f images/s",
        source.split,
        len(source),
        format_seconds(seconds),
        len(source) / seconds,
    )
    return found
