"""Which runs there are below a folder, and what is known about each from its files."""

import os
import re
import time
from typing import Any

from etils import epath

from tinymim_jax.runtime.goodput import shares
from tinymim_jax.runtime.heartbeat import read_status
from tinymim_jax.runtime.workdir import CONFIG, FAILED, LIVE, PRUNED, read_state


def find_runs(root: Any, depth: int = 2) -> list[Any]:
    """The folders of runs: `root` itself, or folders up to `depth` levels below it (points, stages of points)."""
    if (root / "model.safetensors").exists():  # a model of the Hugging Face hub, which has a config.json too
        return []
    if any((root / name).exists() for name in (CONFIG, FAILED, PRUNED)):
        return [root]
    if depth == 0 or not root.is_dir():
        return []
    return [found for path in sorted(root.iterdir()) if path.is_dir() for found in find_runs(path, depth - 1)]


def read_run(workdir: Any) -> dict[str, Any]:
    """What is known about one run, as JSON values.

    stage, step, total_steps; of a live one eta_seconds; images_per_second, data_wait, skipped, substituted, restarts;
    checkpoint {step, seconds_ago}; goodput and what was lost to what, as shares of the time; train and eval, the last
    figures; error. Keys are missing where nothing is known.
    """
    status, state = read_status(workdir), read_state(workdir)
    row: dict[str, Any] = {"workdir": os.fspath(workdir), "stage": state.name}
    if state.name == "running":
        row["stage"] = status["stage"] if status.get("stage") in LIVE else "starting"
    if status:
        row["restarts"] = status.get("attempts", 1) - 1
        row["seconds_since_sign_of_life"] = max(0.0, time.time() - status["time"])
        row |= shares(status["seconds"]) if "seconds" in status else {}
    copied = ("step", "total_steps", "processes", "host", "pid", "images_per_second", "data_wait", "skipped")
    row |= {key: status[key] for key in (*copied, "substituted", "train", "eval", "probe") if key in status}
    if state.result is not None:
        row["eval"] = {f"eval/{name}": value for name, value in state.result.items()}
    elif state.name != "running" and state.detail:
        row["error"] = state.detail
    if row["stage"] in LIVE and {"eta_seconds", "reported"} <= status.keys():
        row["eta_seconds"] = max(0.0, status["eta_seconds"] - (time.time() - status["reported"]))
    if (saved := newest_checkpoint(workdir)) is not None:
        row["checkpoint"] = saved
        row.setdefault("step", saved["step"])
        if row["stage"] not in LIVE:  # a refused start writes step 0 in place of the last step of the attempt before it
            row["step"] = max(row["step"], saved["step"])
    return row


def newest_checkpoint(workdir: Any) -> dict[str, Any] | None:
    """{"step", "seconds_ago"} of a run's newest complete checkpoint; None if there is none."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        return None
    steps = [int(path.name) for path in folder.iterdir() if re.fullmatch(r"\d+", path.name)]
    if not steps:
        return None
    written = (folder / str(max(steps)) / "_CHECKPOINT_METADATA").stat().mtime
    return {"step": max(steps), "seconds_ago": max(0.0, time.time() - written)}
