"""Images to try an exported model on: of a data set, of files, or made up where there are none."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from tinymim_jax.config import from_json
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.decoding import Picture, Undecodable
from tinymim_jax.evaluation.predictor import Model
from tinymim_jax.runtime.files import read_json


def find_pictures(
    model: Model,
    checkpoint: str,
    *,
    count: int,
    data: str | None = None,
    images: Sequence[str] = (),
    data_dir: str | None = None,
) -> tuple[np.ndarray, str]:
    """(views uint8 [images, height, width, 3], preprocessed for `model`; a description of them).

    Args:
      checkpoint: a run's evaluation split is used where nothing else is given and it is there.
      count: images of a set, taken at equal distances from its whole length; fewer where the set is smaller.
      data: NAME@SPLIT, as in `tinymim evaluate --suite`.
      images: image files; all are used.
    """
    if images:
        return model.views(list(images)), f"{len(images)} images given"
    if data:
        name, _, split = data.rpartition("@")
        if not name:
            raise ValueError(f"--data {data!r}: write NAME@SPLIT, such as imagenet2012@validation or folder:/pets@test")
        return _of_source(model, name, split, count, data_dir)
    config = epath.Path(checkpoint).expanduser() / "config.json"
    if config.exists():
        settings = from_json(read_json(config)).data
        try:
            return _of_source(model, settings.source, settings.eval_split, count, data_dir)
        except (OSError, ValueError, ImportError):
            pass  # trained on another machine, or on data that is gone
    made = made_up(count, tuple(model.preprocessing["image_size"]))
    return made, f"{count} made-up images (for real ones: --data NAME@SPLIT or --images FILE ...)"


def _of_source(model: Model, name: str, split: str, count: int, data_dir: str | None) -> tuple[np.ndarray, str]:
    source: Any = open_source(name, split=split, data_dir=data_dir)
    pictures = []
    for i in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)):
        # Damaged images are for `tinymim evaluate` to report.
        with contextlib.suppress(Undecodable):
            pictures.append(Picture(source[int(i)]["image"], upright=model.preprocessing["upright"]).pixels())
    if not pictures:
        raise ValueError(f"no image of {name}@{split} can be decoded")
    return model.views(pictures), f"{len(pictures)} images of {name}@{split}"


def made_up(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random coloured patterns with detail at all scales, as photographs have: uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    height, width = size
    found = np.full((count, height, width, 3), 128.0)
    side = 2
    while side <= max(size):
        for image in found:
            coarse = rng.normal(0, 40, (side, side, 3)).clip(-127, 127) + 128
            patch = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
            image += np.asarray(patch, np.float64) - 128
        side *= 4
    return found.clip(0, 255).astype(np.uint8)
