"""Linear probes as classifiers: the parameters that a probe keeps fixed, and its batch norm folded into the head."""

from typing import Any

import numpy as np

from tinymim_jax.ops.batch_norm import EPS
from tinymim_jax.ops.posembed import resize_table

Params = Any  # nested dicts of arrays


def probed_params(model: dict[str, Any], params: Params, *, image_size: tuple[int, int], pool: str) -> Params:
    """The parameters of a Classifier without its head: {"encoder"} and, with 'mean' pooling, {"fc_norm"}.

    A learned position table is resized to `image_size`. A norm that the checkpoint does not have (`fc_norm` if it was
    never a classifier, the final norm if it was one) gets a scale of 1 and a shift of 0, as in MAE's main_linprobe.py,
    where it keeps its initial value.

    Args:
      model, params: of the probed checkpoint, see `load_params`.
    """
    record, encoder = model["encoder"], dict(params["encoder"])
    if "pos_embed" in encoder:
        (rows, columns), patch = record["image_size"], record["patch_size"]
        old, new = (rows // patch, columns // patch), (image_size[0] // patch, image_size[1] // patch)
        rule = record.get("switches", {}).get("table", "bicubic")
        encoder["pos_embed"] = np.asarray(resize_table(np.asarray(encoder["pos_embed"]), old, new, rule))
    own_norm = encoder.pop("norm", None)
    if pool == "cls":
        return {"encoder": encoder | {"norm": own_norm or _no_affine(record["embed_dim"])}}
    norm = params.get("fc_norm")
    if norm is None or len(norm["scale"]) != record["embed_dim"]:
        norm = _no_affine(record["embed_dim"])
    return {"encoder": encoder, "fc_norm": norm}


def fold_batch_norm(head: Params, statistics: Params) -> Params:
    """The Linear that equals a batch norm with running `statistics` followed by the Linear `head`."""
    scale = 1 / np.sqrt(np.asarray(statistics["variance"], np.float64) + EPS)
    kernel = np.asarray(head["kernel"], np.float64) * scale[:, None]
    bias = np.asarray(head["bias"], np.float64) - np.asarray(statistics["mean"], np.float64) @ kernel
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def with_neutral_batch_norm(head: Params) -> tuple[Params, Params]:
    """(head, statistics): statistics with which `fold_batch_norm` gives the same Linear."""
    dim = len(head["kernel"])
    return head, {"mean": np.zeros(dim, np.float32), "variance": np.full(dim, 1 - EPS, np.float32)}


def _no_affine(dim: int) -> Params:
    return {"scale": np.ones(dim, np.float32), "bias": np.zeros(dim, np.float32)}
