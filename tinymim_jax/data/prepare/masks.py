"""Masks of segmentation sets in prepared data sets: they are kept as stored, or resized without interpolation."""

import contextlib
import io
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tinymim_jax.data.masks.report import wrong_size
from tinymim_jax.data.masks.rules import read_mask
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views.decoding import Undecodable, open_image
from tinymim_jax.data.views.segmentation import nearest

MASK = "segmentation_mask"  # the key in TFDS
_TRIED = 16  # records that are read to find a mask


def mask_channels(source: Source) -> int:
    """0: the source has no masks; 1: they hold values; 3: they are coded by colours. Judged by the first readable one.

    Raises ValueError if a record has an empty mask.
    """
    for index in range(min(_TRIED, len(source))):
        with contextlib.suppress(OSError):  # unreadable records are reported while the shards are written
            example = source[index]
            if "mask" not in example:
                return 0
            if not example["mask"]:
                raise ValueError(
                    f"{source.describe(index)} has an empty mask: {source.name!r} is a segmentation data set, and its "
                    "masks would be lost. Mend the source"
                )
            with contextlib.suppress(Exception):
                return 1 if read_mask(example["mask"])[0].ndim == 2 else 3
    return 0


def mask_features(channels: int) -> dict[str, Any]:
    """The TFDS features of the masks; none without."""
    return {MASK: tfds.features.Image(shape=(None, None, channels), encoding_format="png")} if channels else {}


def convert_mask(data: bytes | None, before: tuple[int, int], after: tuple[int, int]) -> bytes:
    """The mask of an image that had (height, width) `before` its conversion and has `after`.

    It is decoded as a check, and its bytes are kept where the size stays.

    Raises ValueError for a missing or damaged mask and for one of another size than its image.
    """
    if not data:
        raise ValueError("it has no mask")
    try:
        values, _ = read_mask(data)
    except Undecodable as error:
        raise ValueError(f"its mask cannot be decoded: {error}") from None
    if values.shape[:2] != tuple(before):
        raise ValueError(wrong_size(values.shape[:2], before))
    if after == before:
        return data
    image = open_image(data)
    stored = np.asarray(image)
    resized = Image.fromarray(stored[nearest(before[0], after[0])][:, nearest(before[1], after[1])])
    if image.mode == "P":
        resized.putpalette(image.getpalette() or [])
    stream = io.BytesIO()
    resized.save(stream, "PNG")
    return stream.getvalue()
