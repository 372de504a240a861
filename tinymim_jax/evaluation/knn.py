"""k-nearest-neighbor accuracy of a checkpoint's features (DINO's protocol): nothing is trained."""

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from tinymim_jax.evaluation.checks import check_preprocessing
from tinymim_jax.evaluation.features import labelled_splits, split_features
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.neighbors import nearest, unit_length, vote
from tinymim_jax.sharding import AXES, batch_sharding, make_mesh, replicated
from tinymim_jax.state import place_frozen
from tinymim_jax.tasks.pretrained import compute_dtype, fit_positions, load

NEIGHBORS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# The similarities that a device holds at a time: 4 bytes x 1,024 x 65,536 = 256 MiB.
_QUERIES = 1024
_BANK_ROWS = 65_536


def evaluate_knn(
    config: ConfigDict,
    checkpoint: str | pathlib.Path,
    *,
    neighbors: Sequence[int] = NEIGHBORS,
    temperature: float = TEMPERATURE,
    pool: str = "mean",
    data_dir: str | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1 and top-5 for each k on `config.data`: neighbors from its training, queries from its evaluation split.

    "substituted" counts the images of both splits that could not be decoded, so that another one was used instead.

    Args:
      config: any experiment; its data, image size, dtype and batch size are used.
      checkpoint: a run, or a converted file; only its encoder is used.
      neighbors: values of k.
      temperature: each neighbor's vote has the weight exp(cosine similarity / temperature).
      pool: 'mean' of the patch tokens, or 'cls'.

    Raises ValueError if a split has no labels, where the training split has fewer images than the largest k, and
    for values out of range.
    """
    if not neighbors or min(neighbors) < 1 or temperature <= 0:
        raise ValueError(f"k={list(neighbors)}, temperature={temperature}: choose k from 1 and a temperature above 0")
    splits = labelled_splits(config, data_dir=data_dir, purpose="k-NN votes by them")
    if max(neighbors) > len(splits.train):
        raise ValueError(
            f"k={max(neighbors)}: split {config.data.train_split!r} has only {len(splits.train)} images; choose a "
            "smaller --k"
        )

    mesh = make_mesh()
    loaded = load(str(checkpoint))
    check_preprocessing(config, loaded.model, str(checkpoint))
    image_size = tuple(config.model.image_size)
    encoder = ViT.from_record(loaded.model["encoder"], image_size=image_size, dtype=compute_dtype(config.model))
    params = place_frozen(fit_positions(loaded, encoder), mesh)
    bank, queries = (
        split_features(config, source, encoder, params, mesh, pool=pool, workers=workers)
        for source in (splits.train, splits.evaluated)
    )
    scores = knn_scores(
        bank.features,
        bank.labels,
        queries.features,
        classes=splits.train.classes,
        neighbors=neighbors,
        temperature=temperature,
        mesh=mesh,
    )
    labels = splits.class_order[queries.labels]
    result: dict[str, float] = {}
    for k, votes in scores.items():
        order = np.argsort(-votes, axis=1, kind="stable")[:, :5]
        hits = order == labels[:, None]
        result |= {f"knn{k}_top1": float(hits[:, 0].mean()), f"knn{k}_top5": float(hits.any(axis=1).mean())}
    return result | {"examples": len(labels), "substituted": bank.substituted + queries.substituted}


def knn_scores(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    classes: int,
    neighbors: Sequence[int],
    temperature: float,
    mesh: Mesh,
) -> dict[int, np.ndarray]:
    """For each k the votes float32 `[queries, classes]`; the class with the most is the prediction.

    Args:
      bank, labels: features `[n, dim]` on the host, not normalized, and their labels `[n]`. They are split over the
        devices of `mesh`.
      queries: features `[m, dim]`.
    """
    largest = max(neighbors)
    rows = -(-len(bank) // mesh.size)
    chunks = -(-rows // _BANK_ROWS)
    padded = mesh.size * chunks * -(-rows // chunks)
    placed = [
        _placed(_padded(array, padded), mesh)
        for array in (np.asarray(bank, np.float32), labels, np.ones(len(bank), bool))
    ]
    search = _search(mesh, chunks, largest)
    found = []
    for start in range(0, len(queries), _QUERIES):
        some = _padded(np.asarray(queries[start : start + _QUERIES], np.float32), min(_QUERIES, len(queries)))
        similarities, theirs = search(jax.device_put(some, replicated(mesh)), *placed)
        found.append([_votes(similarities, theirs, k, classes, temperature) for k in neighbors])
    columns = zip(*([np.asarray(votes) for votes in each] for each in found))
    return {k: np.concatenate(parts)[: len(queries)] for k, parts in zip(neighbors, columns)}


def _search(mesh: Mesh, chunks: int, k: int):
    """Jitted (queries, bank, labels, valid) -> (similarities, labels) of the k nearest, replicated on all devices."""
    split = PartitionSpec(AXES)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), split, split, split),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def on_device(queries, bank, labels, valid):
        parts = [array.reshape(chunks, -1, *array.shape[1:]) for array in (bank, labels, valid)]
        best = jax.lax.map(lambda part: nearest(queries, unit_length(part[0]), part[1], part[2], k), tuple(parts))
        everywhere = jax.lax.all_gather(best, AXES, axis=0, tiled=True)  # [devices * chunks, queries, k]
        similarities, theirs = (jnp.concatenate(list(array), axis=1) for array in everywhere)
        similarities, places = jax.lax.top_k(similarities, k)
        return similarities, jnp.take_along_axis(theirs, places, axis=1)

    return jax.jit(lambda queries, *rest: on_device(unit_length(queries), *rest))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _votes(similarities: jax.Array, theirs: jax.Array, k: int, classes: int, temperature: float) -> jax.Array:
    return vote(similarities[:, :k], theirs[:, :k], classes, temperature)


def _placed(array: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])
