"""The interface of data sources: random access to encoded images and labels; and subsets of a source."""

import abc
import collections
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from tinymim_jax.data.draws import permutation, philox


class Example(TypedDict):
    """One record: `image`, the encoded image file as stored, and `label` as stored, or -1 if there is none.

    `label` is not validated and may lie outside 0 to `classes - 1`; see `labels.labelled`.

    Segmentation sets add `mask`, an encoded image whose pixel values are class labels, as stored. Sources made by
    `masks.source.MaskSource` have `pixel_labels` instead: the classes, uint8 or uint16 `[height, width]`, with the
    largest value of that type for pixels to ignore. ImageNet ReaL adds `labels`, all correct labels of the image
    (possibly empty).
    """

    image: bytes
    label: int
    mask: NotRequired[bytes]
    pixel_labels: NotRequired[np.ndarray]
    labels: NotRequired[tuple[int, ...]]


class MaskClass(NamedTuple):
    """A class of masks, in the order of the class numbers.

    colour: RGB, 0 to 255, where masks are coded by colours.
    stored: the value in masks that the file of classes gives for it; None if the file gives no values.
    """

    name: str
    colour: tuple[int, int, int] | None
    stored: int | None = None


class Source(abc.ABC):
    """A random-access sequence of Examples; picklable and thread-safe.

    `name` and `split` are the arguments it was opened with. `class_names[label]` is the name of a class; `class_names`
    is empty if no record has a usable label. `label_problem` says why labels that are stored cannot be used.
    `mask_classes` are the classes of masks, where a file beside the data names them.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    label_problem: str = ""
    mask_classes: tuple[MaskClass, ...] = ()

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Record `index`, 0 <= index < len(self). Raises IndexError outside that range."""

    def known_labels(self) -> np.ndarray | None:
        """All labels, int `[len]`, if they are known without reading the records; otherwise None."""
        return None

    def describe(self, index: int) -> str:
        """A description of record `index` for messages; does not fail if the record cannot be read."""
        return f"record {index} of {self.name}/{self.split}"


class Subset(Source):
    """The records of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.name = source.name
        self.split = source.split
        self.class_names = source.class_names
        self.label_problem = source.label_problem
        self.mask_classes = source.mask_classes
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
    """A class-balanced random subset: `examples // classes` records of each class, or one more.

    The choice depends only on `source` and `seed`. Without classes the records are drawn uniformly. Records are read in
    a seeded random order until every class is complete, so choosing 1 % of ImageNet reads only a few per cent of it.
    Records without a label are never chosen. Raises ValueError if a class has too few records.
    """
    if not 0 < examples <= len(source):
        raise ValueError(
            f"data.examples={examples}: {source.name}/{source.split} has {len(source)} images; choose 1 to that many, "
            "or 0 for all"
        )
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
        f"examples={examples} needs {share} or {share + 1} of each of {source.classes} classes, but "
        f"{source.name}/{source.split} has only {counts[fewest]} of class {source.class_names[fewest]!r}; "
        + (
            f"use at most {counts[fewest] * source.classes}, or omit `examples` to use all"
            if counts[fewest]
            else "if this is part of a split that is sorted by class, use the whole split, or omit `examples`"
        )
        + unlabelled
    )
