"""Class names: which class of a classifier each class of a data set is.

Every place where a classifier meets a data set goes through `match_classes`; an index alone does not say what it means.
"""

import logging
import unicodedata
from collections.abc import Sequence

import numpy as np

log = logging.getLogger(__name__)

_LISTED = 5  # names in a message


REMEDY = (
    "Use the data that the classifier was trained on, or give the folders (or the lines of classes.txt) the names that "
    "it was trained with. If these are the same classes in the same order under other names, change class_names under "
    "preprocessing in the checkpoint's model.json"
)


class ClassMismatch(ValueError):
    """The classes of a data set are not those of a classifier."""


def match_classes(
    known: Sequence[str],
    given: Sequence[str],
    *,
    classes: int | None = None,
    subset: bool = False,
    numbers_are_indices: bool = False,
    classifier: str = "the checkpoint",
    data: str = "the data set",
    remedy: str = REMEDY,
) -> np.ndarray:
    """int32 `[len(given)]`: `result[label]` is the classifier's index of what the data set calls `label`.

    Names are compared as `same_names` says, and equal names in another order give a permutation. A classifier without
    names, such as a converted file, is matched by position, or by number where the data set's names are numbers from
    0 to `classes - 1`; one line is logged.

    Args:
      known: the classifier's class names in the order of its outputs; empty if it has none.
      given: the data set's class names in the order of its labels.
      classes: number of the classifier's outputs; needed where `known` is empty.
      subset: the data set may lack some of the classifier's classes.
      numbers_are_indices: names of the data set that are numbers are output indices, whatever `known` says. For sets
        whose numbering is a convention, as ImageNet's is.
      classifier, data: what to call the two in messages.
      remedy: what an error says to do.

    Raises ClassMismatch (a ValueError) that lists the names that differ and says what to do.
    """
    if known and classes not in (None, len(known)):
        raise ClassMismatch(
            f"{classifier} has {classes} outputs but names {len(known)} classes: correct class_names under "
            "preprocessing in its model.json"
        )
    classes = len(known) if classes is None else classes
    if same_names(known, given):
        return np.arange(len(given), dtype=np.int32)
    numbers = _as_indices(given, classes) if numbers_are_indices or not known else None
    if known and numbers is None:
        indices = _by_name(known, given, classifier, data, remedy)
    else:
        indices = _without_names(given, numbers, classes, classifier, data, remedy)
    if len(given) < classes and not subset:
        present = set(indices.tolist())
        absent = [known[i] if known else str(i) for i in range(classes) if i not in present]
        raise ClassMismatch(
            f"{data} lacks {len(absent)} of the {classes} classes of {classifier}: {_some(absent)}. {remedy}"
        )
    return indices


def same_names(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether both lists name the same classes in the same order.

    Numbers are compared as numbers ("00" is "0"), other names by their Unicode normal form: macOS stores "é" in
    folder names as two characters.
    """
    return len(first) == len(second) and all(_key(a) == _key(b) for a, b in zip(first, second))


def describe_difference(known: Sequence[str], given: Sequence[str], *, then: str = "there", now: str = "here") -> str:
    """What differs between two lists of class names, as a clause of a message; "" where `same_names` holds.

    Order counts. `then` and `now` say where `known` and `given` come from: "only there: 'cat'; only here: 'emu'".
    """
    if same_names(known, given):
        return ""
    ours, theirs = {_key(name) for name in known}, {_key(name) for name in given}
    parts = []
    if only := [name for name in known if _key(name) not in theirs]:
        parts.append(f"only {then}: {_some(only)}")
    if only := [name for name in given if _key(name) not in ours]:
        parts.append(f"only {now}: {_some(only)}")
    if not parts:
        if len(known) != len(given):
            return f"{len(known)} names {then}, {len(given)} {now}; some occur more than once"
        place = next(i for i, (a, b) in enumerate(zip(known, given)) if _key(a) != _key(b))
        return f"the order: class {place} is {known[place]!r} {then} and {given[place]!r} {now}"
    return "; ".join(parts)


def _by_name(known: Sequence[str], given: Sequence[str], classifier: str, data: str, remedy: str) -> np.ndarray:
    places = {_key(name): place for place, name in enumerate(known)}
    unknown = [name for name in given if _key(name) not in places]
    if unknown:
        theirs = {_key(name) for name in given}
        absent = [name for name in known if _key(name) not in theirs]
        missing = f" {data} lacks {len(absent)} of them: {_some(absent)}." if absent else ""
        raise ClassMismatch(
            f"{classifier} does not know {len(unknown)} of the {len(given)} classes of {data}: {_some(unknown)}. It "
            f"knows {len(known)} classes: {_some(known)}.{missing} {remedy}"
        )
    for names, owner in ((known, classifier), (given, data)):
        if repeated := _repeated(names):
            raise ClassMismatch(
                f"{owner} has several classes called {_some(repeated)}, and the order of its classes is not that of "
                f"the other: they cannot be matched by name. {remedy}"
            )
    return np.array([places[_key(name)] for name in given], np.int32)


def _without_names(
    given: Sequence[str], numbers: np.ndarray | None, classes: int, classifier: str, data: str, remedy: str
) -> np.ndarray:
    if numbers is not None:
        log.info("%s: its class names are numbers and are taken as output indices of %s", data, classifier)
        return numbers
    if len(given) != classes:
        raise ClassMismatch(
            f"{data} has {len(given)} classes and {classifier}, which does not name its own, {classes}: they cannot be "
            f"matched. {remedy}"
        )
    log.info("%s does not name its classes: they are matched with those of %s by position", classifier, data)
    return np.arange(classes, dtype=np.int32)


def _as_indices(names: Sequence[str], classes: int) -> np.ndarray | None:
    """The names as indices below `classes`; None if they are anything else, or some occur twice."""
    if not names or not all(name.isdecimal() for name in names):
        return None
    numbers = [int(name) for name in names]
    return np.array(numbers, np.int32) if max(numbers) < classes and len({*numbers}) == len(numbers) else None


def _key(name: str) -> str:
    return str(int(name)) if name.isdecimal() else unicodedata.normalize("NFC", name)


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if (key := _key(name)) in seen or seen.add(key)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
