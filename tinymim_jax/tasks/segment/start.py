"""A segmentation network that starts from a pre-trained encoder, or from a whole segmentation network."""

import logging
from collections.abc import Sequence

import jax
import numpy as np

from tinymim_jax.class_names import ClassMismatch, match_classes
from tinymim_jax.models.segmentation import SegmentationNetwork
from tinymim_jax.tasks.pretrained import Loaded, fill_encoder, log_unused
from tinymim_jax.tasks.task import Params

log = logging.getLogger(__name__)


def start_from(loaded: Loaded, network: SegmentationNetwork, class_names: Sequence[str], params: Params) -> Params:
    """`params` with the encoder of `loaded`, and with its heads where they are those of `network`.

    What the checkpoint lacks of the encoder's additions (relative biases, factors of branches, the final norm) keeps
    its initial values. Relative biases for another grid of patches are resized.
    """
    filled = fill_encoder(params, loaded, network.encoder, same_heads=False, new=_additions(network))
    record = loaded.model.get("segmenter")
    if network.widen and "widen" in loaded.params:
        filled = filled | {"widen": jax.tree.map(np.asarray, loaded.params["widen"])}
    if record is None:
        log_unused(loaded, {"encoder", "widen"} if network.widen else {"encoder"})
        return filled
    if record != network.record():
        log.warning("the head of %s (%s) does not fit and is initialized anew", loaded.path, record)
        return filled
    return filled | _loaded_heads(loaded, class_names)


def _additions(network: SegmentationNetwork) -> tuple[str, ...]:
    blocks = [f"blocks_{i}" for i in range(network.encoder.depth)]
    names = [f"{block}/{name}" for block in blocks for name in ("attn/relative_bias", "scale1", "scale2")]
    return (*names, "norm")


def _loaded_heads(loaded: Loaded, class_names: Sequence[str]) -> Params:
    """The checkpoint's heads, pyramid and statistics, with its classes in the order of `class_names`."""
    classes = loaded.model["segmenter"]["classes"]
    known = loaded.model.get("preprocessing", {}).get("class_names", ())
    heads = {name: jax.tree.map(np.asarray, tree) for name, tree in loaded.params.items() if name != "encoder"}
    if not class_names:
        return heads
    try:
        order = match_classes(known, class_names, classes=classes, classifier=loaded.path, data="the data")
    except ClassMismatch as error:
        log.warning("the head of %s is initialized anew: %s", loaded.path, error)
        return {}
    for name in {"decode_head", "auxiliary_head"} & set(heads):
        heads[name] = _in_order(heads[name], order)
    return heads


def _in_order(head: Params, order: np.ndarray) -> Params:
    """The head with its classes reordered: of its last layer, or of its class tokens and the norm over them."""
    changed = {
        name: jax.tree.map(lambda leaf: leaf[..., order], head[name])
        for name in ("classifier", "mask_norm")
        if name in head
    }
    if "class_tokens" in head:
        changed["class_tokens"] = head["class_tokens"][:, order]
    return head | changed
