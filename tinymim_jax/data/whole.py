"""Reads images of any size with the class of every pixel, ahead of time and in order: what evaluation scores."""

import collections
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tinymim_jax.data.masks.report import wrong_size
from tinymim_jax.data.rows import MAX_LOOKAHEAD
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.decoding import Picture

log = logging.getLogger(__name__)


class Scene(NamedTuple):
    """An image, uint8 `[height, width, 3]`, and the class of every pixel, `[height, width]`, see MaskSource."""

    pixels: np.ndarray
    labels: np.ndarray


class Scenes(Iterator[Scene]):
    """The records of `source` at `indices`, in that order, each once.

    A record that cannot be decoded is replaced by the next one that can, as in `pipeline.Batches`; its name and the
    reason are logged, and `substitutions` counts it. Raises LabelError, with the record's name, for a mask of another
    size than its image.

    threads: they decode ahead, twice as many images as there are threads.
    """

    def __init__(self, source: Source, indices: Sequence[int], *, upright: bool = False, threads: int = 2):
        self.substitutions = 0
        self._source, self._upright = source, upright
        self._pool = ThreadPoolExecutor(threads)
        self._left = collections.deque(indices)
        self._ahead: collections.deque[Future] = collections.deque()
        for _ in range(2 * threads):
            self._read_ahead()

    def __next__(self) -> Scene:
        if not self._ahead:
            raise StopIteration
        self._read_ahead()
        try:
            scene, replaced = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        if replaced:
            self.substitutions += 1
            log.warning("cannot decode %s; the next readable record is used in its place", replaced)
        return scene

    def close(self) -> None:
        """Ends the threads; a second call does nothing."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Scenes":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read_ahead(self) -> None:
        if self._left:
            self._ahead.append(self._pool.submit(self._read, self._left.popleft()))

    def _read(self, index: int) -> tuple[Scene, str]:
        """The scene, and what was wrong with record `index` where another one is in its place."""
        total, replaced = len(self._source), ""
        for ahead in range(min(MAX_LOOKAHEAD, total)):
            used = (index + ahead) % total
            try:
                example = self._source[used]
                pixels = Picture(example["image"], upright=self._upright).pixels()
            except LabelError:
                raise
            except Exception as error:  # readers and decoders raise exceptions of many types
                replaced = replaced or f"{self._source.describe(used)}: {error}"
                continue
            labels = example.get("pixel_labels")
            if labels is None:
                raise LabelError(f"{self._source.describe(used)} has no mask")
            if labels.shape != pixels.shape[:2]:
                raise LabelError(f"{self._source.describe(used)}: {wrong_size(labels.shape, pixels.shape[:2])}")
            return Scene(pixels, labels), replaced
        raise RuntimeError(f"neither {replaced} nor any of the records after it can be decoded; check the data set")
