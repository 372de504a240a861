"""The sections of a report on several runs: a sweep, a chain, or any folder with runs in it."""

import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tinymim_jax.pages.charts import interval
from tinymim_jax.pages.page import Raw, details, grid, table
from tinymim_jax.reports.curves import curves, overlaid
from tinymim_jax.reports.record import RunRecord, read_json
from tinymim_jax.reports.run import run_intro, run_sections

IN_FULL = 4
"""A report shows up to this many runs in full; of more runs only their curves, and links to their own reports."""
_CURVES_OF = 24  # runs; a page with the curves of more would be slow
_TOGETHER = 8  # curves in one chart


def folder_sections(folder: epath.Path, runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(heading, HTML): the table of the runs, that of the sweep, their losses together, and each run."""
    sections = [("Result", _result(read_json(folder / "summary.json"), read_json(folder / "choices.json")))]
    sections += [("Runs", _overview(folder, runs)), ("Sweep", _sweep(read_json(folder / "table.json")))]
    if 1 < len(runs) <= _TOGETHER:
        sections.append(("Losses", _losses(runs)))
    if len(runs) <= IN_FULL:
        sections += [(run.name, _in_full(run)) for run in runs]
    else:
        bodies = [details(run.name, run_intro(run) + curves(run.rows)) for run in runs[:_CURVES_OF]]
        sections.append(("Curves of each run", "".join(bodies)))
    return sections


def _result(summary: Any, chosen: Any) -> str:
    """Results and choices of `tinymim distill`; "" for other folders."""
    if not isinstance(summary, Mapping) or "knn" not in summary:
        return ""
    names = {"teacher": "teacher", "before": "student before distillation", "after": "student after distillation"}
    rows = [[f"k-NN accuracy, {names.get(name, name)}", value] for name, value in summary["knn"].items()]
    if "top1" in (summary.get("classifier") or {}):
        rows.append(["accuracy after fine-tuning", summary["classifier"]["top1"]])
    if (step := summary.get("step") or {}).get("took"):
        text = f"{step['took']:.3g} s; {step['expected']:.3g} s were expected ({step['by']})"
        rows.append(["a step of the distillation", text])
    rows.append(["exported model", summary.get("export") or "-"])
    text = table(["", ""], rows)
    if isinstance(chosen, Mapping):
        text += details(
            "What was chosen, and why",
            table(
                ["training", "key", "value", "why"], [[a, b, str(c), d] for a, b, c, d in chosen["decided"]["choices"]]
            ),
        )
    return text


def _overview(folder: epath.Path, runs: Sequence[RunRecord]) -> str:
    """A row for each run: its state and last figures, with a link to its own report."""
    results = [run.figures for run in runs]
    names = list(dict.fromkeys(name for figures in results for name in figures))
    rows = []
    for run, figures in zip(runs, results):
        report = run.folder / "report.html"
        relative = os.path.relpath(os.fspath(report), os.fspath(folder)) if "://" not in os.fspath(folder) else ""
        linked = bool(relative) and report.exists()
        cell = Raw(f'<a href="{html.escape(relative)}">{html.escape(run.name)}</a>') if linked else run.name
        step = run.known.get("step")
        rows.append([cell, run.config.get("task", "-"), run.known["stage"], step, *(figures.get(n) for n in names)])
    return table(["run", "task", "state", "step", *names], rows)


def _losses(runs: Sequence[RunRecord]) -> str:
    by_task: dict[str, dict[str, Any]] = {}
    for run in runs:
        by_task.setdefault(str(run.config.get("task")), {})[run.name] = run.rows
    return grid(overlaid(found, "train/loss", f"Training loss, {task}") for task, found in by_task.items())


def _sweep(found: Mapping[str, Any]) -> str:
    """The rows of table.json, best first, with a drawing of mean and deviation. Notes are the paper's figures."""
    rows = found.get("rows", [])
    if not rows:
        return ""
    overrides = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    notes = list(dict.fromkeys(key for row in rows for key in row["notes"]))
    ends = [row["mean"] + sign * (row["std"] or 0.0) for row in rows if row["mean"] is not None for sign in (-1, 1)]
    lines = []
    for row in rows:
        drawn: Any = "-"
        if row["mean"] is not None:
            said = f"{found['metric']} {row['mean']:.4g}" + (f" +- {row['std']:.2g}" if row["std"] else "")
            drawn = Raw(interval(row["mean"], row["std"] or 0.0, min(ends), max(ends), said))
        states = ", ".join(f"{count} {name}" for name, count in row["states"].items())
        lines.append(
            [row["point"], *(str(row["overrides"].get(key, "")) for key in overrides), drawn, row["mean"], row["std"]]
            + [row["notes"].get(key) for key in notes]
            + [states]
        )
    first = "highest" if found["direction"] == "max" else "lowest"
    caption = f"{found['metric']}: mean and standard deviation over seeds, {first} first"
    return table(["point", *overrides, "", found["metric"], "std", *notes, "runs"], lines, caption)


def _in_full(run: RunRecord) -> str:
    return run_intro(run) + "".join(f"<h3>{heading}</h3>{body}" for heading, body in run_sections(run) if body)
