"""Batches, a pure function of (seed, global index): equal for any number of processes, workers and restarts.

A **Batch** is a dict of numpy arrays, here and wherever the word is used:

    image  uint8 [batch, height, width, 3]   RGB, not normalised
    label  int32 [batch]                     0 to classes - 1, or -1 where the record has none of these
    valid  bool  [batch]                     False marks padding: zeros that must count for nothing

A view may add arrays of its own (`View.arrays`), such as a mask uint8 [batch, height, width].

`batch` is the local batch: of `process_count` processes, process p holds rows `[p * local, (p + 1) * local)`
of the global one, `local = batch_size / process_count`. What else is random (jitter, mixup, masks) is drawn
on the device.

Batch `step` of training holds examples `[step * batch_size, (step + 1) * batch_size)` of the shuffled,
repeated source. The step number alone is the position; no iterator state is ever saved.
"""

import logging
import shutil
import sys
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from tinymim_jax.data.rows import Rows
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.transforms import View
from tinymim_jax.data.worker import settle_in

log = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"
_QUIET = "ignore:resource_tracker:UserWarning"
Batch = dict[str, np.ndarray]
TOLERATED = 3  # damaged records that do not stop a training, however small its set is


def train_batches(
    source: Source,
    *,
    augment: View,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    crops: int = 1,
    upright: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
) -> "Batches":
    """Shuffled training batches without end, from `start_step` on; every row is valid.

    Args:
        source: may be smaller than the batch, which then holds records more than once, in different views.
        augment: usually an `Augment`.
        batch_size: the global one; `process_count` must divide it.
        seed: of the order and of the views; not negative.
        crops: so many views of each decoded image stand side by side in the batch, which they must divide
            (repeated augmentation, arXiv 1901.09335). Each counts as an example: a batch holds
            `batch_size / crops` images, and as many batches as before make an epoch.
        upright: turn pictures as their EXIF orientation says; torchvision does not.
        workers: processes that decode; with 0, threads of this process do. They are spawned: a script that
            uses them needs its `if __name__ == "__main__":`.
        threads: in each process that decodes.
        prefetch: parts of a batch (of up to 256 rows) that each such process holds ready.

    Raises ValueError for arguments out of range. For what iterating may raise, see `Batches`.
    """
    rows = Rows(
        source,
        augment,
        batch_size=batch_size,
        seed=seed,
        crops=crops,
        upright=upright,
        process_index=process_index,
        process_count=process_count,
    )
    return Batches(rows, start_step=start_step, workers=workers, threads=threads, prefetch=prefetch)


def eval_batches(
    source: Source,
    *,
    view: View,
    batch_size: int,
    upright: bool = False,
    tolerated: int = TOLERATED,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
) -> "Batches":
    """Every example of `source` exactly once, in order; the last batch is padded with rows not valid.

    Each process gets `ceil(len(source) / batch_size)` batches. Arguments and errors as for `train_batches`, and
    `tolerated` as for `Batches`: 0 where figures are computed, since one record in place of another falsifies them.
    """
    rows = Rows(
        source,
        view,
        batch_size=batch_size,
        seed=None,
        upright=upright,
        process_index=process_index,
        process_count=process_count,
    )
    return Batches(rows, start_step=0, workers=workers, threads=threads, prefetch=prefetch, tolerated=tolerated)


def allowed_substitutions(records: int) -> int:
    """How many records of a source may be replaced by others: 0.1 %."""
    return records // 1000


