"""`tinymim_jax.distill`: the `distill` command as a function."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, Any

from tinymim_jax.runtime.exits import DONE, PREEMPTED, Interrupted
from tinymim_jax.runtime.parent import PARENT_VARIABLE
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.starter.distill import SUMMARY
from tinymim_jax.sweeps.children import failure_reason
from tinymim_jax.sweeps.points import format_override


def distill(
    *,
    data: str | os.PathLike,
    teacher: str | os.PathLike,
    output: str | os.PathLike,
    student: str = "S",
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Distils a small network on your own images, like `tinymim distill`. A second call continues, or returns at once.

    It runs in processes of its own. This one may use the devices before and after the call, but not during it.

    Args:
      data: folder of images, or what data.source takes.
      teacher: workdir of a run, converted checkpoint, PyTorch file or folder of the Hugging Face hub.
      output: folder of all results.
      student: pico, nano, hybrid, Ti, S or B.
      overrides: keys of the configs, or STAGE.KEY, with values: {"train.batch_size": 64}.
      options: those of `tinymim distill --help`: hours=4, no_labels=True, export="onnx", data_dir="/data".

    Returns the content of OUTPUT/summary.json: "knn" (teacher, before, after), "student" and "classifier" (the figures
    of their last evaluations), "export" and "report" (paths).

    Raises:
      ValueError: the command failed; the message is the command's.
      Interrupted: it was stopped with everything saved; the same call continues.
    """
    words = ["distill", os.fspath(data), "--teacher", os.fspath(teacher), "--student", student]
    words += ["--output", os.fspath(output)]
    for name, value in options.items():
        words += [f"--{name}"] * bool(value) if isinstance(value, bool) else [f"--{name}", str(value)]
    words += [format_override(key, value) for key, value in (overrides or {}).items()]
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "tinymim_jax", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes from here alone, in notebooks as in terminals
    )
    assert process.stdout is not None
    lines: list[str] = []
    code = None
    while code is None:
        try:
            _copy(process.stdout, lines)
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
    process.stdout.close()
    if code == PREEMPTED:
        raise Interrupted(f"stopped; everything in {output} is saved, and the same call continues")
    if code != DONE:
        raise ValueError(failure_reason(lines, code))
    return json.loads((pathlib.Path(output).expanduser() / SUMMARY).read_text())


def _copy(output: IO[str], lines: list[str]) -> None:
    """Prints the output of the process until it ends. All of it is read even if nobody reads what is printed."""
    while line := output.readline():
        lines.append(line.rstrip())
        print_line(line.rstrip())
