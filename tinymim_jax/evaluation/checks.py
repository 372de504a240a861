"""Whether a config prepares images as the checkpoint that it evaluates was trained to see them."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.experiment import preprocessing

log = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # published values are rounded to three digits


def check_preprocessing(config: ConfigDict, record: Mapping[str, Any], checkpoint: str) -> None:
    """Raises ValueError if `config` normalizes pixels otherwise than the checkpoint's record says.

    What `tinymim convert` merely assumed is not compared. Other interpolation or orientation is a warning: figures then
    differ a little.
    """
    recorded, used = record.get("preprocessing", {}), preprocessing(config, ())
    known = [key for key in recorded if recorded.get("origin", {}).get(key) != "assumed"]
    differing = [
        key for key in ("mean", "std") if key in known and not np.allclose(recorded[key], used[key], atol=_TOLERANCE)
    ]
    if differing:
        theirs = ", ".join(f"{key} {tuple(recorded[key])}" for key in differing)
        ours = ", ".join(f"{key} {tuple(used[key])}" for key in differing)
        remedy = " ".join(f"'data.{key}={tuple(recorded[key])}'" for key in differing)
        raise ValueError(
            f"{checkpoint} was trained on pixels normalized by {theirs}, but the config has {ours}: add {remedy}; or, "
            "if the checkpoint's model.json is wrong, convert it again with --mean and --std"
        )
    for key in ("interpolation", "upright"):
        if key in known and recorded[key] != used[key]:
            log.warning("%s expects %s=%r, and is evaluated with %r", checkpoint, key, recorded[key], used[key])
