"""Linear probe: a linear head, behind a batch norm, learns the labels from a frozen encoder's features."""

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
from tinymim_jax.checkpoints.probes import frozen_parts, unfolded
from tinymim_jax.class_names import ClassMismatch
from tinymim_jax.errors import unknown
from tinymim_jax.models.heads import POOLS, Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.batch_norm import batch_moments, batch_norm, update_running_stats
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.losses import soft_cross_entropy, soft_targets
from tinymim_jax.ops.products import full_precision
from tinymim_jax.ops.top_k import in_top
from tinymim_jax.tasks.pretrained import Loaded, class_order, compute_dtype, load
from tinymim_jax.tasks.stand_in import VIT_B, StandIn, encoder_zeros, is_missing
from tinymim_jax.tasks.task import RUNNING, Batch, Params, Task, TaskType

log = logging.getLogger(__name__)


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config` for a data set with these classes (MAE release, main_linprobe.py).

    The encoder is that of `init`. Its features are what a Classifier's head sees: the CLS token after the final norm,
    or the mean of the patch tokens and a norm after that.

    Raises ValueError where there are no classes, or no checkpoint.
    """
    probe, classes = config.probe, len(class_names)
    if classes == 0:
        raise ValueError(f"data.source={config.data.source!r} has no labels to probe by: choose a labelled set")
    if not config.init:
        raise ValueError("init is empty: a probe judges a pre-trained encoder. Name its checkpoint, init=runs/b")
    loaded = load(config.init)
    network = probed_network(loaded, config.model, probe.pool, classes)
    start = nn.initializers.normal(probe.head_std)
    head = nn.Dense(classes, kernel_init=start, precision=full_precision(jnp.float32))
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    dim = network.encoder.embed_dim

    def init(key: jax.Array) -> Params:
        statistics = {"mean": jnp.zeros(dim), "variance": jnp.ones(dim)}
        return {"head": head.init(key, jnp.zeros((1, dim)))["params"], "batch_norm": statistics}

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> dict[str, Any]:
        del key
        images, labels = normalize(batch["image"], mean, std), batch["label"]
        features: Any = network.apply({"params": frozen}, images, method="features")
        running, moved = params["batch_norm"], {}
        if train:
            moments = batch_moments(features)
            moved = {RUNNING: {"batch_norm": update_running_stats(running, *moments, count=len(features))}}
        else:
            moments = running["mean"], running["variance"]
        logits: Any = head.apply({"params": params["head"]}, batch_norm(features, *moments))
        loss = soft_cross_entropy(logits, soft_targets(labels, classes, smoothing=0.0))
        return {"loss": loss, "top1": in_top(logits, labels, 1), "top5": in_top(logits, labels, 5)} | moved

    def start(params: Params) -> Params:
        if "probe" not in loaded.model or loaded.model["classifier"] != classifier:
            return params
        try:
            order = class_order(loaded, class_names, config.data.source)
        except ClassMismatch as error:
            log.warning("the head of %s is initialized anew: %s", loaded.path, error)
            return params
        own, statistics = unfolded(jax.tree.map(lambda leaf: np.asarray(leaf)[..., order], loaded.params["head"]))
        return {"head": own, "batch_norm": statistics}

    classifier = {"classes": classes, "pool": probe.pool}
    image_size = network.encoder.image_size
    return Task(
        model={"encoder": network.encoder.record(), "classifier": classifier, "probe": probe_record(loaded)},
        init=init,
        losses=losses,
        names=("loss", "top1", "top5"),
        load_frozen=lambda: frozen_parts(loaded.model, loaded.params, image_size=image_size, pool=probe.pool),
        start=start,
    )


def probed_network(loaded: Loaded, model: ConfigDict, pool: str, classes: int) -> Classifier:
    """The checkpoint's own encoder at the config's image size and dtype, in a Classifier without its head's weights."""
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    if loaded.model["encoder"].get("dist_token"):
        raise ValueError(
            f"{loaded.path} has a DIST token, and so its classifiers have two heads: a linear probe has one. Judge it "
            "by tinymim knn, or fine-tune it"
        )
    encoder = ViT.from_record(
        loaded.model["encoder"],
        image_size=tuple(model.image_size),
        final_norm=pool == "cls",
        scan=model.scan,
        dtype=compute_dtype(model),
    )
    return Classifier(encoder, classes=classes, pool=pool)


def probe_record(loaded: Loaded) -> dict[str, str]:
    """Whose encoder it is: a run of a probe saves its head alone, see params_io.load_params."""
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


TASK = TaskType(build=build, needs_labels=True, stand_ins=_stand_ins)
