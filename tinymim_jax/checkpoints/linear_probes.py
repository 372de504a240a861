"""Linear probes as classifiers: the parameters that a probe keeps fixed, and its batch norm folded into the head."""

from typing import Any

import numpy as np

from tinymim_jax.checkpoints.tables import for_image_size
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.batch_norm import EPS

Params = Any  # nested dicts of arrays


def probed_params(model: dict[str, Any], params: Params, *, image_size: tuple[int, int], pool: str) -> Params:
    """The parameters of a Classifier without its head: {"encoder"} and, with 'mean' pooling, {"fc_norm"}.

    A learned position table and relative position biases are resized to `image_size`. A norm that the checkpoint does
    not have (`fc_norm` if it was never a classifier, the final norm if it was one) gets a scale of 1 and a shift of 0,
    as in MAE's main_linprobe.py, where it keeps its initial value.

    Args:
      model, params: of the probed checkpoint, see `load_params`.
    """
    record = model["encoder"]
    encoder = dict(for_image_size(record, params["encoder"], image_size))
    own_norm = encoder.pop("norm", None)
    width = ViT.from_record(record).widths[-1]
    if pool == "cls":
        fresh = _no_affine(width, bias=record.get("switches", {}).get("norm") != "rms")
        return {"encoder": encoder | {"norm": own_norm or fresh}}
    norm = params.get("fc_norm")
    if norm is None or len(norm["scale"]) != width:
        norm = _no_affine(width)
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


def _no_affine(dim: int, *, bias: bool = True) -> Params:
    scale = {"scale": np.ones(dim, np.float32)}
    return scale | ({"bias": np.zeros(dim, np.float32)} if bias else {})
