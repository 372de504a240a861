"""Validation of the labels of a source for tasks that need them, and a one-line summary of its classes."""

import logging

import numpy as np

from tinymim_jax.data.sources.examples import Example, Source

log = logging.getLogger(__name__)

# If labels are not indexed, this many records are checked on opening, to find most errors before a run starts.
_SAMPLED = 16
_NAMES_SHOWN = 10
_REMEDY = "label them, remove them, or choose another split; pre-training (mae, distill) needs no labels"


class LabelError(ValueError):
    """A label that a task needs is missing, or is not a class of the source."""


def labelled(source: Source, purpose: str = "this task needs them for training and evaluation") -> Source:
    """`source`, checked so that every record has a label from 0 to `source.classes - 1`.

    If all labels are known without reading the records (`Source.known_labels`), all are checked now, and classes
    without images are logged. Otherwise a sample of records is checked now, and reading any other record with an
    invalid label raises LabelError; `data.pipeline` passes it on. `purpose`, for errors: why labels are needed.

    Raises LabelError with the number of invalid records, the first of them, and the remedy.
    """
    where = f"split {source.split!r} of {source.name!r}"
    because = f" ({source.label_problem})" if source.label_problem else ""
    if source.classes == 0:
        raise LabelError(f"{where} has no labels{because}: {purpose}; choose a labelled set or split")
    labels = source.known_labels()
    if labels is None:
        checked = _Checked(source)
        for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int).tolist():
            try:
                checked[index]
            except LabelError:
                raise
            except Exception:  # a damaged record is handled by the pipeline
                continue
        return checked
    counts = []
    missing, outside = np.flatnonzero(labels == -1), np.flatnonzero((labels < -1) | (labels >= source.classes))
    for indices, what in ((missing, "have label -1 (no label)"), (outside, f"have a label that is {_none_of(source)}")):
        if len(indices):
            first = int(indices[0])
            value = f" with label {labels[first]}" if indices is outside else ""
            counts.append(
                f"{len(indices):,} of {len(labels):,} examples of {where} {what}, first {source.describe(first)}{value}"
            )
    if counts:
        raise LabelError(f"{'; '.join(counts)}{because}; {_REMEDY}")
    if source.classes == 1:
        raise LabelError(
            f"{where} has only one class, {source.class_names[0]!r}{because}: classification needs at least two"
        )
    if empty := np.flatnonzero(np.bincount(labels, minlength=source.classes) == 0).tolist():
        names = shown([source.class_names[label] for label in empty])
        log.warning("%d of the %d classes of %s have no image: %s", len(empty), source.classes, where, names)
    return source


def class_summary(source: Source) -> str:
    """A summary such as '3 classes: cat, dog, fox' or 'no labels'; long lists are shortened as in `shown`."""
    if source.classes == 0:
        return "no labels"
    return f"{source.classes:,} class{'es' * (source.classes > 1)}: {shown(source.class_names)}"


def shown(names: list[str] | tuple[str, ...]) -> str:
    """Names separated by commas; if there are more than ten, only the first nine and the last."""
    if len(names) <= _NAMES_SHOWN:
        return ", ".join(names)
    return ", ".join([*names[: _NAMES_SHOWN - 1], "...", names[-1]])


def _none_of(source: Source) -> str:
    return f"none of the {source.classes:,} classes (0 to {source.classes - 1})"


class _Checked(Source):
    """A source that raises LabelError on reading a record with an invalid label."""

    def __init__(self, source: Source):
        self.name, self.split, self.class_names = source.name, source.split, source.class_names
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        label = example["label"]
        if not 0 <= label < self.classes:
            what = "label -1 (no label)" if label == -1 else f"label {label}, {_none_of(self)}"
            raise LabelError(f"{self.describe(index)} has {what}; {_REMEDY}")
        return example

    def describe(self, index: int) -> str:
        return self._source.describe(index)
