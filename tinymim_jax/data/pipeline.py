"""Makes the batches of training and evaluation: decodes images ahead of time, in threads or worker processes.

A batch depends on the seed and the step only: it is the same for any number of processes and workers, and after a
restart.

A **Batch** is a dict of numpy arrays, here and wherever the word is used:

    image  uint8 [batch, height, width, 3]   RGB, not normalized
    label  int32 [batch]                     0 to classes - 1, or -1 if the record has no such label
    valid  bool  [batch]                     False marks padding rows: zeros that must be ignored

A view may add more arrays (`View.arrays`). That of segmentation adds the class of every pixel:

    pixel_labels  uint8 or uint16 [batch, height, width]   the largest value of the type marks pixels to ignore

`batch` is the local batch size, `local = batch_size / process_count`: process p holds rows
`[p * local, (p + 1) * local)` of the global batch. Color jitter, mixup and masks of tokens are drawn on the device.

Training batch `step` holds examples `[step * batch_size, (step + 1) * batch_size)` of the shuffled, repeated source.
The step number is the whole position in the data; no iterator state is saved.
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
from tinymim_jax.data.worker import start_worker
from tinymim_jax.runtime.malloc import keep_freed_memory

log = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"
_QUIET = "ignore:resource_tracker:UserWarning"
Batch = dict[str, np.ndarray]
TOLERATED = 3  # damaged records that never stop training, however small the data set is


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
    """An endless iterator of shuffled training batches, starting with batch `start_step`; every row is valid.

    Args:
        source: may be smaller than the batch, which then holds some records several times, in different views.
        augment: usually an `Augment`.
        batch_size: the global batch size; must be divisible by `process_count`.
        seed: seed of the order and of the views; not negative.
        crops: number of views of each decoded image, in consecutive rows of the batch (repeated augmentation,
            arXiv 1901.09335); must divide `batch_size`. Each view counts as an example: a batch holds
            `batch_size / crops` images, and the number of batches per epoch does not change.
        upright: rotate images according to their EXIF orientation; torchvision does not.
        workers: number of worker processes that decode; 0 means threads of this process. Workers are spawned, so a
            script that uses them needs `if __name__ == "__main__":`.
        threads: threads in each process that decodes.
        prefetch: parts of a batch (of up to 256 rows) that each of these processes decodes ahead.

    Raises ValueError for arguments out of range. `Batches` lists what the iteration may raise.
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
    """Batches of every example of `source` exactly once, in order; the last batch is padded with invalid rows.

    Each process gets `ceil(len(source) / batch_size)` batches. Arguments and errors are those of `train_batches`, and
    `tolerated` is that of `Batches`. Use 0 for metrics that are reported, since a replaced record falsifies them.
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
    """How many damaged records may be replaced by others in a source of `records` records: 0.1 %, rounded down."""
    return records // 1000


class Batches(Iterator[Batch]):
    """Iterator of local batches, decoded ahead of time. Call `close` or use `with` to end its workers.

    A record that cannot be read or decoded is replaced, image and label, by the next one that can; the first time, its
    name and the reason are logged.

    Raises, and then closes the iterator:
        RuntimeError: this process has met damaged records in more than 0.1 % of the source and more than `tolerated`;
            or a worker died.
        LabelError: a label is missing in a source made by `labels.labelled`.
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
        # Also runs when this object is garbage-collected, and at exit, where Grain's own clean-up comes too late.
        self._close = weakref.finalize(self, self._parts.close)

    @property
    def substitutions(self) -> int:
        """Number of rows so far, in this process, that hold a replacement for a damaged record."""
        return self._substitutions

    def __next__(self) -> Batch:
        if self._step == self._rows.steps:
            self.close()
            raise StopIteration
        if not self._close.alive:
            raise ValueError("these batches have been closed; make new ones")
        try:
            parts = [self._next_part() for _ in range(self._rows.parts_per_batch)]
            # Copies even a single part, since it may lie in memory shared with a worker, which is reused.
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
                f"an input worker died before step {self._step} ({str(error) or 'without an error message'}). "
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
                log.warning("cannot decode %s; the next readable record is used in its place", self._damaged[index])
        total = len(self._rows.source)
        if len(self._damaged) > max(self._tolerated, allowed_substitutions(total)):
            least = f" (or {self._tolerated})" if self._tolerated else ""
            raise RuntimeError(
                f"{len(self._damaged)} of {total} records cannot be decoded, more than the 0.1 %{least} that may be "
                "replaced by other records; repair or remove them, or prepare the data set again:\n  "
                + "\n  ".join(list(self._damaged.values())[:100])
            )


def _read_ahead(rows: Rows, first_part: int, workers: int, threads: int, prefetch: int):
    parts = grain.MapDataset.source(rows)[first_part:]
    ahead = parts.to_iter_dataset(grain.ReadOptions(threads, max(prefetch, threads)))
    if workers:
        # Parts that were decoded ahead but never used are freed at exit by Python's resource tracker, which warns about
        # each unless its process is started with this filter.
        if _QUIET not in sys.warnoptions:
            sys.warnoptions.append(_QUIET)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only absl's app.run would parse
        workers = min(workers, len(parts))
        _check_shared_memory(workers, rows.part_bytes)
        options = grain.MultiprocessingOptions(num_workers=workers)
        ahead = ahead.mp_prefetch(options, worker_init_fn=_start_worker)
    else:
        keep_freed_memory()  # this process decodes
    return iter(ahead)


def _check_shared_memory(workers: int, part_bytes: int) -> None:
    """Raises RuntimeError if /dev/shm cannot hold one part of each worker: writing to it would kill the worker."""
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
    start_worker()
