"""Fine-tuning: an encoder and a new head learn the labels."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.keys import named
from tinymim_jax.ops.losses import cross_entropy
from tinymim_jax.tasks.encoder import Loaded, build_encoder, fill_encoder, load
from tinymim_jax.tasks.task import Batch, Params, PerExample, Task

log = logging.getLogger(__name__)

# Heads of every block in the authors' fine-tuning code, by width (models_vit.py), whatever pre-training had.
OFFICIAL_HEADS = {192: 3, 384: 6, 768: 12}


def build(config: ConfigDict, classes: int) -> Task:
    """The task of `config` for a data set of so many classes."""
    classify = config.classify
    loaded = load(config.init) if config.init else None
    encoder = _encoder(config, loaded)
    network = Classifier(encoder, classes, classify.pool, classify.head_std)
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    smoothing = classify.label_smoothing

    def init(key: jax.Array) -> Params:
        return network.init(key, jnp.zeros((1, *encoder.image_size, 3)))["params"]

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> PerExample:
        images = normalize(batch["image"], mean, std)
        drop_key = named(key, "drop_path") if train else None
        logits: Any = network.apply({"params": params}, images, drop_key=drop_key)
        labels = batch["label"]
        loss = cross_entropy(logits, labels, smoothing=smoothing if train else 0.0)
        return {"loss": loss, "top1": _in_top(logits, labels, 1), "top5": _in_top(logits, labels, 5)}

    def start(params: Params) -> Params:
        assert loaded is not None
        filled = fill_encoder(params, loaded, encoder, same_heads=classify.heads == "keep")
        return filled | _same_head(params, loaded, classify.pool)

    record = {"classes": classes, "pool": classify.pool}
    return Task(
        model={"encoder": encoder.record(), "classifier": record},
        init=init,
        losses=losses,
        names=("loss", "top1", "top5"),
        start=start if loaded else None,
    )


def _encoder(config: ConfigDict, loaded: Loaded | None) -> ViT:
    """The encoder to fine-tune; its attention heads are a choice when they were pre-trained."""
    encoder = build_encoder(config.model, final_norm=config.classify.pool == "cls")
    choice = config.classify.heads
    if choice == "official":
        if encoder.embed_dim not in OFFICIAL_HEADS:
            raise ValueError(f"classify.heads='official' is published for widths {tuple(OFFICIAL_HEADS)} only")
        return encoder.clone(heads=OFFICIAL_HEADS[encoder.embed_dim])
    if choice != "keep":
        raise unknown("classify.heads", choice, ("keep", "official"))
    return encoder.clone(heads=tuple(loaded.model["encoder"]["heads"])) if loaded else encoder


def _same_head(params: Params, loaded: Loaded, pool: str) -> Params:
    """The loaded checkpoint's head and norm where they fit; a head for other classes is left behind."""
    record = loaded.model.get("classifier")
    if record is None:
        return {}
    if record != {"classes": params["head"]["bias"].shape[0], "pool": pool}:
        log.warning("the head of %s (%s) does not fit and starts afresh", loaded.path, record)
        return {}
    return {name: jax.tree.map(np.asarray, loaded.params[name]) for name in params if name != "encoder"}


def _in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """float32 [batch]: 1 where the label is among the k highest scores; of equal scores the first class ranks first."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    # Nothing compares above NaN: without this a broken model would be always right.
    return ((jnp.sum(ahead, axis=1) < k) & jnp.isfinite(own[:, 0])).astype(jnp.float32)
