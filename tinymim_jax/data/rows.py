"""Maps a part of a batch to its examples and decodes them, with random access and without state."""

import itertools
import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinymim_jax.data.draws import ShuffledIndices, philox
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.decoding import Picture, Undecodable, decode
from tinymim_jax.data.views.transforms import View

# Batches are decoded in parts of at most this many rows (38 MB at 224 pixels), so that the memory of a worker does not
# grow with the batch size, and several workers share the first batch.
MAX_PART_ROWS = 256
# A damaged record is replaced by the next one that can be decoded; the search tries at most this many records.
MAX_LOOKAHEAD = 100


def row_arrays(view: View) -> dict[str, tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of one row of each array of a batch: the arrays of the view, `label` and `valid`."""
    if clash := {"label", "valid", "substituted"} & set(view.arrays):
        raise ValueError(f"{type(view).__name__}.arrays has {sorted(clash)}, reserved for the pipeline; rename them")
    return {**view.arrays, "label": ((), np.int32), "valid": ((), np.bool_)}


class Rows:
    """The data source that Grain reads ahead: a sequence of the parts of one process's local batches, in order.

    A part is a Batch (see pipeline.py) with one more key, `substituted` int64 `[rows]`: the index of the damaged
    record that was replaced in this row, else -1. `__getitem__` raises nothing, since an exception can end a Grain
    worker without a message: it returns a dict with the traceback under `error`, or with the message of a LabelError
    under `label_error`, instead of the part.

    With a `seed`, the source is repeated without end, in a new order every epoch. Example n, counted from 0 over the
    whole run, gets the view drawn from a generator keyed by (seed, n). Without a seed, the source is read once, in
    order. With `crops`, each record gives that many consecutive examples, different views of an image that is decoded
    once; example n is then record n // crops of the shuffled order. `upright`: see `decode`.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        *,
        batch_size: int,
        seed: int | None,
        process_index: int,
        process_count: int,
        crops: int = 1,
        upright: bool = False,
    ):
        if len(source) == 0:
            raise ValueError(f"{source.name}/{source.split} is empty")
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} is the global batch and must be a multiple of process_count={process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be 0 to {process_count - 1}")
        if crops < 1 or batch_size % crops or (seed is None and crops > 1):
            raise ValueError(f"crops={crops} must divide batch_size={batch_size}, and be 1 in evaluation")
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must be 0 to 2**64 - 1")
        self.source = source
        self._view = view
        self._batch_size = batch_size
        self._local_size = batch_size // process_count
        self._first_row = process_index * self._local_size
        self._seed = seed
        self._crops = crops
        self._upright = upright
        self._shuffled = None if seed is None else ShuffledIndices(len(source), seed)
        self.steps = math.ceil(len(source) / batch_size) if seed is None else 2**40
        self.parts_per_batch = math.ceil(self._local_size / MAX_PART_ROWS)

    def __len__(self) -> int:
        return self.steps * self.parts_per_batch

    @property
    def part_bytes(self) -> int:
        """Size of the largest part."""
        rows = math.ceil(self._local_size / self.parts_per_batch)
        return rows * sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in row_arrays(self._view).values()
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, part = divmod(index, self.parts_per_batch)
        first = step * self._batch_size + self._first_row
        begin, end = (first + self._local_size * p // self.parts_per_batch for p in (part, part + 1))
        try:
            return self._decode(range(begin, end))
        except LabelError as error:
            return {"label_error": str(error)}
        except Exception:
            return {"error": traceback.format_exc()}

    def failure(self, index: int) -> str:
        """Why record `index` of the source cannot be decoded."""
        try:
            example = self.source[index]
            decode(example["image"], upright=self._upright)
            self._view.make(Picture(example["image"], upright=self._upright), example, np.random.default_rng(0))
        except Undecodable as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "a temporary read error; it can be decoded now"

    def _decode(self, examples: range) -> dict[str, Any]:
        part: dict[str, Any] = {
            name: np.zeros((len(examples), *shape), dtype) for name, (shape, dtype) in row_arrays(self._view).items()
        }
        part["substituted"] = np.full(len(examples), -1, np.int64)
        if self._shuffled is None:
            examples = range(examples.start, min(examples.stop, len(self.source)))  # the other rows are padding
        for position, crops in itertools.groupby(enumerate(examples), lambda row_and_n: row_and_n[1] // self._crops):
            index = position if self._shuffled is None else self._shuffled[position]
            rows, numbers = zip(*crops, strict=True)
            here = slice(rows[0], rows[-1] + 1)
            views = {name: part[name][here] for name in self._view.arrays}
            used, part["label"][here] = self._draw(index, numbers, views)
            part["valid"][here] = True
            if used != index:
                part["substituted"][here] = index
        return part

    def _draw(self, index: int, numbers: Sequence[int], views: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Fills the arrays of `views` with examples `numbers` of record `index`; returns the index used and its label.

        If that record cannot be decoded, the first one after it that can is used; after the last record, the search
        goes on with record 0.
        """
        total = len(self.source)
        reach = min(MAX_LOOKAHEAD, total)
        for ahead in range(reach):
            used = (index + ahead) % total
            try:
                example = self.source[used]
            except LabelError:  # an error in the data set, not a damaged record
                raise
            except Exception:  # readers raise exceptions of many types; `failure` gives the reason
                continue
            try:
                picture = Picture(example["image"], upright=self._upright, several_views=len(numbers) > 1)
                for row, n in enumerate(numbers):
                    rng = np.random.Generator(philox(self._seed or 0, "view", n))
                    _fill(views, row, self._view.make(picture, example, rng))
            except Undecodable:
                continue
            except LabelError as error:  # such as a mask of another size than its image
                raise LabelError(f"{self.source.describe(used)}: {error}") from error
            label = example["label"]
            return used, label if 0 <= label < self.source.classes else -1
        raise RuntimeError(
            f"neither {self.source.describe(index)} ({self.failure(index)}) nor any of the {reach - 1} records "
            "after it can be decoded; check that the data set is complete and readable"
        )


def _fill(arrays: Mapping[str, np.ndarray], row: int, made: Mapping[str, np.ndarray]) -> None:
    """Copies one row into each array. Raises ValueError if the view's arrays differ from those it declares."""
    got = {name: np.shape(value) for name, value in made.items()}
    want = {name: array.shape[1:] for name, array in arrays.items()}
    if got != want:
        raise ValueError(f"a view made arrays of shapes {got}, but its `arrays` declares {want}")
    for name, value in made.items():
        arrays[name][row] = value
