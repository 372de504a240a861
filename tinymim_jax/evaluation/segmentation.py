"""Labels the pixels of images of any size on all devices, and scores them: every pixel of every image counts once.

Each device works on one image at a time. Whatever the sizes of images, few programs are compiled, since windows come in
batches of one size, and the result is made in square tiles of the original image (see windows.py for the matrices).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.whole import Scenes
from tinymim_jax.evaluation.collect import count_substituted
from tinymim_jax.evaluation.windows import Cut, Shown, cut, shown_images
from tinymim_jax.ops.placement import splitting_batches
from tinymim_jax.ops.segmentation import confusion_matrix, ignore_value, labels_dtype, scores
from tinymim_jax.sharding import batch_sharding, place_batch, replicated
from tinymim_jax.tasks.segmenter import Segmenter

TILE = 512  # side of the parts of an original image that are labelled at a time
_WINDOWS = 2  # for each device at a time
_THREADS = 2


class Work(NamedTuple):
    """An image for one device: what is shown to the network, its original (height, width), and its labels or None."""

    shown: list[Shown]
    size: tuple[int, int]
    labels: np.ndarray | None


class PixelLabeller:
    """Runs a Segmenter on images of any size, one for each device at a time.

    mesh: images are spread over all its devices.
    tile: see TILE.
    """

    def __init__(self, segmenter: Segmenter, mesh: Mesh, *, tile: int = TILE):
        self._segmenter, self._mesh, self._tile = segmenter, mesh, tile
        self._local = len(mesh.local_devices)
        self._dtype = labels_dtype(segmenter.classes)
        self._grid: tuple[int, int] | None = None
        over, whole = batch_sharding(mesh), replicated(mesh)
        shape = (mesh.size, tile, tile, segmenter.classes)
        self._zeros = jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=over)
        self._logits = jax.jit(self._window_logits, out_shardings=over)
        self._add = jax.jit(_added, donate_argnums=0, out_shardings=over)
        self._mix = jax.jit(_mixed, donate_argnums=0, out_shardings=over)
        self._finish = jax.jit(
            functools.partial(_finished, classes=segmenter.classes, dtype=self._dtype), out_shardings=(over, whole)
        )

    def work(self, pixels: np.ndarray, labels: np.ndarray | None = None) -> Work:
        """An image uint8 `[height, width, 3]` of any size, resized as the segmenter's windows say."""
        shown = shown_images(pixels, self._segmenter.windows, self._segmenter.size)
        return Work(shown, (pixels.shape[0], pixels.shape[1]), labels)

    def label(
        self, params: Any, frozen: Any, images: Sequence[Work | None], *, fetch: bool = False
    ) -> tuple[jax.Array, list[np.ndarray | None]]:
        """Labels one image for each device of this process; None leaves a device idle.

        Every process of a job calls this equally often.

        Returns:
          int32 [classes, classes], the confusion matrix of all images of all processes (true class, predicted class);
          and, with `fetch`, the predicted classes of each of `images`, `[height, width]`, uint8 or uint16.
        """
        if len(images) != self._local:
            raise ValueError(f"{len(images)} images for the {self._local} devices of this process")
        sizes, variants = self._all_sizes(images)
        cuts = [self._cuts(params, frozen, image) for image in images]
        counts = self._gathered(np.array([[len(c.windows) for c in each] or [0] * variants for each in cuts]))
        tiles = [_tiles(size, self._tile) for size in sizes]
        most = max(map(len, tiles))
        mixed: list[Any] = [None] * most
        finished = []
        for variant in range(variants):
            logits = self._all_logits(
                params, frozen, [each[variant] if each else None for each in cuts], counts, variant
            )
            for number in range(most):
                total = self._put_together(logits, cuts, variant, tiles, number)
                if variants > 1:
                    total = mixed[number] = self._mix(self._zeros() if mixed[number] is None else mixed[number], total)
                if variant == variants - 1:
                    finished.append(self._finish(total, self._placed(self._truth(images, tiles, number))))
                    mixed[number] = None
        confusion = functools.reduce(jnp.add, [found for _, found in finished])
        labels = [labels for labels, _ in finished]
        return confusion, self._stitched(labels, images, tiles) if fetch else []

    def _window_logits(self, params: Any, frozen: Any, windows: jax.Array) -> jax.Array:
        """[devices, windows, rows, columns, classes]"""
        devices, count = windows.shape[:2]
        with splitting_batches(self._mesh):
            found = self._segmenter.logits(params, frozen, windows.reshape(devices * count, *windows.shape[2:]))
        return found.astype(jnp.float32).reshape(devices, count, *found.shape[1:])

    def _cuts(self, params: Any, frozen: Any, image: Work | None) -> list[Cut]:
        if image is None:
            return []
        size, how = self._segmenter.size, self._segmenter.windows
        stride = size if how.mode == "whole" else how.stride
        if self._grid is None:
            dtype = image.shown[0].pixels.dtype
            self._grid = jax.eval_shape(
                self._segmenter.logits, params, frozen, jax.ShapeDtypeStruct((1, *size, 3), dtype)
            ).shape[1:3]
        assert self._grid is not None
        return [cut(shown, image.size, size, self._grid, stride, self._segmenter.fill) for shown in image.shown]

    def _all_logits(self, params, frozen, cuts: list[Cut | None], counts: np.ndarray, variant: int) -> list[jax.Array]:
        """Logits of the windows of one variant, in steps of _WINDOWS for each device."""
        given = next((each for each in cuts if each is not None), None)
        dtype = np.uint8 if given is None else given.windows.dtype
        steps = []
        for first in range(0, int(counts[:, variant].max()), _WINDOWS):
            batch = np.zeros((self._local, _WINDOWS, *self._segmenter.size, 3), dtype)
            for row, each in zip(batch, cuts):
                if each is not None:
                    part = each.windows[first : first + _WINDOWS]
                    row[: len(part)] = part
            steps.append(self._logits(params, frozen, self._placed(batch)))
        return steps

    def _put_together(self, logits: list[jax.Array], cuts: list[list[Cut]], variant: int, tiles, number: int):
        """The averaged logits of tile `number` of every image: [devices, tile, tile, classes]."""
        total, sides = self._zeros(), logits[0].shape[2:4]
        matrices = [self._matrices(cuts, variant, tiles, number, step, sides) for step in range(len(logits))]
        # A step none of whose windows reaches the tile of its image, on no device, is left out.
        reaching = np.array([[bool(rows.any() and columns.any()) for rows, columns in matrices]])
        reached: list[bool] = self._gathered(reaching).any(axis=0).tolist()  # type: ignore[assignment]
        for found, (rows, columns), needed in zip(logits, matrices, reached):
            if needed:
                total = self._add(total, found, self._placed(rows), self._placed(columns))
        return total

    def _matrices(self, cuts, variant: int, tiles, number: int, step: int, sides) -> tuple[np.ndarray, np.ndarray]:
        """The parts of `Cut.rows` and `Cut.columns` for one tile of each image and the windows of one step."""
        rows, columns = (np.zeros((self._local, _WINDOWS, self._tile, side), np.float32) for side in sides)
        part = slice(step * _WINDOWS, (step + 1) * _WINDOWS)
        for device, each in enumerate(cuts):
            place = tiles[self._first_image() + device]
            if each and number < len(place):
                top, left = place[number]
                for full, target, begin in ((each[variant].rows, rows, top), (each[variant].columns, columns, left)):
                    here = full[part, begin : begin + self._tile]
                    target[device, : here.shape[0], : here.shape[1]] = here
        return rows, columns

    def _truth(self, images: Sequence[Work | None], tiles, number: int) -> np.ndarray:
        truth = np.full((self._local, self._tile, self._tile), ignore_value(self._dtype), self._dtype)
        for device, image in enumerate(images):
            place = tiles[self._first_image() + device]
            if image is not None and image.labels is not None and number < len(place):
                top, left = place[number]
                part = image.labels[top : top + self._tile, left : left + self._tile]
                truth[device, : part.shape[0], : part.shape[1]] = part
        return truth

    def _stitched(self, labels: list[jax.Array], images: Sequence[Work | None], tiles) -> list[np.ndarray | None]:
        parts = [_local_rows(each) for each in labels]
        found: list[np.ndarray | None] = []
        for device, image in enumerate(images):
            if image is None:
                found.append(None)
                continue
            whole = np.empty(image.size, self._dtype)
            for (top, left), part in zip(tiles[self._first_image() + device], parts):
                here = whole[top : top + self._tile, left : left + self._tile]
                here[:] = part[device, : here.shape[0], : here.shape[1]]
            found.append(whole)
        return found

    def _all_sizes(self, images: Sequence[Work | None]) -> tuple[list[tuple[int, int]], int]:
        """((height, width) of the images of all processes, (0, 0) for none; how often each image is shown)."""
        own = [(0, 0, 0) if image is None else (*image.size, len(image.shown)) for image in images]
        rows = self._gathered(np.array(own))  # a process may have no image, and takes part in all steps
        return [(int(height), int(width)) for height, width, _ in rows], int(rows[:, 2].max())

    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all processes."""
        if jax.process_count() == 1:
            return rows
        return np.asarray(multihost_utils.process_allgather(rows)).reshape(-1, *rows.shape[1:])

    def _first_image(self) -> int:
        return jax.process_index() * self._local

    def _placed(self, rows: np.ndarray) -> jax.Array:
        return place_batch(self._mesh, {"rows": rows})["rows"]


def score_split(
    labeller: PixelLabeller,
    params: Any,
    frozen: Any,
    source: Source,
    mesh: Mesh,
    *,
    upright: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """mIoU, mAcc, aAcc and "iou/CLASS" of a source with `pixel_labels`, "pixels", "examples" and "substituted".

    A class that occurs neither in the masks nor in the predictions has no IoU and does not count in the mean, as in
    mmsegmentation. `on_image` is called after each round of one image for each device.

    Raises RuntimeError if more than 0.1 % of the images cannot be decoded; in place of fewer others are counted.
    """
    total, substituted = count_split(labeller, params, frozen, source, mesh, upright=upright, on_image=on_image)
    return figures(total, source.class_names) | {"examples": len(source), "substituted": substituted}


def count_split(
    labeller: PixelLabeller,
    params: Any,
    frozen: Any,
    source: Source,
    mesh: Mesh,
    *,
    upright: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, int]:
    """(confusion matrix int64 [true class, predicted class], images in place of damaged ones); see score_split."""
    examples, devices, local = len(source), mesh.size, len(mesh.local_devices)
    first = jax.process_index() * local
    own = [index for start in range(first, examples, devices) for index in range(start, min(start + local, examples))]
    total = np.zeros((len(source.class_names),) * 2, np.int64)
    pending, counted = None, 0
    with Scenes(source, own, upright=upright, threads=_THREADS) as scenes:
        for start in range(first, first + -(-examples // devices) * devices, devices):
            here = max(0, min(local, examples - start))
            images = [labeller.work(*next(scenes)) for _ in range(here)] + [None] * (local - here)
            confusion, _ = labeller.label(params, frozen, images)
            counted += here
            if pending is not None:  # read one round later, so that the devices do not wait for the host
                total += np.asarray(pending)
            pending = confusion
            on_image()
        total += 0 if pending is None else np.asarray(pending)
        if jax.process_count() > 1:
            counted = int(np.sum(multihost_utils.process_allgather(np.int32(counted))))
        if counted != examples:
            raise RuntimeError(f"evaluation counted {counted} images, but the split has {examples}")
        return total, count_substituted(scenes, examples)


def figures(confusion: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Scores by name, from a confusion matrix [true class, predicted class]; without those that are not defined."""
    found = scores(confusion)
    values = {name: found[name] for name in ("mIoU", "mAcc", "aAcc")} | {"pixels": int(confusion.sum())}
    values |= {f"iou/{name}": float(value) for name, value in zip(names, found["iou"])}
    return {name: value for name, value in values.items() if value == value}


def _added(total: jax.Array, logits: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`total` [devices, tile, tile, classes] and what some windows add to it."""
    high = functools.partial(jnp.einsum, precision="highest")
    return total + high("dwtrk,dwsr->dtsk", high("dwyxk,dwty->dwtxk", logits, rows), columns)


def _mixed(probabilities: jax.Array, logits: jax.Array) -> jax.Array:
    return probabilities + jax.nn.softmax(logits, axis=-1)


def _finished(score: jax.Array, truth: jax.Array, *, classes: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(the classes with the largest score [devices, tile, tile], the confusion matrix of all devices)."""
    labels = jnp.argmax(score, axis=-1).astype(dtype)
    return labels, jnp.sum(
        jax.vmap(functools.partial(confusion_matrix, classes=classes))(
            truth.reshape(len(truth), -1), labels.reshape(len(truth), -1)
        ),
        axis=0,
    )


def _tiles(size: tuple[int, int], tile: int) -> list[tuple[int, int]]:
    """(top, left) of the tiles of an image."""
    return [(top, left) for top in range(0, size[0], tile) for left in range(0, size[1], tile)]


def _local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a global array."""
    parts = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in parts])
