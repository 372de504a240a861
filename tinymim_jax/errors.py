"""How errors are worded: what, got, remedy, choices (importable from every floor)."""

import difflib
from collections.abc import Iterable


def unknown(what: str, got: object, choices: Iterable[object], shown: Iterable[object] | None = None) -> ValueError:
    """An error that names the nearest of the choices: `raise unknown("distill.target", "qkvv", TARGETS)`.

    It lists them all, or `shown` in their place.
    """
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(got), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = names if shown is None else shown
    return ValueError(f"{what}={got!r} is unknown{hint} Choices: {', '.join(map(repr, listed))}")
