"""The labels of a source: checked where a task learns or evaluates by them, and its classes in a sentence."""

import logging

import numpy as np

from tinymim_jax.data.sources.examples import Example, Source

log = logging.getLogger(__name__)

# Records of a source with unknown labels that are read at once, so that most mistakes show before a run starts.
_SAMPLED = 16
_NAMES_SHOWN = 10
_REMEDY = "label them, leave them out, or choose another split; pre-training (mae, distill) needs no labels"


class LabelError(ValueError):
    """A label that a task needs is missing, or is no class of the source."""


def labelled(source: Source, purpose: str = "this task learns and evaluates by them") -> Source:
    """The same records, each of them with a label from 0 to `source.classes - 1`.

    Where the labels are known without reading the records (`Source.known_labels`), all are checked now, and classes
    without an image are logged. Otherwise a few records are read now, and reading any other whose label is not usable
    raises LabelError later; `data.pipeline` passes it on.

    Raises LabelError, which says how many records lack a label, the first of them, and the remedy.
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
            except Exception:  # a damaged record: the pipeline replaces it, or stops
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
        raise LabelError(f"{where} has one class alone, {source.class_names[0]!r}{because}: there is nothing to learn")
    if empty := np.flatnonzero(np.bincount(labels, minlength=source.classes) == 0).tolist():
        names = shown([source.class_names[label] for label in empty])
        log.warning("%d of the %d classes of %s have no image: %s", len(empty), source.classes, where, names)
    return source


def class_summary(source: Source) -> str:
    """'3 classes: cat, dog, fox', or 'no labels'; of many classes the first ones and the last."""
    if source.classes == 0:
        return "no labels"
    return f"{source.classes:,} class{'es' * (source.classes > 1)}: {shown(source.class_names)}"


def shown(names: list[str] | tuple[str, ...]) -> str:
    """Names separated by commas; of more than ten the first nine and the last."""
    if len(names) <= _NAMES_SHOWN:
        return ", ".join(names)
    return ", ".join([*names[: _NAMES_SHOWN - 1], "...", names[-1]])


def _none_of(source: Source) -> str:
    return f"none of the {source.classes:,} classes (0 to {source.classes - 1})"


class _Checked(Source):
    """A source that raises LabelError where a record is read whose label is no class."""

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
