"""Small networks of every architecture that can be exported, with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.convert.formats.network import Network
from tinymim_jax.models.heads import Classifier, needs_final_norm
from tinymim_jax.models.vit import ViT

SIZE = (16, 24)
CLASSES = 7
# An adaptive last block, as distillation gives it; TinyMIM*-T's second token and widened features.
ARCHITECTURES = {
    "plain": {"heads": 2},
    "adaptive": {"heads": (2, 4)},
    "cls": {"heads": 2, "pool": "cls"},
    "learned": {"heads": (2, 4), "pos_embed": "learned"},
    "deit": {"heads": 2, "pool": "cls", "dist_token": True},
    "star": {"heads": 4, "dist_token": True, "hidden_dim": 24},
    "star_norm_first": {"heads": 4, "dist_token": True, "hidden_dim": 24, "norm_first": True},
    "star_cls": {"heads": 4, "dist_token": True, "hidden_dim": 24, "pool": "cls"},
}


def make_network(name: str, output: str = "logits", *, seed: int = 0) -> Network:
    """The network `name` of ARCHITECTURES: width 16, two blocks, images of 16 x 24 in patches of 8."""
    head = {"pool": "mean", "hidden_dim": 0, "norm_first": False}
    given = dict(ARCHITECTURES[name])
    head |= {key: given.pop(key) for key in list(given) if key in head}
    final_norm = needs_final_norm(head["pool"], head["hidden_dim"])
    encoder = ViT(embed_dim=16, depth=2, patch_size=8, image_size=SIZE, final_norm=final_norm, **given)
    network = Classifier(encoder, CLASSES, **head)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes)
    preprocessing = {
        "image_size": list(SIZE),
        "resize": 27,
        "interpolation": "bicubic",
        "upright": False,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "class_names": [f"class {i}" for i in range(CLASSES)],
    }
    return Network({"encoder": encoder.record(), "classifier": network.record()}, params, preprocessing, output)


def pixels_of(batch: int) -> np.ndarray:
    """Normalised pixels, float32 [batch, height, width, 3]."""
    return np.random.default_rng(batch).normal(size=(batch, *SIZE, 3)).astype(np.float32)


def by_jax(network: Network, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(network.function())(pixels))


@functools.cache
def answers(name: str, batch: int, output: str = "logits") -> np.ndarray:
    """What jax computes with the network `name` for `pixels_of(batch)`; compiled once for all tests."""
    return by_jax(make_network(name, output), pixels_of(batch))
