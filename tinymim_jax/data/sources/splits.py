"""Slices and sums of splits, such as `train[:90%]+test`, with the syntax and meaning of TFDS, for any source."""

import re
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from tinymim_jax.data.sources.examples import Example, Source

ALL = "all"  # the split that contains all files of a location
# In TFDS "all" is the sum of all splits and cannot be sliced, so another name is passed to TFDS.
_TFDS_ALL = "everything"


def open_parts(name: str, split: str, open_whole: Callable[[str], Source]) -> Source:
    """Opens `split`, composed of the whole splits it names; see `sources.open_source`.

    `open_whole` opens a whole split by name; its errors are passed on. Raises ValueError for invalid syntax.
    """
    mentioned = [re.split(r"\[", term.strip())[0] for term in split.split("+")]
    wholes = {each: open_whole(each) for each in dict.fromkeys(mentioned)}
    if split in wholes:
        return wholes[split]
    names = {ALL: _TFDS_ALL}
    spec = "+".join(
        names.get(each, each) + term.strip()[len(each) :] for each, term in zip(mentioned, split.split("+"))
    )
    infos = {
        names.get(each, each): tfds.core.SplitInfo(name=names.get(each, each), shard_lengths=[len(whole)], num_bytes=0)
        for each, whole in wholes.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        sizes = ", ".join(f"{each} ({len(whole):,})" for each, whole in wholes.items())
        raise ValueError(
            f"split={split!r} of {name!r} is invalid for the splits {sizes}; "
            "choices: a part such as 'train[:90%]' or 'train[1000:]', or a sum of parts, 'train+test[:50%]'"
        ) from error
    ranges = []
    for part in parts:
        whole = wholes[ALL if part.splitname == _TFDS_ALL else part.splitname]
        begin, end = part.from_ or 0, len(whole) if part.to is None else part.to
        if begin < end:
            ranges.append((whole, begin, end))
    if not ranges:
        raise ValueError(f"split={split!r} of {name!r} holds no image")
    return Parts(name, split, ranges)


class Parts(Source):
    """The concatenation of ranges `[begin, end)` of sources.

    If some of the sources have no classes, the labels of all are dropped. Raises ValueError if their classes differ.
    """

    def __init__(self, name: str, split: str, ranges: list[tuple[Source, int, int]]):
        self.name = name
        self.split = split
        self._ranges = ranges
        self._ends = np.cumsum([end - begin for _, begin, end in ranges])
        self.class_names = ranges[0][0].class_names
        self.mask_classes = ranges[0][0].mask_classes
        self.label_problem = next((source.label_problem for source, _, _ in ranges if source.label_problem), "")
        for source, _, _ in ranges[1:]:
            self._check_classes(ranges[0][0], source)

    def _check_classes(self, first: Source, other: Source) -> None:
        if not (self.class_names and other.class_names):
            if first.class_names or other.class_names:
                without = other if first.class_names else first
                self.label_problem = self.label_problem or f"its part {without.split!r} has none"
            self.class_names = ()
        elif first.class_names != other.class_names:
            only = sorted(set(first.class_names) ^ set(other.class_names))[:5]
            raise ValueError(
                f"{self.name!r}: the classes of split {first.split!r} ({first.classes}) and {other.split!r} "
                f"({other.classes}) differ, in {only}; use the same class names in each "
                "split, or open the splits separately"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        source, inner = self._place(index)
        example = source[inner]
        if not self.class_names:
            example["label"] = -1
        return example

    def known_labels(self) -> np.ndarray | None:
        parts = [(source.known_labels(), begin, end) for source, begin, end in self._ranges]
        if any(labels is None for labels, _, _ in parts):
            return None
        return np.concatenate([labels[begin:end] for labels, begin, end in parts if labels is not None])

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        source, inner = self._place(index)
        return source.describe(inner)

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        source, _, end = self._ranges[number]
        return source, index - int(self._ends[number]) + end
