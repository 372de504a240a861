"""What every data set looks like to the pipeline: encoded images and labels, by index; and subsets of one."""

import abc
import collections
from typing import NotRequired, TypedDict

import numpy as np

from tinymim_jax.data.draws import permutation, philox


class Example(TypedDict):
    """One record: `image`, the bytes of an image file as stored, and `label`, as stored, or -1 where there is none.

    A label may be outside 0 to `classes - 1` (a mistake in the files); see `labels.labelled`.

    Segmentation sets add `mask`, the bytes of an image file whose pixels are classes; ImageNet ReaL adds `labels`, all
    that are right, which may be none.
    """

    image: bytes
    label: int
    mask: NotRequired[bytes]
    labels: NotRequired[tuple[int, ...]]


class Source(abc.ABC):
    """A random-access sequence of Examples; it can be pickled, and read from several threads at once.

    `name` and `split` are those it was opened by; `class_names[label]` is what a label means, and is empty where no
    record has a label. `label_problem` says why labels that are there cannot be used.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    label_problem: str = ""

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Record `index`, from 0 up to but without `len(self)`; IndexError beyond."""

    def known_labels(self) -> np.ndarray | None:
        """The labels of all records, int `[len]`, where they are known without reading the records; otherwise None."""
        return None

    def describe(self, index: int) -> str:
        """What to call record `index` in a message; never fails, even where the record cannot be read."""
        return f"record {index} of {self.name}/{self.split}"


class Subset(Source):
    """The records of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.name = source.name
        self.split = source.split
        self.class_names = source.class_names
        self.label_problem = source.label_problem
        self._source = source
        self._indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"this subset of {self.name}/{self.split} has {len(self)} records, got {index}")
        return self._source[int(self._indices[index])]

    def known_labels(self) -> np.ndarray | None:
        labels = self._source.known_labels()
        return None if labels is None else np.asarray(labels)[self._indices]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))


def balanced_subset(source: Source, examples: int, *, seed: int = 0) -> Subset:
    """`examples` records of `source`: `examples // classes` of each class or one more, a function of `seed`.

    Of a source without classes, any.

    Records are read in a seeded order, and only until every class has its share: 1 % of ImageNet costs
    a few per cent of it. Records without a label are never chosen. Raises ValueError where a class has too few.
    """
    if not 0 < examples <= len(source):
        raise ValueError(f"examples={examples}: {source.name}/{source.split} can give 1 to {len(source)}")
    order = permutation(len(source), philox(seed, "subset"))
    if source.classes == 0:
        return Subset(source, np.sort(order[:examples]))
    share, spare = divmod(examples, source.classes)
    chosen: list[int] = []
    unlabelled = ""
    counts: collections.Counter[int] = collections.Counter()
    for index in map(int, order):
        label = source[index]["label"]
        if not 0 <= label < source.classes:
            unlabelled = unlabelled or f"; {source.describe(index)} has no class (label {label})"
            continue
        if counts[label] < share or (counts[label] == share and spare > 0):
            spare -= counts[label] == share
            counts[label] += 1
            chosen.append(index)
        if len(chosen) == examples:
            return Subset(source, np.sort(chosen))
    fewest = min(range(source.classes), key=lambda label: counts[label])
    raise ValueError(
        f"examples={examples} asks for {share} or {share + 1} of each of {source.classes} classes, but "
        f"{source.name}/{source.split} has only {counts[fewest]} of class {source.class_names[fewest]!r}; "
        + (
            f"ask for at most {counts[fewest] * source.classes}, or for all by leaving `examples` out"
            if counts[fewest]
            else "is it a part of a split that is stored class by class? Take the whole of it, or leave `examples` out"
        )
        + unlabelled
    )
