"""`tinymim status`: the progress of a run, or of each run of a sweep or chain, during it or afterwards."""

import argparse
import json
import os
from typing import Any

from tinymim_jax.runtime.exits import DONE, ERROR, PREEMPTED, STALLED
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.runtime.runs import find_runs, read_run
from tinymim_jax.runtime.workdir import LIVE

EXIT_RUNNING = 3

_CODES = {"finished": DONE, "failed": ERROR, "pruned": ERROR, "interrupted": PREEMPTED, "stalled": STALLED}

HELP = "show the progress of a run, or of each run of a sweep or chain"

_EPILOG = """\
Stages: starting, compiling, training, evaluating; finished; interrupted (the same command resumes it), failed, stalled.
A process that was killed is shown as interrupted. DIR may be the folder of a sweep or chain, or gs://BUCKET/PATH.

Exit status: 0 finished, 3 running, 75 interrupted, 86 stalled, 1 failed or error. Of several runs the worst counts, in
the order 1, 86, 75, 3, 0.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `status` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument("workdir", metavar="DIR", help="--workdir of a run, sweep or chain")
    command.add_argument("--json", action="store_true", help="one JSON line for each run")


def run(options: argparse.Namespace) -> int:
    """Prints the status of a run, or of the runs below a folder; returns the exit status.

    Raises FileNotFoundError if there are none.
    """
    from etils import epath

    root = epath.Path(options.workdir).expanduser()
    found = [read_run(path) for path in find_runs(root)]
    if not found:
        raise FileNotFoundError(f"no run has begun in {root}: give the --workdir of a run, a sweep or a chain")
    names = [_below(os.fspath(root), row["workdir"]) for row in found]
    if options.json:
        for row in found:
            print(json.dumps(row))
    elif names == [""]:
        print(in_full(found[0]))
    else:
        width = max(map(len, names))
        for name, row in zip(names, found, strict=True):
            print(f"{name:<{width}}  {in_a_line(row)}")
        stages = [row["stage"] for row in found]
        print(f"{len(found)} runs: " + ", ".join(f"{stages.count(s)} {s}" for s in dict.fromkeys(stages)))
    codes = [_CODES.get(row["stage"], EXIT_RUNNING) for row in found]
    order = (ERROR, STALLED, PREEMPTED, EXIT_RUNNING, DONE)
    return min(codes, key=order.index)


def _below(root: str, path: str) -> str:
    """The part of `path` below `root`; "" for `root` itself. Paths below "." do not begin with it."""
    return "" if path == root else path.removeprefix(root.rstrip("/") + "/")


def in_full(row: dict[str, Any]) -> str:
    """The status of one run, on several lines."""
    lines = [("stage", _stage(row)), ("step", _step(row))]
    if "eta_seconds" in row:
        lines.append(("ETA", format_seconds(row["eta_seconds"])))
    if "images_per_second" in row:
        lines.append(("speed", f"{row['images_per_second']:,.0f} images/s, data wait {row.get('data_wait', 0):.0%}"))
    lines.append(("checkpoint", _checkpoint(row)))
    if "restarts" in row:
        lines.append(("restarts", str(row["restarts"])))
    if "skipped" in row:
        lines.append(("skipped", f"{row['skipped']} steps, {row.get('substituted', 0)} images replaced by others"))
    if "goodput" in row:
        lost = {name.removeprefix("lost/"): share for name, share in row.items() if name.startswith("lost/")}
        said = ", ".join(f"{name} {share:.1%}" for name, share in lost.items() if share >= 0.0005)
        lines.append(("goodput", f"{row['goodput']:.1%} of the time in steps" + (f"; lost to {said}" if said else "")))
    for name in ("train", "eval", "probe"):
        if row.get(name):
            lines.append((name, _figures(row[name])))
    if "host" in row:
        lines.append(("where", f"process {row.get('pid')} on {row['host']}, {row.get('processes')} in all"))
    if row.get("error"):
        lines.append(("said", row["error"]))
    return "\n".join(f"{name:<10}  {text}" for name, text in lines)


def in_a_line(row: dict[str, Any]) -> str:
    """The status of one run, on one line."""
    parts = [row["stage"], _step(row)]
    if "eta_seconds" in row:
        parts.append(f"ETA {format_seconds(row['eta_seconds'])}")
    if row["stage"] in LIVE and "images_per_second" in row:
        parts.append(f"{row['images_per_second']:,.0f} images/s")
    if row.get("restarts"):
        parts.append(f"{row['restarts']} restarts")
    figures = row.get("eval") or row.get("train")
    if figures:
        parts.append(_figures(figures))
    if row.get("error") and row["stage"] != "finished":
        parts.append(row["error"].split("\n")[0][:100])
    return " | ".join(parts)


def _stage(row: dict[str, Any]) -> str:
    silent = row.get("seconds_since_sign_of_life", 0.0)
    if row["stage"] in LIVE and silent > 60:
        return f"{row['stage']}, but no sign of life for {format_seconds(silent)}"
    return row["stage"]


def _step(row: dict[str, Any]) -> str:
    if "step" not in row:
        return "step ?"
    total = row.get("total_steps")
    return f"step {row['step']}" + (f" of {total} ({row['step'] / max(total, 1):.0%})" if total else "")


def _checkpoint(row: dict[str, Any]) -> str:
    saved = row.get("checkpoint")
    return f"step {saved['step']}, {format_seconds(saved['seconds_ago'])} ago" if saved else "none yet"


def _figures(figures: dict[str, Any]) -> str:
    """Figures in a line, without counts and without those of single classes ("eval/iou/wall")."""
    said = (
        f"{n.split('/', 1)[-1]} {v:.4g}"
        for n, v in figures.items()
        if v is not None and not n.endswith("examples") and n.count("/") < 2
    )
    return ", ".join(said)
