"""Linear probe on features that are extracted once, without augmentation: minutes for any checkpoint.

The published probe, with random crops and flips in each epoch, is a training: configs/linprobe.py.
"""

import functools
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tinymim_jax import optim
from tinymim_jax.checkpoints.linear_probes import fold_batch_norm, probed_params
from tinymim_jax.checkpoints.params import check_free, save_params
from tinymim_jax.evaluation.checks import check_preprocessing
from tinymim_jax.evaluation.features import labelled_splits, split_features
from tinymim_jax.experiment import preprocessing
from tinymim_jax.ops.batch_norm import EPS
from tinymim_jax.ops.layer_norm import layer_norm
from tinymim_jax.ops.losses import soft_cross_entropy, soft_targets
from tinymim_jax.ops.products import full_precision
from tinymim_jax.ops.top_k import in_top
from tinymim_jax.runtime.files import write_json
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.sharding import AXES, make_mesh, replicated
from tinymim_jax.state import place_frozen
from tinymim_jax.tasks.pretrained import load
from tinymim_jax.tasks.probe.task import probe_record, probed_network

log = logging.getLogger(__name__)

BASE_LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
EPOCHS, BATCH_SIZE = 90, 1024  # as the momentum, from the SGD recipe of MoCo v3 (main_lincls.py)
HELD_OUT = 0.1  # fraction of the training split that chooses among several learning rates
_MOMENTUM, _HEAD_STD = 0.9, 0.01
_ROWS = 4096  # evaluated at a time

Head = dict[str, Any]  # kernel [dim, classes], bias [classes]; several heads have a leading dimension


