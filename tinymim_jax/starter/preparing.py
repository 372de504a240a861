"""Whether converting the images to smaller files once saves more time than it takes."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np

from tinymim_jax.data.prepare.shards import Conversion, convert
from tinymim_jax.data.views.decoding import Picture
from tinymim_jax.data.views.transforms import Augment

_WORTH_SECONDS = 120.0
_WORTH_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of `judge`.

    pays: whether to convert.
    short_side: of the copies, in pixels.
    why: the reason, for the user.
    needed: approximate size of all copies in bytes; 0 if they are not made.
    """

    pays: bool
    short_side: int
    why: str
    needed: int


def judge(sample: Sequence[bytes], images: int, views: int, size: tuple[int, int], resize: int) -> Verdict:
    """Times a sample of the images: decoded as they are, converted, and decoded when converted.

    Args:
      sample: encoded images.
      images: number of images to convert.
      views: number of images that all trainings decode.
      size: (height, width) of the network's input.
      resize: short side that evaluation needs; the copies get it.
    """
    view, rng = Augment(size, crop_scale=(0.2, 1.0)), np.random.default_rng(0)
    as_they_are = _median_seconds(lambda data: view(Picture(data), rng), sample)
    conversion = Conversion(short_side=resize)
    copies = [convert(data, conversion) for data in sample]
    converting = _median_seconds(lambda data: convert(data, conversion), sample)
    afterwards = _median_seconds(lambda data: view(Picture(data), rng), [copy.data for copy in copies])
    saved, cost = views * (as_they_are - afterwards), images * converting
    pays = saved > max(_WORTH_FACTOR * cost, _WORTH_SECONDS)
    why = (
        f"on one core, it takes {cost:,.0f} s and saves {max(saved, 0):,.0f} s of decoding "
        f"({1e3 * as_they_are:.1f} ms an image, {1e3 * afterwards:.1f} ms afterwards)"
    )
    size_each = statistics.fmean(len(copy.data) for copy in copies)
    return Verdict(pays, resize, why, int(1.1 * images * size_each) if pays else 0)


def _median_seconds(function, items) -> float:
    spent = []
    for item in items:
        began = time.perf_counter()
        function(item)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)
