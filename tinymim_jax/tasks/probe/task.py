"""Linear probe: a batch norm and a linear head are trained on the features of a frozen encoder."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import digest
from tinymim_jax.checkpoints.linear_probes import probed_params, with_neutral_batch_norm
from tinymim_jax.class_names import ClassMismatch
from tinymim_jax.errors import unknown
from tinymim_jax.models.heads import POOLS, Classifier, check_pool
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.batch_norm import batch_moments, batch_norm, update_running_stats
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.losses import soft_cross_entropy, soft_targets
from tinymim_jax.ops.products import full_precision
from tinymim_jax.ops.top_k import in_top
from tinymim_jax.tasks.pretrained import Loaded, class_order, compute_dtype, load, log_unused, same_part
from tinymim_jax.tasks.stand_in import VIT_B, StandIn, encoder_zeros, is_missing
from tinymim_jax.tasks.task import RUNNING, Batch, Params, Task, TaskType

log = logging.getLogger(__name__)


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config` for a data set with these classes (MAE release, main_linprobe.py).

    The encoder is that of `init`. Its features are what a Classifier's head sees: the CLS token after the final norm,
    or the mean of the patch tokens and a norm after that.

    Raises ValueError if there are no classes, or no checkpoint.
    """
    probe, classes = config.probe, len(class_names)
    if classes == 0:
        raise ValueError(f"data.source={config.data.source!r} has no labels to probe by: choose a labelled set")
    if not config.init:
        raise ValueError(
            "init is empty: a linear probe evaluates a pre-trained encoder. Name its checkpoint, init=runs/b"
        )
    loaded = load(config.init)
    network = probed_network(loaded, config.model, probe.pool, classes)
    classifier, image_size = {"classes": classes, "pool": probe.pool}, network.encoder.image_size
    start = nn.initializers.normal(probe.head_std)
    method = Probe(
        network=network,
        head=nn.Dense(classes, kernel_init=start, precision=full_precision(jnp.float32)),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
    )
    return Task(
        model={"encoder": network.encoder.record(), "classifier": classifier, "probe": probe_record(loaded)},
        init=method.init,
        losses=method.losses,
        names=("loss", "top1", "top5"),
        load_frozen=lambda: probed_params(loaded.model, loaded.params, image_size=image_size, pool=probe.pool),
        start=lambda params: _loaded_head(params, loaded, classifier, class_names, config.data.source),
    )


@dataclasses.dataclass(frozen=True)
class Probe:
    """A frozen network and the head that learns from its features.

    network: a Classifier of which the features are used, not the head.
    mean, std: by which its pixels are normalized.
    """

    network: Classifier
    head: nn.Dense
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, key: jax.Array) -> Params:
        """A fresh head and the batch norm's running statistics."""
        dim = self.network.encoder.widths[-1]
        statistics = {"mean": jnp.zeros(dim), "variance": jnp.ones(dim)}
        return {"head": self.head.init(key, jnp.zeros((1, dim)))["params"], "batch_norm": statistics}

    def losses(self, params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> dict[str, Any]:
        """See Task.losses; `frozen` are the network's weights."""
        del key
        images, labels = normalize(batch["image"], self.mean, self.std), batch["label"]
        features: Any = self.network.apply({"params": frozen}, images, method="features")
        running, updated = params["batch_norm"], {}
        if train:
            moments = batch_moments(features)
            updated = {RUNNING: {"batch_norm": update_running_stats(running, *moments, count=len(features))}}
        else:
            moments = running["mean"], running["variance"]
        logits: Any = self.head.apply({"params": params["head"]}, batch_norm(features, *moments))
        loss = soft_cross_entropy(logits, soft_targets(labels, self.network.classes, smoothing=0.0))
        return {"loss": loss, "top1": in_top(logits, labels, 1), "top5": in_top(logits, labels, 5)} | updated


def _loaded_head(
    params: Params, loaded: Loaded, classifier: dict[str, Any], class_names: Sequence[str], data: str
) -> Params:
    """The head and statistics of a probe's checkpoint; `params`, with a log line, where there is none that fits."""
    if "probe" not in loaded.model:
        log_unused(loaded, {"encoder"})
        return params
    if not same_part(loaded, "classifier", classifier):
        return params
    try:
        order = class_order(loaded, class_names, data)
    except ClassMismatch as error:
        log.warning("the head of %s is initialized anew: %s", loaded.path, error)
        return params
    own, statistics = with_neutral_batch_norm(
        jax.tree.map(lambda leaf: np.asarray(leaf)[..., order], loaded.params["head"])
    )
    return {"head": own, "batch_norm": statistics}


def probed_network(loaded: Loaded, model: ConfigDict, pool: str, classes: int) -> Classifier:
    """The classifier that is probed: the checkpoint's encoder, at the config's image size and dtype, and a head."""
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    if loaded.model["encoder"].get("dist_token"):
        raise ValueError(
            f"{loaded.path} has a DIST token, so its classifiers have two heads, and a linear probe has one: "
            "evaluate it with tinymim knn, or fine-tune it"
        )
    encoder = ViT.from_record(
        loaded.model["encoder"],
        image_size=tuple(model.image_size),
        final_norm=pool == "cls",
        scan=model.scan,
        attention=model.attention,
        dtype=compute_dtype(model),
    )
    check_pool(encoder, pool)
    return Classifier(encoder, classes=classes, pool=pool)


def probe_record(loaded: Loaded) -> dict[str, str]:
    """Path and digest of the encoder: a probe's run saves its head only (see checkpoints.params.load_params)."""
    if "probe" in loaded.model:
        return loaded.model["probe"]
    path = loaded.path if "://" in loaded.path else os.path.abspath(os.path.expanduser(loaded.path))
    return {"checkpoint": path, "digest": digest(loaded.params["encoder"])}


def _stand_ins(config: ConfigDict, classes: int) -> list[StandIn]:
    """A ViT-B for a missing encoder: the config does not say what size the probed encoder has."""
    del classes
    if not is_missing(config.init):
        return []
    path = config.init or "an encoder"
    return [StandIn("init", encoder_zeros(path, VIT_B), f"init={path} is not here: taken as a ViT-B")]


TASK = TaskType(build=build, needs_labels=True, batch_norm=True, stand_ins=_stand_ins)