def evaluate_probe(
    config: ConfigDict,
    checkpoint: str | pathlib.Path,
    *,
    pool: str = "cls",
    base_lrs: Sequence[float] = BASE_LRS,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    output: str | pathlib.Path | None = None,
    data_dir: str | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Loss, top-1 and top-5 on `config.data`'s evaluation split of a linear head trained on its training split.

    "substituted" counts the images of both splits that could not be decoded, so that another one was used instead.

    Args:
      config: any experiment; its data, image size, dtype and seed are used.
      checkpoint: a run, or a converted file; its encoder and the norm after pooling are used.
      pool: 'cls' token after the final norm (as in MAE), or 'mean' of the patch tokens, followed by a norm.
      base_lrs: learning rates of SGD for a batch of 256. Of several, the one with the best top-1 on a held-out tenth of
        the training split is chosen, and a head is trained with it on the whole split.
      epochs, batch_size: of the head's training.
      output: folder for the classifier, as a checkpoint for the other commands, and for result.json.

    Raises ValueError for splits without labels and for values out of range; CheckpointError where `output` is in use.
    """
    if not base_lrs or min(base_lrs) <= 0 or epochs < 1 or batch_size < 1:
        raise ValueError(
            f"base_lr={list(base_lrs)}, epochs={epochs}, batch_size={batch_size}: choose rates above 0, the others "
            "from 1"
        )
    if output is not None:
        check_free(output)
    splits = labelled_splits(config, data_dir=data_dir, purpose="a head is trained and evaluated by them")
    classes, mesh = splits.train.classes, make_mesh()
    loaded = load(str(checkpoint))
    check_preprocessing(config, loaded.model, str(checkpoint))
    network = probed_network(loaded, config.model, pool, classes)
    frozen = probed_params(loaded.model, loaded.params, image_size=network.encoder.image_size, pool=pool)
    placed = place_frozen(frozen["encoder"], mesh)
    trained, evaluated = (
        split_features(config, source, network.encoder, placed, mesh, pool=pool, workers=workers)
        for source in (splits.train, splits.evaluated)
    )
    x, y, eval_x, eval_y = trained.features, trained.labels, evaluated.features, splits.class_order[evaluated.labels]
    if pool == "mean":
        norm = jax.jit(lambda x: layer_norm(x, frozen["fc_norm"]["scale"], frozen["fc_norm"]["bias"]))
        x, eval_x = np.asarray(norm(x)), np.asarray(norm(eval_x))
    fit = functools.partial(
        fit_heads, classes=classes, epochs=epochs, batch_size=batch_size, seed=config.seed, mesh=mesh
    )
    best, tried = _best_rate(fit, x, y, base_lrs, config.seed)
    heads = fit(x, y, base_lrs=(best,))
    result: dict[str, Any] = {name: float(values[0]) for name, values in head_figures(heads, eval_x, eval_y).items()}
    result |= {"examples": len(eval_y), "substituted": trained.substituted + evaluated.substituted}
    result |= {"base_lr": best, "held_out_top1": tried}
    if output is not None and jax.process_index() == 0:
        model = {
            "encoder": network.encoder.record(),
            "classifier": {"classes": classes, "pool": pool},
            "probe": probe_record(loaded),
            "preprocessing": preprocessing(config, splits.train.class_names),
        }
        save_params(output, frozen | {"head": jax.tree.map(lambda leaf: leaf[0], heads)}, model)
        write_json(pathlib.Path(output).expanduser() / "result.json", result)
    return result


def fit_heads(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    base_lrs: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    mesh: Mesh,
) -> Head:
    """A linear head for each rate, trained in parallel on the same batches: kernel `[rates, dim, classes]` and bias.

    Features are standardized once by their mean and variance over all of `features`, which a batch norm's running
    statistics would approach; the heads that are returned take features that are not standardized. Each device holds
    all of `features` and trains some of the heads.
    """
    statistics = _moments(features)
    scale = 1 / np.sqrt(statistics["variance"] + EPS)
    normed = (features - statistics["mean"].astype(np.float32)) * scale.astype(np.float32)
    batch_size = min(batch_size, len(features))
    steps = len(features) // batch_size  # of an epoch; each epoch leaves out another remainder
    heads_sharding, everywhere = NamedSharding(mesh, PartitionSpec(AXES)), replicated(mesh)
    count = -(-len(base_lrs) // mesh.size) * mesh.size
    padded = [*base_lrs, *[base_lrs[-1]] * (count - len(base_lrs))]  # the same number for each device
    rates = jax.device_put(np.asarray(padded, np.float32) * batch_size / 256, heads_sharding)
    data = jax.device_put((normed, labels.astype(np.int32)), everywhere)
    root = jax.random.key(seed)
    head = {
        "kernel": _HEAD_STD * jax.random.normal(jax.random.fold_in(root, epochs), (features.shape[1], classes)),
        "bias": jnp.zeros(classes),
    }
    schedule = optim.warmup_cosine(1.0, 0, epochs * steps)
    optimizer = optim.make_optimizer("sgd", schedule, head, momentum=_MOMENTUM, weight_decay=0.0)

    def loss(head: Head, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jnp.matmul(x, head["kernel"], precision=full_precision(x.dtype)) + head["bias"]
        return soft_cross_entropy(logits, soft_targets(y, classes, smoothing=0.0)).mean()

    def update(head: Head, state: Any, rate: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Head, Any]:
        updates, state = optimizer.update(jax.grad(loss)(head, x, y), state, head)
        return optax.apply_updates(head, jax.tree.map(lambda leaf: rate * leaf, updates)), state

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=heads_sharding)
    def epoch(heads: tuple[Head, Any], rates: jax.Array, data: tuple[jax.Array, jax.Array], key: jax.Array):
        order = jax.random.permutation(key, len(features))[: steps * batch_size].reshape(steps, batch_size)

        def step(heads: tuple[Head, Any], rows: jax.Array) -> tuple[tuple[Head, Any], None]:
            x, y = data[0][rows], data[1][rows]
            return jax.vmap(update, in_axes=(0, 0, 0, None, None))(*heads, rates, x, y), None

        return jax.lax.scan(step, heads, order)[0]

    start = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), (head, optimizer.init(head)))
    heads, began = jax.device_put(start, heads_sharding), time.perf_counter()
    for i in range(epochs):
        heads = epoch(heads, rates, data, jax.random.fold_in(root, i))
    trained = jax.device_get(jax.jit(lambda trained: trained, out_shardings=everywhere)(heads[0]))
    seconds = format_seconds(time.perf_counter() - began)
    log.info("%d heads trained for %d epochs on %d features in %s", len(base_lrs), epochs, len(features), seconds)
    folded = [
        fold_batch_norm({name: leaf[i] for name, leaf in trained.items()}, statistics) for i in range(len(base_lrs))
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *folded)


def head_figures(heads: Head, features: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Means over all examples for each head: {"loss", "top1", "top5"}, float64 `[heads]`."""

    @jax.jit
    def sums(heads: Head, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        def of_one(head: Head) -> dict[str, jax.Array]:
            logits = jnp.matmul(x, head["kernel"], precision=full_precision(x.dtype)) + head["bias"]
            losses = soft_cross_entropy(logits, soft_targets(y, logits.shape[1], smoothing=0.0))
            return {"loss": losses.sum(), "top1": in_top(logits, y, 1).sum(), "top5": in_top(logits, y, 5).sum()}

        return jax.lax.map(of_one, heads)

    total = {name: np.zeros(len(heads["bias"])) for name in ("loss", "top1", "top5")}
    for start in range(0, len(features), _ROWS):
        part = sums(heads, features[start : start + _ROWS], labels[start : start + _ROWS])
        for name, values in part.items():
            total[name] += np.asarray(values, np.float64)
    return {name: values / len(features) for name, values in total.items()}


def _moments(features: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and variance over all rows in float64, without a copy of all rows."""
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(features), _ROWS):
        squares += np.square(features[start : start + _ROWS] - mean).sum(axis=0)
    return {"mean": mean, "variance": squares / len(features)}


def _best_rate(
    fit: Callable[..., Any], features: np.ndarray, labels: np.ndarray, base_lrs: Sequence[float], seed: int
) -> tuple[float, dict[str, float]]:
    """The rate with the best top-1 on a held-out tenth, and the top-1 of each; of a single rate nothing is held out."""
    if len(base_lrs) == 1:
        return base_lrs[0], {}
    held, kept = _held_out(len(features), seed)
    tops = head_figures(fit(features[kept], labels[kept], base_lrs=base_lrs), features[held], labels[held])["top1"]
    tried = {f"{rate:g}": float(top) for rate, top in zip(base_lrs, tops)}
    log.info("top-1 on %d held-out images by base_lr: %s", len(held), tried)
    best = base_lrs[int(np.argmax(list(tried.values())))]
    if best in (min(base_lrs), max(base_lrs)):
        log.warning("the best base_lr, %g, is at the end of the range: try values beyond it (--base_lr)", best)
    return best, tried


def _held_out(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(held-out rows, the other rows), drawn by the seed."""
    order = np.random.default_rng(seed).permutation(count)
    held = max(1, round(HELD_OUT * count))
    return np.sort(order[:held]), np.sort(order[held:])
