"""Which examples make up which rows of which batch, and decoding them: random access, without state."""

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

# Work is handed out in parts of a batch of at most so many rows. At 224 pixels that is 38 MB: a decoding
# process holds a few of them however large the batch is, and the first batch is the work of several.
MAX_PART_ROWS = 256
# A damaged record is replaced by the next one that can be decoded, looked for no further than this.
MAX_LOOKAHEAD = 100


def row_arrays(view: View) -> dict[str, tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of one row of each array of a batch: those of the view, `label` and `valid`."""
    if clash := {"label", "valid", "substituted"} & set(view.arrays):
        raise ValueError(f"{type(view).__name__}.arrays names {sorted(clash)}, which the pipeline itself makes")
    return {**view.arrays, "label": ((), np.int32), "valid": ((), np.bool_)}


class Rows:
    """The sequence that Grain reads ahead: the parts, in order, of one process's local batches.

    A part is a Batch (see pipeline.py) with one more key, `substituted` int64 `[rows]`: the index of the
    damaged record that another one stands in for, else -1. Nothing is raised, since an exception can end a
    Grain worker without a word: a dict with the traceback under `error`, or with the message of a LabelError under
    `label_error`, takes the part's place.

    With a `seed` the source is repeated for ever, each epoch in an order of its own, and example n, counted
    from 0 over the whole run, is seen in the view drawn from a generator keyed by (seed, n). Without: once,
    in order. With `crops` each record is seen so many times in a row, in as many views of one decoded picture,
    and example n is record n // crops of that order. `upright`: see `decode`.
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
            raise ValueError(f"crops={crops} must divide batch_size={batch_size}, and is for training alone")
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
        return "it can be now: a passing failure to read it"

    def _decode(self, examples: range) -> dict[str, Any]:
        part: dict[str, Any] = {
            name: np.zeros((len(examples), *shape), dtype) for name, (shape, dtype) in row_arrays(self._view).items()
        }
        part["substituted"] = np.full(len(examples), -1, np.int64)
        if self._shuffled is None:
            examples = range(examples.start, min(examples.stop, len(self.source)))  # padding ends an evaluation
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
        """Fills the arrays of `views` with examples `numbers`, all of record `index`; index used, and its label.

        Where that record cannot be decoded, the first one after it that can, cyclically, takes its place.
        """
        total = len(self.source)
        reach = min(MAX_LOOKAHEAD, total)
        for ahead in range(reach):
            used = (index + ahead) % total
            try:
                example = self.source[used]
            except LabelError:  # a mistake in the set, not a damaged record
                raise
            except Exception:  # readers raise all sorts of them; for the reason, see `failure`
                continue
            try:
                picture = Picture(example["image"], upright=self._upright, several_views=len(numbers) > 1)
                for row, n in enumerate(numbers):
                    rng = np.random.Generator(philox(self._seed or 0, "view", n))
                    _fill(views, row, self._view.make(picture, example, rng))
            except Undecodable:
                continue
            label = example["label"]
            return used, label if 0 <= label < self.source.classes else -1
        raise RuntimeError(
            f"neither {self.source.describe(index)} ({self.failure(index)}) nor any of the {reach - 1} after it "
            "can be decoded"
        )


def _fill(arrays: Mapping[str, np.ndarray], row: int, made: Mapping[str, np.ndarray]) -> None:
    """Copies one row into each array; a view that does not make what it declared is an error."""
    got = {name: np.shape(value) for name, value in made.items()}
    want = {name: array.shape[1:] for name, array in arrays.items()}
    if got != want:
        raise ValueError(f"a view made arrays of shapes {got}, but its `arrays` says {want}")
    for name, value in made.items():
        arrays[name][row] = value
