"""Zeros in place of missing checkpoints, so that `tinymim plan` can compile a training without them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.pretrained import Loaded, build_encoder

# Taken where nothing says how large a missing checkpoint is.
VIT_B = ViT(embed_dim=768, depth=12, heads=12)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """The placeholder for one missing checkpoint.

    key: the config's dotted key for the checkpoint's path; it is set to `loaded.path`.
    loaded: zeros of the shapes that the checkpoint is taken to have; they take no memory.
    note: a sentence for the report.
    """

    key: str
    loaded: Loaded
    note: str


def is_missing(path: str) -> bool:
    """Whether no checkpoint lies at `path`; also where the path is empty."""
    return not path or not epath.Path(path).expanduser().exists()


def init_stand_in(config: ConfigDict, *, needed: bool = False) -> list[StandIn]:
    """For `config.init`, if it is missing and either given or `needed`: an encoder as the config describes it."""
    path = config.init or ("an encoder" if needed else "")
    if not path or not is_missing(path):
        return []
    loaded = encoder_zeros(path, build_encoder(config.model))
    return [StandIn("init", loaded, f"init={path} is not here: taken as an encoder of this config")]


def encoder_zeros(path: str, encoder: ViT) -> Loaded:
    """A checkpoint of an encoder."""
    return Loaded(path, {"encoder": encoder.record()}, {"encoder": _zeros(encoder, encoder.image_size)})


def classifier_zeros(path: str, network: Classifier) -> Loaded:
    """A checkpoint of a classifier."""
    record = {"encoder": network.encoder.record(), "classifier": network.record()}
    return Loaded(path, record, _zeros(network, network.encoder.image_size))


def _zeros(network: Any, image_size: tuple[int, int]) -> Any:
    image = np.zeros((1, *image_size, 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
