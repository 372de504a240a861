"""Curves of all figures in a run's metrics.jsonl."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinymim_jax.pages.charts import Series, line_chart
from tinymim_jax.pages.page import figure, grid

# Figures that are shown in a table or as goodput instead.
_OMITTED = re.compile(
    r"step|time|skipped|substituted|eta_seconds|longest_data_wait_seconds|goodput|lost/.*|.*/(examples|substituted)"
)
_ACCURACY = re.compile(r"top\d+|knn|accuracy", re.IGNORECASE)
_NAMED = {
    "lr": "Learning rate",
    "train/gradient_norm": "Gradient norm",
    "images_per_second": "Images per second",
    "data_wait": "Share of the time spent waiting for data",
}
_FIRST = ("Training loss", "Learning rate", "Gradient norm")
_LOG = ("Training loss", "Evaluation loss", "Gradient norm")  # where values differ by more than a factor of 100


def curves(rows: Sequence[Mapping[str, Any]], students: Sequence[str] = ()) -> str:
    """A chart for each group of related figures, side by side; "" if there are none.

    Figures that were recorded at a single step are omitted, and of several `students` the parts of their losses.
    """
    drawn = [(title, series) for title, series in panels(rows) if any(len(set(one.x)) > 1 for one in series)]
    if students:
        drawn = [(title, [one for one in series if not _is_part(title, one.name, students)]) for title, series in drawn]
    return grid(figure(title, line_chart(title, series, log=title in _LOG)) for title, series in drawn)


def panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Series]]]:
    """(title, curves) of each chart. Names with two slashes ("eval/iou/wall") are left to tables."""
    points: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        for key, value in row.items():
            usable = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if usable and not _OMITTED.fullmatch(key) and key.count("/") < 2:
                points.setdefault(key, []).append((row["step"], value))
    losses = {key.split("/", 1)[1] for key in points if key.startswith("train/")}
    groups: dict[str, list[Series]] = {}
    for key, found in points.items():
        if any(value is not None for _, value in found):
            name = key.split("/", 1)[-1]
            series = Series(name, [step for step, _ in found], [value for _, value in found])
            groups.setdefault(_title(key, losses), []).append(series)
    order = [*_FIRST, *(title for title in groups if title not in _FIRST and title not in _NAMED.values())]
    order += [title for title in groups if title not in order]
    return [(title, groups[title]) for title in order if title in groups]


def overlaid(runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str) -> str:
    """One figure with the curve of `key` for each run; "" if no run has it."""
    series = []
    for name, rows in runs.items():
        found = [row for row in rows if key in row]
        if found:
            series.append(Series(name, [row["step"] for row in found], [row[key] for row in found]))
    return figure(title, line_chart(title, series, log=True)) if series else ""


def _is_part(title: str, name: str, students: Sequence[str]) -> bool:
    """Whether it is the loss of all students together, or a part of one student's."""
    return title.endswith(" loss") and name not in students


def _title(key: str, losses: set[str]) -> str:
    if key in _NAMED:
        return _NAMED[key]
    prefix, _, name = key.rpartition("/")
    kind = {"train": "Training", "eval": "Evaluation"}.get(prefix, prefix.capitalize() or "Run")
    if _ACCURACY.search(name):
        return f"{kind} accuracy"
    if prefix == "train" or (prefix == "eval" and name in losses):
        return f"{kind} loss"
    return f"{kind}: {name}"
