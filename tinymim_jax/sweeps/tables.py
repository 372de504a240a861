"""Tables of finished points: mean and standard deviation over seeds, best first; as Markdown, CSV, JSON and a plot."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinymim_jax.errors import unknown
from tinymim_jax.markdown import markdown_table
from tinymim_jax.runtime.files import write_json, write_text
from tinymim_jax.runtime.workdir import RunState
from tinymim_jax.sweeps.points import Point, short_names

_USUAL = ("top1", "loss")


def default_direction(metric: str) -> str:
    """Whether a metric is better "min" or "max", by its name."""
    return "min" if "loss" in metric else "max"


def write_table(
    points: Sequence[Point],
    states: Mapping[str, RunState],
    workdir: pathlib.Path,
    *,
    metric: str | None = None,
    direction: str | None = None,
) -> str:
    """Writes table.md, .csv, .json and, where matplotlib is, .png in `workdir`; returns the Markdown.

    Raises ValueError when no result has the metric.
    """
    metric = _metric(metric, states)
    best = direction or default_direction(metric)
    rows = summarize(points, states, metric=metric, direction=best)
    labels = short_names(dict.fromkeys(key for row in rows for key in row["overrides"]))
    first = "highest" if best == "max" else "lowest"
    title = f"{workdir.name}: {metric}, mean and standard deviation over seeds, {first} first"
    text = f"{title}\n\n{_markdown(rows, labels, metric)}"
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "table.md", text + "\n")
    write_text(workdir / "table.csv", _csv(rows, metric))
    write_json(workdir / "table.json", {"metric": metric, "direction": best, "rows": rows})
    names = "table.md, table.csv, table.json" + _draw(rows, labels, metric, workdir / "table.png")
    return f"{text}\n\n{workdir}: {names}"


def summarize(
    points: Sequence[Point], states: Mapping[str, RunState], *, metric: str, direction: str
) -> list[dict[str, Any]]:
    """A row for each point number: overrides, notes, mean, std (n - 1 in the denominator, None for one run), the values
    by seed, and the number of its points in each state. Best first; rows without a value come last.
    """
    rows = []
    for number in dict.fromkeys(point.number for point in points):
        own = [point for point in points if point.number == number]
        results = [states[point.name].result for point in own]
        values = [float(result[metric]) for result in results if result and result.get(metric) is not None]
        names = [states[point.name].name for point in own]
        rows.append(
            {
                "point": number,
                "overrides": dict(own[0].overrides),
                "notes": dict(own[0].notes),
                "mean": float(np.mean(values)) if values else None,
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "values": values,
                "states": {name: names.count(name) for name in dict.fromkeys(names)},
                "workdirs": [point.name for point in own],
            }
        )
    sign = -1 if direction == "max" else 1
    return sorted(rows, key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0), row["point"]))


def _metric(wanted: str | None, states: Mapping[str, RunState]) -> str:
    found = dict.fromkeys(key for state in states.values() if state.result for key in state.result)
    if wanted is None:
        return next((name for name in _USUAL if name in found), next(iter(found), "loss"))
    if found and wanted not in found:
        raise unknown("--metric", wanted, found)
    return wanted


def _columns(rows: list[dict]) -> tuple[list[str], list[str]]:
    overrides = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    return overrides, list(dict.fromkeys(key for row in rows for key in row["notes"]))


def _markdown(rows: list[dict], labels: Mapping[str, str], metric: str) -> str:
    overrides, notes = _columns(rows)
    head = ["point", *(labels[key] for key in overrides), metric, "std", *notes, "runs"]
    lines = []
    for row in rows:
        states = ", ".join(f"{count} {name}" for name, count in row["states"].items())
        lines.append(
            [str(row["point"])]
            + [_text(row["overrides"].get(key, "")) for key in overrides]
            + [_text(row["mean"]), _text(row["std"])]
            + [_text(row["notes"].get(key, "")) for key in notes]
            + [states]
        )
    return markdown_table(head, lines)


def _csv(rows: list[dict], metric: str) -> str:
    overrides, notes = _columns(rows)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["point", *overrides, f"{metric}_mean", f"{metric}_std", "finished", *notes])
    for row in rows:
        figures = [row["mean"], row["std"], len(row["values"])]
        own = [[row[part].get(key) for key in keys] for part, keys in (("overrides", overrides), ("notes", notes))]
        writer.writerow([row["point"], *own[0], *figures, *own[1]])
    return file.getvalue()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(rows: list[dict], labels: Mapping[str, str], metric: str, path: pathlib.Path) -> str:
    """Plots means with deviations, best on top. Returns the text to add to the list of files."""
    drawn = [row for row in rows if row["mean"] is not None][::-1]
    if not drawn:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return " (no plot: matplotlib is missing, pip install 'tinymim-jax[demo]')"
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    for height, row in enumerate(drawn):
        axes.errorbar(row["mean"], height, xerr=row["std"] or 0.0, fmt="o", capsize=3, color="tab:blue")
        axes.plot(row["values"], [height] * len(row["values"]), "|", color="tab:gray")
    names = [", ".join(f"{labels[key]}={_text(value)}" for key, value in row["overrides"].items()) for row in drawn]
    axes.set_yticks(range(len(drawn)), [f"{row['point']}: {name[:60]}" for row, name in zip(drawn, names)], fontsize=8)
    axes.set_xlabel(metric)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return f", {path.name}"