class Batches(Iterator[Batch]):
    """Iterator of local batches, decoded ahead of time. Close it, or use `with`: that ends its workers.

    A record that cannot be read or decoded is replaced by the next one that can, image and label, and logged
    with its name and the reason when first met. RuntimeError is raised, and the iterator closed, once more
    than 0.1 % of the source's records, and more than `tolerated`, have been met in this process; also when a worker
    dies. LabelError is raised for a source made by `labels.labelled` whose label is missing.
    """

    def __init__(
        self, rows: Rows, *, start_step: int, workers: int, threads: int, prefetch: int, tolerated: int = TOLERATED
    ):
        for name, value, least in (
            ("start_step", start_step, 0),
            ("workers", workers, 0),
            ("threads", threads, 1),
            ("prefetch", prefetch, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self._rows = rows
        self._step = start_step
        self._tolerated = tolerated
        self._damaged: dict[int, str] = {}
        self._substitutions = 0
        self._parts = _read_ahead(rows, start_step * rows.parts_per_batch, workers, threads, prefetch)
        # Also when this object is collected and, since Grain's own clean-up comes too late for it, at exit.
        self._close = weakref.finalize(self, self._parts.close)

    @property
    def substitutions(self) -> int:
        """Rows served so far, in this process, that hold another record than their own."""
        return self._substitutions

    def __next__(self) -> Batch:
        if self._step == self._rows.steps:
            self.close()
            raise StopIteration
        if not self._close.alive:
            raise ValueError("these batches are closed")
        try:
            parts = [self._next_part() for _ in range(self._rows.parts_per_batch)]
            # A copy of a single part as well: a worker's lies in memory shared with it, which is given back.
            batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            self._account(batch.pop("substituted"))
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends the threads and worker processes; a second call does nothing."""
        self._close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _next_part(self) -> Batch:
        try:
            part = next(self._parts)
        except (StopIteration, RuntimeError) as error:
            raise RuntimeError(
                f"an input worker died before step {self._step} ({str(error) or 'it left no message'}). "
                "Usual causes: out of memory; /dev/shm too small (docker run --shm-size=16g); a script that "
                "starts training outside `if __name__ == '__main__':`"
            ) from error
        if "label_error" in part:
            raise LabelError(part["label_error"])
        if "error" in part:
            raise RuntimeError(f"the input pipeline failed before step {self._step}:\n{part['error']}")
        return part

    def _account(self, substituted: np.ndarray) -> None:
        damaged = substituted[substituted >= 0].tolist()
        self._substitutions += len(damaged)
        for index in damaged:
            if index not in self._damaged:
                self._damaged[index] = f"{self._rows.source.describe(index)}: {self._rows.failure(index)}"
                log.warning("cannot decode %s; the next good record stands in", self._damaged[index])
        total = len(self._rows.source)
        if len(self._damaged) > max(self._tolerated, allowed_substitutions(total)):
            least = f" (or {self._tolerated})" if self._tolerated else ""
            raise RuntimeError(
                f"{len(self._damaged)} of {total} records cannot be decoded, more than the 0.1 %{least} that other "
                "records may be used in place of; repair or remove them, or prepare the set again:\n  "
                + "\n  ".join(list(self._damaged.values())[:100])
            )


def _read_ahead(rows: Rows, first_part: int, workers: int, threads: int, prefetch: int):
    parts = grain.MapDataset.source(rows)[first_part:]
    ahead = parts.to_iter_dataset(grain.ReadOptions(threads, max(prefetch, threads)))
    if workers:
        # What was read ahead and never asked for is left to Python's tracker of shared memory, which gives it back at
        # exit and, unless told not to when it starts, complains.
        if _QUIET not in sys.warnoptions:
            sys.warnoptions.append(_QUIET)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only absl's app.run would parse
        workers = min(workers, len(parts))
        _check_shared_memory(workers, rows.part_bytes)
        options = grain.MultiprocessingOptions(num_workers=workers)
        ahead = ahead.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(ahead)


def _check_shared_memory(workers: int, part_bytes: int) -> None:
    """Raises RuntimeError where /dev/shm cannot hold one part of each worker: writing to it would kill the worker."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # no Linux: shared memory lies elsewhere
        return
    if free < 2 * workers * part_bytes:
        numbers = (
            f"{_SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, and {workers} workers put parts of batches of "
            f"{part_bytes / 2**20:,.1f} MiB there, two each"
        )
        remedy = "start the container with more (docker run --shm-size=16g), or take fewer --workers (0 needs none)"
        if free < workers * part_bytes:
            raise RuntimeError(f"{numbers}: {remedy}")
        log.warning("%s: if a worker dies, %s", numbers, remedy)


def _start_worker(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    settle_in()
