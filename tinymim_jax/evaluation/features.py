"""Features of all images of a split, extracted once, for k-NN and linear probes."""

import logging
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax.class_names import match_classes
from tinymim_jax.data.pipeline import eval_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import labelled
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.errors import unknown
from tinymim_jax.evaluation.collect import collect, row_step
from tinymim_jax.experiment import evaluation_batch_size
from tinymim_jax.models.heads import POOLS, check_pool, pool_tokens
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.runtime.progress import format_seconds

log = logging.getLogger(__name__)


class LabelledSplits(NamedTuple):
    """The two splits that k-NN and linear probes work on.

    class_order: int32, for each label of `evaluated` the same class's label in `train`.
    """

    train: Source
    evaluated: Source
    class_order: np.ndarray


class Features(NamedTuple):
    """What an encoder makes of a split, in its order.

    features: float32 `[examples, dim]`.
    labels: int32 `[examples]`.
    substituted: how many images could not be decoded, so that another one was used in their place.
    """

    features: np.ndarray
    labels: np.ndarray
    substituted: int


def labelled_splits(config: ConfigDict, *, data_dir: str | None, purpose: str) -> LabelledSplits:
    """The training and the evaluation split of `config.data`.

    Raises LabelError, with `purpose`, if one lacks labels, and ValueError if the evaluation split has a class
    that the training split does not have.
    """
    data = config.data
    train = open_source(
        data.source, split=data.train_split, data_dir=data_dir, examples=data.examples or None, seed=config.seed
    )
    evaluated = open_source(data.source, split=data.eval_split, data_dir=data_dir)
    train, evaluated = labelled(train, purpose), labelled(evaluated, purpose)
    order = match_classes(
        train.class_names,
        evaluated.class_names,
        subset=True,
        classifier=f"split {data.train_split!r}",
        data=f"split {data.eval_split!r} of {data.source!r}",
        remedy="Give both splits the same classes; the evaluation split may lack some",
    )
    return LabelledSplits(train, evaluated, order)


def split_features(
    config: ConfigDict, source: Source, encoder: ViT, params: Any, mesh: Mesh, *, pool: str, workers: int
) -> Features:
    """Features of all images of `source`, preprocessed as `config` evaluates them, on every host.

    Args:
      encoder: run to its end, its final norm included where it has one.
      params: of the encoder, placed on `mesh`.
      pool: 'mean' of the patch tokens, or the 'cls' token.
    """
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    check_pool(encoder, pool)
    mean, std = tuple(config.data.mean), tuple(config.data.std)

    def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens: Any = encoder.apply({"params": params}, normalize(batch["image"], mean, std))
        return pool_tokens(tokens, pool, encoder), batch["label"]

    batches = eval_batches(
        source,
        view=EvalView(tuple(config.model.image_size), config.data.eval_resize),
        batch_size=evaluation_batch_size(config, mesh.size),
        upright=config.data.upright,
        tolerated=0,
        workers=workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    began = time.perf_counter()
    (features, labels), substituted = collect(row_step(extract, mesh), params, batches, mesh, examples=len(source))
    seconds = time.perf_counter() - began
    log.info(
        "features of %s: %d in %s, %.0f images/s",
        source.split,
        len(source),
        format_seconds(seconds),
        len(source) / seconds,
    )
    return Features(features, labels, substituted)
